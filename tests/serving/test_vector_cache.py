import os
import sqlite3
import threading

import numpy as np
import pytest
import torch

from pml_compat.serving.vector_cache import VectorCache
from tests.processes import exit_code

ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def kept(cache):
    """Return what a cache holds, by id."""
    known, vectors = cache.get(cache.ids())
    assert known.all() and vectors.dtype == np.float32 and len(cache) == len(vectors)
    return dict(zip(cache.ids(), vectors.tolist(), strict=True))


def test_vectors_by_id():
    with VectorCache(":memory:") as cache:
        assert cache.width is None and len(cache) == 0 and cache.ids() == []
        cache.add([30, 10, 20], ROWS[:3])
        known, vectors = cache.get([20, 99, 30, 20])
        assert known.tolist() == [True, False, True, True] and known.dtype == bool
        np.testing.assert_array_equal(vectors, ROWS[[2, 0, 2]])  # in the order that was asked for
        assert cache.width == 3 and len(cache) == 3 and cache.ids() == [10, 20, 30]


def test_nothing_asked_for_and_nothing_found():
    with VectorCache(":memory:") as cache:
        assert [part.shape for part in cache.get([])] == [(0,), (0, 0)]
        assert cache.get([5])[0].tolist() == [False]
        cache.add([], np.empty((0, 7)))
        assert cache.width is None
        cache.add([1], ROWS[:1])
        assert cache.get([5])[1].shape == (0, 3)


def test_integers_of_64_bits_and_strings():
    ids = [2**63 - 1, -(2**63), 2**53 + 1, 2**53, 0, "0", "", "é/猫.jpg", "a\0b", "2 "]
    rows = np.arange(len(ids), dtype=np.float32)[:, None]
    with VectorCache(":memory:") as cache:
        cache.add(ids, rows)
        np.testing.assert_array_equal(cache.get(ids)[1], rows)
        assert set(cache.ids()) == set(ids)
        same = [np.int64(2**53 + 1), np.uint8(0), np.str_("0")]
        np.testing.assert_array_equal(cache.get(same)[1], rows[[2, 4, 5]])
        cache.add(np.array([0, 7]), np.array([[50.0], [51.0]]))
        assert kept(cache)[0] == [50.0] and kept(cache)["0"] == [5.0] and kept(cache)[7] == [51.0]


@pytest.mark.parametrize(
    "value", [1.0, None, True, np.True_, b"a", (1, 2), np.float32(3), torch.tensor(3), 2**63, np.uint64(2**64 - 1)]
)
def test_other_ids(value):
    with VectorCache(":memory:") as cache:
        with pytest.raises(ValueError, match="ids must be integers"):
            cache.add([5, value], ROWS[:2])
        with pytest.raises(ValueError, match="ids must be integers"):
            cache.get([5, value])
        assert len(cache) == 0 and cache.width is None


def test_what_is_there_already_is_replaced():
    with VectorCache(":memory:") as cache:
        cache.add([1, 2], ROWS[:2])
        cache.add([2, 3, 3], ROWS[1:])
        assert kept(cache) == {1: ROWS[0].tolist(), 2: ROWS[1].tolist(), 3: ROWS[3].tolist()}


@pytest.mark.parametrize(
    "vectors",
    [
        ROWS[:2].astype(np.float16),
        ROWS[:2].astype(np.float64),
        torch.tensor(ROWS[:2]),
        ROWS.T.copy().T[:2],
        ROWS[:2].tolist(),
    ],
    ids=["half", "double", "tensor", "strided", "list"],
)
def test_vectors_of_other_types(vectors):
    with VectorCache(":memory:") as cache:
        cache.add([1, 2], vectors)
        np.testing.assert_array_equal(cache.get([1, 2])[1], np.asarray(vectors, dtype=np.float32))


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([5, 6], [[1.0, 2.0, 3.0], [4.0, np.nan, 5.0]], "vectors must be finite, the row of id 6 has a NaN"),
        (["x"], [[1.0, np.inf, 5.0]], "vectors must be finite, the row of id 'x' has a NaN or an infinity"),
        ([5, 1], np.ones((2, 4)), "vectors must be 3 wide, as those that are kept, got width 4"),
        ([5, 6], np.ones((1, 3)), r"vectors must be one row an id, \(2, width\), got shape \(1, 3\)"),
        ([5, 6, 7], np.ones(3), r"vectors must be one row an id, \(3, width\), got shape \(3,\)"),
        ([5], np.ones((1, 3, 1)), r"vectors must be one row an id, \(1, width\), got shape \(1, 3, 1\)"),
    ],
)
def test_an_error_adds_nothing(tmp_path, ids, vectors, message):
    with VectorCache(tmp_path / "cache.db") as cache:
        cache.add([1], ROWS[:1])
        with pytest.raises(ValueError, match=message):
            cache.add(ids, vectors)
        assert kept(cache) == {1: ROWS[0].tolist()} and cache.width == 3
        cache.add([2], ROWS[1:2])  # and the cache works on
    with VectorCache(tmp_path / "cache.db") as cache:
        assert kept(cache) == {1: ROWS[0].tolist(), 2: ROWS[1].tolist()}


def test_vectors_without_a_width():
    with VectorCache(":memory:") as cache:
        with pytest.raises(ValueError, match="vectors must be"):
            cache.add([1], np.empty((1, 0)))
        cache.add([1], ROWS[:1])
        assert cache.width == 3


def test_more_ids_than_one_question_takes():
    count = 1733
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    with VectorCache(":memory:") as cache:
        cache.add(range(count), rows)
        asked = np.random.default_rng(0).permutation(count + 100)
        known, vectors = cache.get(asked)
        assert known.tolist() == (asked < count).tolist()
        np.testing.assert_array_equal(vectors, rows[asked[asked < count]])
        assert cache.ids() == list(range(count))


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_vectors_are_there_when_the_file_is_opened_again(tmp_path, as_path):
    path = as_path(tmp_path / "cache.db")
    with VectorCache(path) as cache:
        cache.add([1, "a"], ROWS[:2])
    with VectorCache(path) as cache:
        assert kept(cache) == {1: ROWS[0].tolist(), "a": ROWS[1].tolist()} and cache.width == 3
        with pytest.raises(ValueError, match="vectors must be 3 wide"):
            cache.add([5], np.ones((1, 2)))


def test_a_closed_cache_is_closed(tmp_path):
    with VectorCache(tmp_path / "cache.db") as cache:
        pass
    with pytest.raises(sqlite3.ProgrammingError):
        cache.ids()


def test_caches_in_memory_are_apart():
    with VectorCache(":memory:") as first, VectorCache(":memory:") as second:
        first.add([1], ROWS[:1])
        assert len(second) == 0


def test_fingerprints(tmp_path):
    path = tmp_path / "cache.db"
    with VectorCache(path, fingerprint="one") as cache:
        assert cache.fingerprint == "one"
        cache.add([1], ROWS[:1])
    for given in ("one", None):
        with VectorCache(path, fingerprint=given) as cache:
            assert cache.fingerprint == "one" and len(cache) == 1
    with pytest.raises(
        ValueError, match=r"whose vectors .* keeps, 'one', got 'two'; take another file for another model"
    ):
        VectorCache(path, fingerprint="two")
    with VectorCache(path) as cache:
        assert cache.fingerprint == "one" and len(cache) == 1


def test_a_fingerprint_for_vectors_that_were_kept_without_one(tmp_path):
    path = tmp_path / "cache.db"
    VectorCache(path).close()
    with VectorCache(path) as cache:
        assert cache.fingerprint is None
        cache.add([1], ROWS[:1])
    with pytest.raises(
        ValueError, match=r"fingerprint must be None for .* kept without one, got 'one'; delete the file"
    ):
        VectorCache(path, fingerprint="one")
    VectorCache(tmp_path / "empty.db").close()
    VectorCache(tmp_path / "empty.db", fingerprint="one").close()  # nothing was kept yet
    with pytest.raises(ValueError, match="'one', got 'two'"):
        VectorCache(tmp_path / "empty.db", fingerprint="two")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "cache.db"
    path.write_bytes(b"these are no vectors; " * 100)
    with pytest.raises(
        ValueError, match=r"path must be a file of VectorCache, .*cache\.db' is not: file is not a database"
    ):
        VectorCache(path)
    assert path.read_bytes() == b"these are no vectors; " * 100
    with pytest.raises(ValueError, match="path must be a file of VectorCache"):
        VectorCache(tmp_path)  # a folder


def test_a_truncated_file(tmp_path):
    path = tmp_path / "cache.db"
    with VectorCache(path) as cache:
        cache.add(range(2000), np.ones((2000, 16)))
    for size in (path.stat().st_size // 2, 50):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError, match=r"path must be a file of VectorCache, .*cache\.db' is not: "):
            VectorCache(path)


def tables(path):
    database = sqlite3.connect(path)
    found = sorted(database.execute("SELECT type, name, sql FROM sqlite_master"))
    database.close()
    return found


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["CREATE TABLE notes (text TEXT)"], "is not|is of"),
        (
            ["CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT)", "INSERT INTO meta VALUES ('format', 'x/1')"],
            "is of 'x/1'",
        ),
    ],
    ids=["no format", "another format"],
)
def test_the_database_of_another_program_is_refused_and_left_as_it_was(tmp_path, statements, message):
    path = tmp_path / "other.db"
    database = sqlite3.connect(path)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()
    before = tables(path)
    with pytest.raises(ValueError, match=rf"path must be a file of VectorCache, .*other\.db' ({message})"):
        VectorCache(path).close()
    assert tables(path) == before


def test_two_connections_see_each_others_rows(tmp_path):
    with VectorCache(tmp_path / "cache.db") as first, VectorCache(tmp_path / "cache.db") as second:
        first.add([1], ROWS[:1])
        assert kept(second) == {1: ROWS[0].tolist()}
        second.add([1, 2], ROWS[1:3])
        assert kept(first) == {1: ROWS[1].tolist(), 2: ROWS[2].tolist()}
        with pytest.raises(ValueError, match="vectors must be 3 wide"):
            first.add([3], np.ones((1, 2)))


def test_a_new_file_may_be_opened_by_several_at_once(tmp_path):
    """As the workers of one service do when they start."""
    for trial in range(15):
        path, together, errors = tmp_path / f"{trial}.db", threading.Barrier(4), []

        def work(number, path=path, together=together, errors=errors):
            together.wait()
            try:
                with VectorCache(path, fingerprint="one") as cache:
                    cache.add([number], ROWS[:1])
            except ValueError as error:
                errors.append(str(error))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert errors == []
        with VectorCache(path, fingerprint="one") as cache:
            assert cache.ids() == [0, 1, 2, 3]


def add_and_crash(path):
    cache = VectorCache(path, fingerprint="one")
    cache.add(range(50), np.arange(100).reshape(50, 2))
    cache.add(["last"], [[7.0, 8.0]])
    os._exit(3)


def test_a_crash_loses_nothing(tmp_path):
    path = tmp_path / "cache.db"
    assert exit_code(add_and_crash, path) == 3
    with VectorCache(path, fingerprint="one") as cache:
        found = kept(cache)
    assert found == {i: [2.0 * i, 2.0 * i + 1] for i in range(50)} | {"last": [7.0, 8.0]}
