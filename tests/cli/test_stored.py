import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_compat.cli.stored import Columns, read_stored
from pml_compat.frozen import FrozenEmbeddings

EMBEDDINGS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 0, 1, 1, 2, 2])
IDS = np.array(["a", "b", "c", "d", "e", "f"])


def npz(path, **changes):
    arrays = {"embeddings": EMBEDDINGS, "labels": LABELS, "ids": IDS, "cameras": LABELS + 5, **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def npy(path, array):
    np.save(path, array)
    return path


def parquet(path, compression="snappy", **changes):
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    columns = {"embedding": list(EMBEDDINGS), "label": LABELS, "id": IDS, "camera": LABELS + 5, "other": LABELS}
    columns = {key: value for key, value in {**columns, **changes}.items() if value is not None}
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path, compression=compression)
    return path


def assert_whole(stored):
    assert stored.embeddings.dtype == torch.float32
    assert np.array_equal(stored.embeddings.numpy(), EMBEDDINGS)
    assert stored.labels.tolist() == LABELS.tolist()
    assert (stored.ids.tolist(), stored.cameras.tolist()) == (IDS.tolist(), (LABELS + 5).tolist())


def test_npz(tmp_path):
    assert_whole(read_stored(npz(tmp_path / "a.npz"), "--queries"))
    bare = read_stored(npz(tmp_path / "a.npz", ids=None, cameras=None, labels=None), "--queries")
    assert bare.labels is bare.ids is bare.cameras is None


def test_parquet(tmp_path):
    assert_whole(read_stored(parquet(tmp_path / "a.parquet"), "--queries"))
    bare = read_stored(parquet(tmp_path / "a.parquet", id=None, camera=None, label=None), "--queries")
    assert bare.labels is bare.ids is bare.cameras is None


def test_parquet_of_fixed_size_lists_and_integer_ids(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(EMBEDDINGS.ravel()), 3)
    stored = read_stored(parquet(tmp_path / "a.parquet", embedding=lists, id=np.arange(6)), "--queries")
    assert np.array_equal(stored.embeddings.numpy(), EMBEDDINGS)
    assert stored.ids.tolist() == list(range(6))


def test_npy_is_mapped_and_takes_labels_from_a_file(tmp_path):
    path = npy(tmp_path / "a.npy", EMBEDDINGS.astype(np.float16))
    stored = read_stored(path, "--queries", npy(tmp_path / "labels.npy", LABELS.astype(np.uint16)))
    assert stored.embeddings.dtype == torch.float16
    assert stored.labels.tolist() == LABELS.tolist()
    assert np.array_equal(stored.embeddings.numpy(), EMBEDDINGS.astype(np.float16))


def test_labels_of_a_file_take_the_place_of_those_inside(tmp_path):
    stored = read_stored(npz(tmp_path / "a.npz"), "--queries", npy(tmp_path / "labels.npy", LABELS[::-1]))
    assert stored.labels.tolist() == LABELS[::-1].tolist()


@pytest.mark.parametrize("ids", [None, [7, 3, 5, 1, 0, 2]])
def test_a_folder_of_frozen_embeddings(ids, tmp_path):
    batch = (torch.from_numpy(EMBEDDINGS), ids and torch.tensor(ids), torch.ones(6, 2))
    FrozenEmbeddings.write(tmp_path / "folder", [batch])
    stored = read_stored(tmp_path / "folder", "--queries", npy(tmp_path / "labels.npy", LABELS))
    assert np.array_equal(stored.embeddings.numpy(), EMBEDDINGS)
    assert (None if stored.ids is None else stored.ids.tolist()) == ids
    assert stored.side_info.tolist() == [[1, 1]] * 6


def test_nothing_there(tmp_path):
    for name in ("a.npz", "a.npy", "a"):
        with pytest.raises(FileNotFoundError, match=rf"^--queries: there is no '.*{name}'$"):
            read_stored(tmp_path / name, "--queries")
    with pytest.raises(FileNotFoundError, match=r"^labels: there is no "):
        read_stored(npz(tmp_path / "a.npz"), "--queries", tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": None}, r"--gallery must have the key embeddings, '.*' has \['cameras', 'ids', 'labels'\]"),
        ({"embeddings": EMBEDDINGS[0]}, r"embeddings of --gallery must be 2-dimensional, \(N, D\), got shape \(3,\)"),
        ({"embeddings": EMBEDDINGS[:0]}, r"embeddings of --gallery must not be empty, got shape \(0, 3\)"),
        ({"embeddings": IDS}, "embeddings of --gallery must be numbers, got <U1"),
        ({"labels": LABELS[:4]}, r"labels of --gallery must have one entry a row: expected shape \(6,\), got \(4,\)"),
        ({"labels": LABELS * 1j}, "labels of --gallery must be integers or strings, got complex128"),
        ({"ids": IDS[:4]}, r"ids of --gallery must have one entry a row: expected shape \(6,\), got \(4,\)"),
        (
            {"ids": np.array([{}] * 6)},
            "--gallery must be a whole .npz file of numbers, .* Object arrays cannot be loaded",
        ),
    ],
)
def test_what_an_npz_must_hold(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_stored(npz(tmp_path / "a.npz", **changes), "--gallery")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"embedding": None},
            r"--gallery must have the column embedding, '.*' has \['camera', 'id', 'label', 'other'\]",
        ),
        ({"embedding": LABELS}, "--gallery must have lists of numbers, .* in the column embedding, got int64"),
        (
            {"embedding": [[1.0], [1.0, 2.0]] * 3},
            "--gallery must have embeddings of one width, got 1 in row 0 and 2 in",
        ),
        ({"embedding": [[1.0, None]] * 6}, "--gallery must have a number in every place of the column embedding"),
        ({"embedding": [["a"]] * 6}, "--gallery must have lists of numbers, .* in the column embedding, got list<"),
        ({"embedding": ["[1, 2"] * 6}, "--gallery must have lists of numbers, .* got text that is none"),
        ({"label": [0, 1, None] * 2}, "--gallery must have a value in every row, column label has nulls"),
    ],
)
def test_what_a_parquet_file_must_hold(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_stored(parquet(tmp_path / "a.parquet", **changes), "--gallery")


@pytest.mark.parametrize("kind", ["npz", "npy", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_broken_file(kind, damage, tmp_path):
    path = tmp_path / f"a.{kind}"
    {"npz": npz, "npy": lambda path: npy(path, EMBEDDINGS), "parquet": parquet}[kind](path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-20], "foreign": b"no numbers here, but some text " * 9, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"^--gallery.* must be a whole .*a\.") as error:
        read_stored(path, "--gallery")
    assert "\n" not in str(error.value)


def test_an_npy_file_called_npz(tmp_path):
    npy(tmp_path / "a.npy", EMBEDDINGS).rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"^--gallery must be a whole \.npz file"):
        read_stored(tmp_path / "a.npz", "--gallery")


def test_a_broken_labels_file(tmp_path):
    (tmp_path / "labels.npy").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^labels must be a whole \.npy file of integers, "):
        read_stored(npz(tmp_path / "a.npz"), "--gallery", tmp_path / "labels.npy")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^--gallery must be an \.npz file with the keys .*; got '.*a\.pt'$"):
        read_stored(tmp_path / "a.pt", "--gallery")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"^--gallery: path must be a folder written by FrozenEmbeddings"):
        read_stored(tmp_path / "folder", "--gallery")


def test_missing_pyarrow_gives_the_pip_command(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "pyarrow":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r'^pyarrow is not installed; run: pip install "pml-compat\[parquet\]"$'):
        read_stored(tmp_path / "a.parquet", "--queries")


def test_labels_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"^--queries must come with labels, '.*a\.npy' has none; .* --query-labels$"):
        read_stored(npy(tmp_path / "a.npy", EMBEDDINGS), "--queries").require_labels("--query-labels")


def read(path: Path, option="--new-gallery", **changes):
    return read_stored(npz(path, **changes), option)


def test_ids_bring_rows_into_order(tmp_path):
    order = [3, 0, 5, 1, 2, 4]
    first = read(tmp_path / "a.npz", "--gallery")
    mixed = read(tmp_path / "b.npz", embeddings=EMBEDDINGS[order], labels=LABELS[order], ids=IDS[order])
    ordered = mixed.in_order_of(first)
    assert np.array_equal(ordered.embeddings.numpy(), EMBEDDINGS)
    assert (ordered.labels.tolist(), ordered.ids.tolist()) == (LABELS.tolist(), IDS.tolist())


def test_rows_are_in_order_without_ids(tmp_path):
    first, second = read(tmp_path / "a.npz"), read(tmp_path / "b.npz", ids=None, labels=None)
    assert second.in_order_of(first) is second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"embeddings": EMBEDDINGS[:4], "labels": LABELS[:4], "ids": None},
            "--new-gallery must have the items of --gallery: expected 6 rows, got 4; to try a sample .* give ids",
        ),
        (
            {"embeddings": EMBEDDINGS[:2], "labels": LABELS[:2], "ids": np.array(["a", "z"])},
            "--new-gallery must have ids that --gallery has, each once",
        ),
        ({"ids": IDS[[0, 0, 1, 2, 3, 4]]}, "--new-gallery must have the ids of --gallery, each once"),
        ({"ids": np.array([*"abcdeg"])}, "--new-gallery must have the ids of --gallery, each once"),
        (
            {"ids": None, "labels": LABELS[[0, 1, 4, 3, 2, 5]]},
            "--new-gallery must have the items of --gallery in the same order, .* row 2 is 2, and 1 in --gallery",
        ),
    ],
)
def test_other_items(changes, message, tmp_path):
    first = read(tmp_path / "a.npz", "--gallery")
    with pytest.raises(ValueError, match=f"^{message}"):
        read(tmp_path / "b.npz", cameras=None, **changes).in_order_of(first)


def test_a_sample_is_told_by_ids(tmp_path):
    first = read(tmp_path / "a.npz", "--gallery")
    rows = [4, 1]
    sample = read(tmp_path / "b.npz", embeddings=EMBEDDINGS[rows], labels=LABELS[rows], ids=IDS[rows], cameras=None)
    assert sample.in_order_of(first) is sample


def test_labels_and_ids_may_be_text_or_bytes(tmp_path):
    stored = read_stored(npz(tmp_path / "a.npz", labels=IDS, ids=IDS.astype("S")), "--queries")
    assert stored.labels.tolist() == stored.ids.tolist() == IDS.tolist()
    quantised = read_stored(npz(tmp_path / "b.npz", embeddings=EMBEDDINGS.astype(np.int8)), "--queries")
    assert quantised.embeddings.tolist() == EMBEDDINGS.astype(np.int8).tolist()


def forms(pa):
    flat = pa.array(EMBEDDINGS.ravel())
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(EMBEDDINGS)
    return {
        "list": pa.array(EMBEDDINGS.tolist(), pa.list_(pa.float32())),
        "fixed": pa.FixedSizeListArray.from_arrays(flat, 3),
        "half": pa.array(list(EMBEDDINGS.astype(np.float16)), pa.list_(pa.float16())),
        "tensor": tensor,
        "binary": pa.array([row.tobytes() for row in EMBEDDINGS]),
        "json": pa.array([str(row) for row in EMBEDDINGS.tolist()]),
    }


@pytest.mark.parametrize("form", ["list", "fixed", "half", "tensor", "binary", "json"])
def test_vectors_as_databases_export_them(form, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    column = forms(pa)[form]
    path = parquet(tmp_path / "a.parquet", embedding=None, vector=column, label=[*"aabbcc"], id=["a0", *"bcdef"])
    stored = read_stored(path, "--queries")
    assert np.allclose(stored.embeddings.float(), EMBEDDINGS, rtol=1e-3)
    assert (stored.labels.tolist(), stored.ids.tolist()) == ([*"aabbcc"], ["a0", *"bcdef"])
    named = parquet(tmp_path / "b.parquet", embedding=None, mine=column)
    with pytest.raises(ValueError, match="name it with --embedding-column"):
        read_stored(named, "--queries")
    assert len(read_stored(named, "--queries", columns=Columns(embeddings=("mine",)))) == 6


def test_a_decimal_column_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    decimals = pa.array([[1], [2], [3], [4], [5], [6]], pa.list_(pa.decimal128(5, 2)))
    with pytest.raises(ValueError, match=r"--queries must have lists of numbers, .* got list<.*decimal128\(5, 2\)"):
        read_stored(parquet(tmp_path / "a.parquet", embedding=decimals), "--queries")


def test_a_folder_of_parquet_parts(tmp_path):
    (tmp_path / "parts").mkdir()
    for turn in range(2):
        rows = slice(3 * turn, 3 * turn + 3)
        parquet(
            tmp_path / "parts" / f"part-{turn}.parquet",
            embedding=list(EMBEDDINGS[rows]),
            label=LABELS[rows],
            id=IDS[rows],
            camera=LABELS[rows] + 5,
            other=None,
        )
    assert_whole(read_stored(tmp_path / "parts", "--queries"))
