"""Lance, LanceDB and Milvus: carried over whole, gone on with after any kill, rolled back; broken ones refused.

Their packages start threads, which a fork does not survive: they are imported in child processes alone.
"""

import hashlib
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import time
import traceback

import numpy as np
import pytest

from pml_compat.gallery import migrate, open_store, rollback
from tests.gallery.test_migrate import IDS, NEW_WIDTH, ROWS, VECTORS, WIDTH, linear, mapped

NAMES = [f"item {number}" for number in IDS]
MODULES = {"lance": ("lance",), "lancedb": ("lancedb", "lance"), "milvus": ("pymilvus", "milvus_lite")}


def needs(*kinds):
    missing = [module for kind in kinds for module in MODULES[kind] if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


KINDS = [pytest.param(kind, marks=needs(kind)) for kind in MODULES]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(function, *arguments):
    """Run in a child process; return its number and what reads its results."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading, "rb")
    os.close(reading)
    code = 1
    try:
        with os.fdopen(writing, "wb") as out:
            pickle.dump(function(*arguments, out), out)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def in_child(function, *arguments):
    """Return what a function returns in a child process."""
    child, results = start(lambda *all: function(*all[:-1]), *arguments)
    with results:
        found = results.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(found)


def places(kind, folder):
    """Return the addresses of the old gallery and the new one."""
    root = {
        "lance": f"{folder}/%s.lance",
        "lancedb": f"lancedb://{folder}/db/%s",
        "milvus": f"milvus://{folder}/a.db/%s",
    }
    return root[kind] % "old", root[kind] % "new"


def table():
    import pyarrow

    vectors = pyarrow.FixedSizeListArray.from_arrays(VECTORS.ravel(), WIDTH)
    return pyarrow.table({"name": NAMES, "vector": vectors, "id": IDS})


def write_lance(folder):
    import lance

    lance.write_dataset(table(), str(folder / "old.lance"), max_rows_per_file=97)


def write_lancedb(folder):
    import lancedb

    lancedb.connect(str(folder / "db")).create_table("old", table())


def write_milvus(folder, ids=None):
    from pymilvus import DataType, MilvusClient

    ids = IDS.tolist() if ids is None else ids
    client = MilvusClient(f"{folder}/a.db")
    schema = client.create_schema(enable_dynamic_field=True)
    long = {"max_length": 50}
    kind = {"datatype": DataType.VARCHAR, **long} if isinstance(ids[0], str) else {"datatype": DataType.INT64}
    schema.add_field("pk", is_primary=True, **kind)
    schema.add_field("name", DataType.VARCHAR, **long)
    schema.add_field("tags", DataType.ARRAY, element_type=DataType.INT64, max_capacity=3, nullable=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=WIDTH)
    index = client.prepare_index_params()
    index.add_index(field_name="vector", index_type="HNSW", metric_type="IP", params={"M": 8, "efConstruction": 32})
    client.create_collection("old", schema=schema, index_params=index)
    rows = [
        {"pk": key, "name": name, "tags": [place], "vector": vector, "extra": {"place": place}}
        for place, (key, name, vector) in enumerate(zip(ids, NAMES, VECTORS.tolist(), strict=False))
    ]
    client.upsert("old", rows[::-1])
    client.close()


WRITE = {"lance": write_lance, "lancedb": write_lancedb, "milvus": write_milvus}


def content(address):
    """Return a digest of all that a store gives, in its order."""
    store, found = open_store(address), hashlib.sha256()
    assert len(store) == ROWS
    for batch in store.batches(50):
        found.update(batch.ids.tobytes() + np.ascontiguousarray(batch.vectors).tobytes())
        found.update(json.dumps(batch.records(), sort_keys=True).encode())
    return found.hexdigest()


def remains(folder):
    """Return how many files there are by their kinds; names are random."""
    found = {}
    for _, _, names in os.walk(folder):
        for name in names:
            suffix = name.rpartition(".")[2]
            found[suffix] = found.get(suffix, 0) + 1
    return found


def run(old, new, **given):
    return migrate(old, new, linear(), **{"batch_size": 20, "progress": False, **given})


def carried(kind, folder):
    WRITE[kind](folder)
    old, new = places(kind, folder)
    before, manifest = content(old), run(old, new)
    assert (manifest["status"], manifest["done"], manifest["read_back"]) == ("finished", ROWS, 256)
    store = open_store(new)
    assert (len(store), store.width, store.dtype) == (ROWS, NEW_WIDTH, np.float32)
    np.testing.assert_allclose(store.fetch(IDS[::-1]), mapped(linear())[::-1], rtol=1e-5, atol=1e-6)
    batches = list(store.batches(77))
    assert np.concatenate([batch.ids for batch in batches]).tolist() == IDS.tolist()
    assert batches[-1].cursor is None
    rest = list(store.batches(77, json.loads(json.dumps(batches[2].cursor))))
    assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in batches[3:]]
    records = [record for batch in batches for record in batch.records()]
    assert [record["name"] for record in records] == NAMES
    if kind == "milvus":
        assert records[5] == {"name": NAMES[5], "tags": [5], "extra": {"place": 5}}
    with pytest.raises(ValueError, match="lacks"):
        store.fetch(np.array([4]))
    assert content(old) == before
    assert run(old, new) == manifest
    shown = search(kind, folder)
    assert rollback(new)["status"] == "finished"
    with pytest.raises(ValueError, match="has no manifest"):
        rollback(new)
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_store(new)
    assert content(old) == before
    return shown


def search(kind, folder):
    """Search the new gallery by its own program, for the item in place 7."""
    query = mapped(linear())[7].tolist()
    if kind == "milvus":
        from pymilvus import MilvusClient

        client = MilvusClient(f"{folder}/a.db")
        index = client.describe_index("new", "vector")
        assert (index["index_type"], index["metric_type"]) == ("HNSW", "IP")
        scores = mapped(linear()) @ mapped(linear())[7]
        found = client.search("new", data=[query], limit=1)[0][0]["pk"]
        return found == IDS[scores.argmax()]
    if kind == "lance":
        import lance

        dataset = lance.dataset(f"{folder}/new.lance")
        assert dataset.schema.names == ["name", "vector", "id"] and len(dataset.versions()) == 1
        return dataset.to_table(nearest={"column": "vector", "q": query, "k": 1})["id"].to_pylist() == [IDS[7]]
    import lancedb

    db = lancedb.connect(f"{folder}/db")
    assert sorted(db.list_tables().tables) == ["new", "old"]
    return db.open_table("new").search(query).limit(1).to_list()[0]["id"] == IDS[7]


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_is_carried_over_searched_and_rolled_back(kind, outcome):
    assert outcome(kind, carried)


def between(folder):
    """Carry a Parquet file over into each kind, and from there on."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(), folder / "old.parquet")
    once, twice = linear(), __import__("pml_compat").transformations.LinearTransformation(NEW_WIDTH, 3)
    roads = {
        "lance": (f"{folder}/a.lance", f"milvus://{folder}/b.db/a_lance"),
        "lancedb": (f"lancedb://{folder}/db/a", f"{folder}/lancedb.lance#v2"),
        "milvus": (f"milvus://{folder}/a.db/a#embedding", f"lancedb://{folder}/db/milvus"),
    }
    expected = twice.apply_to(mapped(once), progress=False)
    for first, second in roads.values():
        migrate(str(folder / "old.parquet"), first, once, batch_size=100, progress=False)
        migrate(first, second, twice, batch_size=90, progress=False)
        for place, vectors in ((first, mapped(once)), (second, expected)):
            store = open_store(place)
            np.testing.assert_allclose(store.fetch(IDS), vectors, rtol=1e-5, atol=1e-6)
            for batch in store.batches(1000):
                records = batch.records()
                payload = [record.get("payload", record) for record in records]
                payload = [json.loads(one) if isinstance(one, str) else one for one in payload]
                payload = [one.get("payload", one) for one in payload]
                assert [one["name"] for one in payload] == NAMES
                assert not any("vector" in one for one in (*payload, *records))
    assert open_store(f"{folder}/lancedb.lance#v2").names == ["name", "v2", "id"]
    return True


@needs("lance", "lancedb", "milvus")
def test_from_one_kind_to_another(tmp_path):
    assert in_child(between, tmp_path)


def text_keys(kind, folder):
    keys = sorted({f'{mark}{number}"é\\' for number in range(100) for mark in ("a", "'", "B", "日")})
    write_milvus(folder, keys)
    old, new = places("milvus", folder)
    migrate(old, new, linear(), batch_size=30, progress=False)
    store = open_store(new)
    assert [key for batch in store.batches(17) for key in batch.ids.tolist()] == keys
    np.testing.assert_allclose(store.fetch(np.array(keys)), mapped(linear())[: len(keys)], rtol=1e-5, atol=1e-6)
    return True


@needs("milvus")
def test_milvus_keys_of_any_text(outcome):
    assert outcome("milvus", text_keys)


def embedded_anew(kind, folder):
    """A part of the items gets vectors of their own; ids, order and payload stay."""
    from pml_compat.gallery import backfill

    WRITE[kind](folder)
    old, new = places(kind, folder)
    run(old, new)
    before = [record for batch in open_store(new).batches(50) for record in batch.records()]
    own = np.random.default_rng(9).normal(size=(ROWS, NEW_WIDTH)).astype(np.float32)
    for budget in (100, "50%"):
        backfill(new, lambda ids: own[np.searchsorted(IDS, ids)], budget=budget, batch_size=30, progress=False)
    store = open_store(new)
    found = store.fetch(IDS)
    anew = np.abs(found - own).max(1) < 1e-5
    assert anew.sum() == 300
    np.testing.assert_allclose(found[~anew], mapped(linear())[~anew], rtol=1e-5, atol=1e-6)
    assert [record for batch in store.batches(50) for record in batch.records()] == before
    assert np.concatenate([batch.ids for batch in store.batches(50)]).tolist() == IDS.tolist()
    if kind == "lance":
        assert len(store.dataset.versions()) == 1
    rollback(new)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_backfill(kind, outcome):
    assert outcome(kind, embedded_anew)


def written_meanwhile(kind, folder):
    """An item that the user's service has written to both is left as it is; one in the old alone is caught up with."""
    WRITE["milvus"](folder)
    old, new = places("milvus", folder)
    run(old, new)
    client = open_store(old).client
    row = {"pk": 1, "name": "late", "tags": [1], "vector": [3.0] * WIDTH}
    client.upsert("old", [row])
    assert run(old, new)["done"] == ROWS + 1
    expected = linear().apply_to(np.full((1, WIDTH), 3.0, np.float32), progress=False)
    np.testing.assert_allclose(open_store(new).fetch(np.array([1])), expected, rtol=1e-5)
    client.upsert("old", [row | {"pk": 2}, row | {"pk": 4}])
    client.upsert("new", [row | {"pk": 2, "vector": [5.0] * NEW_WIDTH}])
    assert run(old, new)["done"] == ROWS + 2
    np.testing.assert_allclose(open_store(new).fetch(np.array([2])), 5.0)
    return True


@needs("milvus")
def test_milvus_in_service(outcome):
    assert outcome("milvus", written_meanwhile)


def unfinished_collections(kind, folder):
    """Milvus Lite was killed while it made a collection: its folder is there, and it does not know it."""
    np.save(folder / "old.npy", VECTORS)
    for name in ("pml_compat_manifests", "new"):
        (folder / "a.db" / "collections" / name).mkdir(parents=True)
    new = f"milvus://{folder}/a.db/new"
    assert run(str(folder / "old.npy"), new)["status"] == "finished" and len(open_store(new)) == ROWS
    return True


@needs("milvus")
def test_milvus_collections_that_were_never_finished_are_made_anew(outcome):
    assert outcome("milvus", unfinished_collections)


def timed(old, new):
    len(open_store(old))
    begun = time.perf_counter()
    run(old, new)
    return time.perf_counter() - begun, content(new), remains(new)


def ready_to_be_killed(kind, old, new, out):
    for module in MODULES[kind]:
        importlib.import_module(module)
    out.write(b"!")
    out.flush()
    run(old, new)


def killed(kind, old, new, seconds):
    """Kill a run some time after it has begun; tell whether it had not ended."""
    child, results = start(ready_to_be_killed, kind, old, new)
    with results:
        assert results.read(1) == b"!"
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(kind, kills, tmp_path):
    if kind == "lancedb" and kills == 2:
        pytest.skip("it is written as Lance is; the slow test kills it too")
    (tmp_path / "calm").mkdir()
    in_child(WRITE[kind], tmp_path / "calm")
    shutil.copytree(tmp_path / "calm", tmp_path / "fresh")
    longest, expected, files = in_child(timed, *places(kind, tmp_path / "calm"))
    rng, reached, rounds = random.Random(kills), 0, 0
    while reached < kills:
        folder = shutil.copytree(tmp_path / "fresh", tmp_path / str(rounds))
        old, new = places(kind, folder)
        for _ in range(min(4, kills - reached)):
            reached += killed(kind, old, new, rng.uniform(0, longest))
        assert in_child(lambda: (run(old, new)["done"], content(new), remains(new))) == (ROWS, expected, files)  # noqa: B023
        assert not [name for name in os.listdir(folder) if "partial" in name or name.startswith(".")]
        shutil.rmtree(folder)
        rounds += 1
        assert rounds < 10 * kills


def broken_off(kind, folder):
    """End a run by an exception at each of its steps, and go on."""
    from pml_compat.gallery.stores import lance

    write_lance(folder)
    old, new = places("lance", folder)
    run(old, f"{folder}/calm.lance")
    expected = content(f"{folder}/calm.lance"), remains(f"{folder}/calm.lance")

    def breaking(owner, name, at):
        whole, calls = getattr(owner, name), []

        def called(*arguments, **named):
            calls.append(name)
            if len(calls) == at:
                raise KeyboardInterrupt
            return whole(*arguments, **named)

        setattr(owner, name, called)
        try:
            run(old, new)
        except KeyboardInterrupt:
            return True
        finally:
            setattr(owner, name, whole)

    steps = [
        (lance.LanceWriter, "keep", 1),
        (lance.LanceWriter, "keep", 2),
        (lance.LanceWriter, "_dataset", 1),
        (lance, "whole_file", 3),
        (lance.LanceWriter, "keep", 7),
        (lance.LanceWriter, "_fragments", 1),
        (lance.shutil, "rmtree", 1),
        (lance.os, "replace", 1),
        (lance.LanceWriter, "keep", 1),
    ]
    for step in steps:
        assert breaking(*step), step
    run(old, new)
    assert (content(new), remains(new)) == expected
    assert not os.path.exists(f"{new}.partial")
    return True


def other_columns(kind, folder):
    """Carry over columns of all sorts, from a dataset with rows deleted, without ids."""
    import lance
    import pyarrow

    blob = pyarrow.field("blob", pyarrow.large_binary(), metadata={"lance-encoding:blob": "true"})
    found = table().drop_columns(["id"]).append_column("key", pyarrow.array(IDS))
    found = found.append_column(blob, pyarrow.array([b"x" * place for place in range(ROWS)], pyarrow.large_binary()))
    found = found.append_column("kind", pyarrow.array(["a", "b", None] * (ROWS // 3)).dictionary_encode())
    found = found.append_column("nested", pyarrow.array([{"a": [place]} for place in range(ROWS)]))
    found = found.append_column("half", pyarrow.array([[1.0, 2.0]] * ROWS, pyarrow.list_(pyarrow.float16(), 2)))
    lance.write_dataset(found, f"{folder}/old.lance", max_rows_per_file=97)
    lance.dataset(f"{folder}/old.lance").delete("key % 10 = 3")
    kept = IDS % 10 != 3
    run(f"{folder}/old.lance#vector", f"{folder}/new.lance", batch_size=37)
    store = open_store(f"{folder}/new.lance")
    assert store.names == found.column_names
    np.testing.assert_allclose(store.fetch(np.arange(kept.sum())), mapped(linear())[kept], rtol=1e-5, atol=1e-6)
    records = [record for batch in store.batches(100) for record in batch.records()]
    expected = found.drop_columns(["vector"]).filter(pyarrow.array(kept)).to_pylist()
    return records == expected


@needs("lance")
def test_columns_of_any_kind_go_along(outcome):
    assert outcome("lance", other_columns)


@needs("lance")
def test_a_lance_run_that_broke_off_at_a_step(outcome):
    assert outcome("lance", broken_off)


def said(address, **given):
    """Return what is said about a store that is refused."""
    new = given.pop("new", "/nowhere/new.npy")
    try:
        migrate(address, new, linear(), progress=False, **given)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        return str(error)
    return "nothing"


def foreign_lance(kind, folder):
    import lance
    import pyarrow

    def put(name, found):
        lance.write_dataset(found, str(folder / f"{name}.lance"))
        return f"{folder}/{name}.lance"

    whole, few = table(), pyarrow.array([[1.0, 2.0]] * ROWS)
    nothing = pyarrow.array([None] * ROWS, pyarrow.list_(pyarrow.float32(), WIDTH))
    (folder / "empty.lance").mkdir()
    (folder / "text.lance").write_text("hello")
    cut, lost, headless = (put(name, whole) for name in ("cut", "lost", "headless"))
    for place in (cut, lost):
        for path in (folder / place / "data").iterdir():
            path.write_bytes(path.read_bytes()[:500]) if place == cut else path.unlink()
    shutil.rmtree(folder / headless / "_versions")
    cases = {
        f"{folder}/none.lance": "there is no",
        f"{folder}/empty.lance": "must be a whole Lance dataset",
        f"{folder}/text.lance": "must be a whole Lance dataset",
        cut: "must be a whole Lance dataset",
        lost: "must be a whole Lance dataset",
        headless: "must be a whole Lance dataset",
        put("other", whole.drop_columns(["vector"])): "must have a column of vectors",
        f"{put('named', whole)}#missing": "must have a column of vectors, missing, it has",
        put("words", pyarrow.table({"vector": ["a", "b"]})): "got text that is none",
        put("rows", whole.slice(0, 0)): "it has no rows",
        put("width", whole.set_column(1, "vector", few)): "must take the vectors of old, 2 wide",
        put("nulls", whole.set_column(1, "vector", nothing)): "must have a vector in every row, row 0 has none",
        put(
            "ids", whole.set_column(2, "id", pyarrow.array([None] * ROWS, pyarrow.int64()))
        ): "must have an id in every",
    }
    found = {place: said(place, new=f"{folder}/new{number}.npy") for number, place in enumerate(cases)}
    put("taken", whole)
    cases["taken"], found["taken"] = (
        "something else stands at",
        said(f"{folder}/named.lance", new=f"{folder}/taken.lance"),
    )
    return cases, found


def foreign_lancedb(kind, folder):
    import lancedb

    lancedb.connect(str(folder / "db")).create_table("whole", table())
    (folder / "db" / "empty.lance").mkdir()
    cases = {
        "lancedb://host/db/whole": "address must be lancedb:///FOLDER/TABLE",
        "lancedb:///whole": "address must be lancedb:///FOLDER/TABLE",
        f"lancedb://{folder}/db/none": "there is no",
        f"lancedb://{folder}/nowhere/whole": "there is no",
        f"lancedb://{folder}/db/empty": "must be a whole Lance dataset",
        f"lancedb://{folder}/db/whole#name": "got text that is none",
    }
    found = {place: said(place) for place in cases}
    cases["taken"], found["taken"] = (
        "something else stands at",
        said(f"lancedb://{folder}/db/whole#vector", new=f"lancedb://{folder}/db/whole"),
    )
    assert not (folder / "nowhere").exists()
    return cases, found


def foreign_milvus(kind, folder):
    from pymilvus import DataType, MilvusClient

    write_milvus(folder)
    client = MilvusClient(f"{folder}/a.db")
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("one", DataType.FLOAT_VECTOR, dim=WIDTH)
    schema.add_field("two", DataType.FLOAT_VECTOR, dim=WIDTH)
    client.create_collection("two", schema=schema)
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    client.create_collection("sparse", schema=schema)
    (folder / "text.db").write_text("hello")
    cases = {
        "milvus://localhost:1/a/b": "address must be milvus://HOST:19530/COLLECTION",
        "milvus:///folder/items": "address must be milvus://HOST:19530/COLLECTION",
        f"milvus://{folder}/none.db/old": "there is no",
        f"milvus://{folder}/a.db/none": "there is no collection 'none'",
        f"milvus://{folder}/a.db/old#missing": "must name one of the collection's fields of float vectors, ['vector']",
        f"milvus://{folder}/a.db/two": "must name one of the collection's fields of float vectors, ['one', 'two']",
        f"milvus://{folder}/a.db/sparse": "which has none, by #FIELD",
        f"milvus://{folder}/text.db/old": "does not answer",
        "milvus://user:secret@127.0.0.1:1/old": "user:***@127.0.0.1:1/old does not answer",
    }
    found = {place: said(place) for place in cases}
    cases["taken"], found["taken"] = (
        "something else stands at",
        said(f"milvus://{folder}/a.db/old", new=f"milvus://{folder}/a.db/two"),
    )
    cases["ids"] = "ids of a Milvus collection must be text or below 2**63"
    np.save(folder / "x.npy", VECTORS)
    np.save(folder / "x.ids.npy", IDS.astype(np.uint64) + np.uint64(2**63))
    found["ids"] = said(f"{folder}/x.npy", new=f"milvus://{folder}/a.db/ids")
    assert not (folder / "none.db").exists()
    return cases, found


FOREIGN = {"lance": foreign_lance, "lancedb": foreign_lancedb, "milvus": foreign_milvus}
# What is done with a kind in one child process, each in a folder of its own: its packages take seconds to import.
DONE = {
    "lance": (carried, embedded_anew, other_columns, broken_off, foreign_lance),
    "lancedb": (carried, embedded_anew, foreign_lancedb),
    "milvus": (carried, embedded_anew, text_keys, written_meanwhile, unfinished_collections, foreign_milvus),
}


def do_all(kind, folder):
    """Return what each function returns, or as text what it raises."""
    found = {}
    for function in DONE[kind]:
        own = folder / function.__name__
        own.mkdir()
        try:
            found[function.__name__] = function(kind, own)
        except BaseException:
            found[function.__name__] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What a function returns for a kind."""
    known = {}

    def of(kind, function):
        if kind not in known:
            known[kind] = in_child(do_all, kind, tmp_path_factory.mktemp(kind))
        found = known[kind][function.__name__]
        assert not isinstance(found, str), found
        return found

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_or_broken_store_is_refused(kind, outcome):
    cases, found = outcome(kind, FOREIGN[kind])
    wrong = {place: found[place] for place, message in cases.items() if message not in found[place]}
    assert not wrong


@pytest.mark.parametrize(
    ("module", "extra", "address"),
    [
        ("lance", "lance", "x.lance"),
        ("lance", "lancedb", "lancedb:///folder/x"),
        ("pymilvus", "milvus", "milvus://host/x"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, address, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=rf"{module} is not installed; run: pip install \"pml-compat\[{extra}\]\""):
        open_store(address)
