import copy
import io
import json
import pickle
import shutil
import signal
import time
import weakref

import numpy as np
import pytest
import torch

from pml_compat.frozen import ClassCenters, FrozenEmbeddings, FrozenModel, model_fingerprint
from pml_compat.transformations import FCTTransformation, LinearTransformation, fit_transformation
from tests.processes import context

N, D, S = 50, 4, 3
# Writes two batches, says so, and waits for its end in the middle of the third.


def endless_write(path, two_are_written):
    def batches():
        for i in range(2):
            yield torch.ones(100, 4), torch.arange(100 * i, 100 * i + 100), torch.ones(100, 3)
        two_are_written.set()
        time.sleep(60)

    FrozenEmbeddings.write(path, batches())


def data(seed=0, dtype=torch.float32):
    """Embeddings, shuffled ids with gaps, side-information."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(N, D, generator=generator).to(dtype)
    return embeddings, torch.randperm(3 * N, generator=generator)[:N] - 5, torch.randn(N, S, generator=generator)


def batches(*parts, sizes=(1, 7, 20, 22)):
    start = 0
    for size in sizes:
        yield tuple(None if part is None else part[start : start + size] for part in parts)
        start += size


@pytest.fixture
def folder(tmp_path):
    FrozenEmbeddings.write(tmp_path / "old", batches(*data()), fingerprint="abc")
    return tmp_path / "old"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(N,), (1, 7, 20, 22), (1,) * N])
def test_what_is_read_is_what_was_written(dtype, sizes, tmp_path):
    embeddings, ids, side_info = data(dtype=dtype)
    old = FrozenEmbeddings.write(str(tmp_path / "old"), batches(embeddings, ids, side_info, sizes=sizes))
    for read in (old, FrozenEmbeddings(tmp_path / "old"), FrozenEmbeddings.from_array(str(tmp_path / "old"))):
        assert (len(read), read.shape, read.ndim, read.dtype) == (N, (N, D), 2, dtype)
        assert read[:].equal(embeddings) and read.ids.equal(ids) and read.side_info[:].equal(side_info)
    for name, expected in (("embeddings", embeddings), ("ids", ids), ("side_info", side_info)):
        np.testing.assert_array_equal(np.load(tmp_path / "old" / f"{name}.npy"), expected.numpy(), strict=True)


def test_header_is_numpys_own(folder):
    buffer = io.BytesIO()
    np.save(buffer, data()[0].numpy())
    assert (folder / "embeddings.npy").read_bytes()[-N * D * 4 :] == buffer.getvalue()[-N * D * 4 :]
    with (folder / "embeddings.npy").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((N, D), False, np.dtype(np.float32))
        assert file.tell() % 64 == 0


def test_numpy_batches_bare_batches_and_graphs(tmp_path):
    embeddings, ids, _ = data()
    bare = FrozenEmbeddings.write(tmp_path / "bare", [embeddings[:9].requires_grad_(), embeddings[9:].numpy()])
    assert bare[:].equal(embeddings) and not bare[:].requires_grad and bare.side_info is None
    arrays = FrozenEmbeddings.write(tmp_path / "arrays", [[embeddings.numpy(), ids.numpy().astype(np.int32)]])
    assert arrays[:].equal(embeddings) and arrays.ids.equal(ids)
    transposed = FrozenEmbeddings.write(tmp_path / "transposed", [(embeddings.T, None, embeddings.T)])
    assert transposed[:].equal(embeddings.T) and transposed.side_info[:].equal(embeddings.T)


def test_bfloat16_is_kept_in_float32(tmp_path):
    embeddings = data(dtype=torch.bfloat16)[0]
    for old in (FrozenEmbeddings.write(tmp_path / "old", [embeddings]), FrozenEmbeddings.from_array(embeddings)):
        assert old.dtype == torch.float32 and old[:].equal(embeddings.float())


def test_batches_are_let_go(tmp_path):
    alive = []

    def stream():
        for number in range(200):
            assert not any(reference() is not None for reference in alive[:-1])
            embeddings = torch.full((3, 2), float(number))
            alive.append(weakref.ref(embeddings))
            yield embeddings
            del embeddings

    old = FrozenEmbeddings.write(tmp_path / "old", stream())
    assert old[:].equal(torch.arange(200.0).repeat_interleave(3)[:, None].repeat(1, 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lookup_matches_a_plain_array(seed, tmp_path):
    embeddings, _, side_info = data(seed)
    array = embeddings.numpy()
    np.save(tmp_path / "old.npy", array)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(array))
    index = np.random.default_rng(seed).integers(N, size=17)  # repeats some rows
    for old in (
        FrozenEmbeddings.write(tmp_path / "old", batches(embeddings, None, side_info)),
        FrozenEmbeddings.from_array(tmp_path / "old.npy", side_info=side_info),
        FrozenEmbeddings.from_array(tmp_path / "fortran.npy", side_info=side_info.numpy()),
        FrozenEmbeddings.from_array(np.load(tmp_path / "old.npy", mmap_mode="r"), side_info=side_info),
        FrozenEmbeddings.from_array(embeddings, side_info=side_info),
    ):
        for indices in (index, index.astype(np.uint8), torch.tensor(index), torch.tensor(index).int(), index.tolist()):
            np.testing.assert_array_equal(old[indices], array[index], strict=True)
            np.testing.assert_array_equal(old.side_info[indices], side_info.numpy()[index])
        for rows in (slice(None), slice(3, 9), slice(40, 99), slice(-5, None), slice(0, 20, 3), slice(60, 70)):
            np.testing.assert_array_equal(old[rows], array[rows], strict=True)
        for one in (7, np.int64(7), torch.tensor(7), np.array(7)):
            np.testing.assert_array_equal(old[one], array[7], strict=True)
        for none in ([], (), torch.tensor([], dtype=torch.long), np.array([], dtype=int)):
            assert old[none].shape == (0, D)
        assert torch.stack(list(old)).equal(embeddings)  # stops at the IndexError


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_looked_up_is_a_copy(stored, folder):
    old = FrozenEmbeddings(folder) if stored else FrozenEmbeddings.from_array(data()[0])
    for indices in (3, [3], slice(3, 4), slice(None)):
        old[indices].zero_()
    old.ids.zero_()
    assert old[:].equal(data()[0])
    assert old.ids.equal(data()[1] if stored else torch.arange(N))


def test_memory_maps_and_files_are_not_read_through(tmp_path):
    writable = np.lib.format.open_memmap(tmp_path / "old.npy", "w+", np.float32, (N, D))
    writable[3] = np.nan
    path = tmp_path / "old.npy"
    for old in (FrozenEmbeddings.from_array(path), FrozenEmbeddings.from_array(np.load(path, mmap_mode="r"))):
        assert old[3].isnan().all()
        writable[5] += 1
        assert old[5].equal(torch.from_numpy(writable[5]))  # no copy was made


@pytest.mark.parametrize("stored", [True, False])
def test_shuffled_ids(stored, folder):
    embeddings, ids, _ = data()
    old = FrozenEmbeddings(folder) if stored else FrozenEmbeddings.from_array(embeddings, ids=ids.numpy())
    order = torch.randperm(N)
    assert old.index_of(ids[order]).equal(order)
    assert old.index_of(torch.stack([ids, ids], 1)[:, 0]).equal(torch.arange(N))  # strided
    assert old[old.index_of(ids[order].tolist())].equal(embeddings[order])
    missing = sorted(set(range(-10, 3 * N)) - set(ids.tolist()))
    assert set(old.index_of(missing).tolist()) == {-1}
    assert old.index_of([2**62, int(ids[4]), -(2**62)]).tolist() == [-1, 4, -1]
    assert old.index_of([]).shape == (0,)


def test_without_ids_the_position_is_the_id():
    old = FrozenEmbeddings.from_array(data()[0])
    assert old.ids.equal(torch.arange(N))
    assert old.index_of([N - 1, 0, N, -1]).tolist() == [N - 1, 0, -1, -1]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("duplicate", [pickle.loads, copy.deepcopy])
def test_pickle_and_deepcopy(stored, duplicate, folder):
    embeddings, ids, side_info = data()
    old = FrozenEmbeddings(folder)
    if not stored:
        old = FrozenEmbeddings.from_array(embeddings, ids=ids, side_info=side_info, fingerprint="abc")
    twin = duplicate(pickle.dumps(old)) if duplicate is pickle.loads else duplicate(old)
    assert twin[:].equal(embeddings) and twin.ids.equal(ids) and twin.side_info[:].equal(side_info)
    assert twin.fingerprint == "abc"


def test_pickles_hold_paths_and_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = torch.randn(5000, 20)
    old = FrozenEmbeddings.write("old", [(many, torch.arange(5000), many)])
    np.save("old.npy", many.numpy())
    mapped = FrozenEmbeddings.from_array("old.npy")
    sizes = [len(pickle.dumps(each)) for each in (old, old.side_info, mapped)]
    assert max(sizes) < 1000
    twins = [pickle.dumps(old), pickle.dumps(mapped)]
    monkeypatch.chdir("/")
    assert all(pickle.loads(twin)[:].equal(many) for twin in twins)


def test_a_pickle_is_not_opened_on_other_embeddings(folder):
    twin = pickle.dumps(FrozenEmbeddings(folder))
    shutil.rmtree(folder)
    FrozenEmbeddings.write(folder, [data()[0]], fingerprint="another")
    with pytest.raises(ValueError, match=r"fingerprint must be that of the model"):
        pickle.loads(twin)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, from Python 3.12 on
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers(start, folder):
    loader = torch.utils.data.DataLoader(
        FrozenEmbeddings(folder), batch_size=16, num_workers=2, multiprocessing_context=start
    )
    assert torch.cat(list(loader)).equal(data()[0])


@pytest.mark.parametrize("stored", [True, False])
def test_fit_transformation_gives_what_tensors_give(stored, folder, tmp_path):
    source, _, side_info = data()
    target = source[:, :2] - source[:, 2:]
    old = FrozenEmbeddings(folder) if stored else FrozenEmbeddings.from_array(source, side_info=side_info)
    new = FrozenEmbeddings.write(tmp_path / "new", batches(target))

    def fit(*arrays):
        torch.manual_seed(0)
        transformation = FCTTransformation(D, 2, S, hidden_features=8)
        history = fit_transformation(
            transformation, *arrays, epochs=3, batch_size=16, validation=0.2, warmup_epochs=0, progress=False
        )
        return transformation, history["train_loss"]

    ours, losses = fit(old, new, old.side_info)
    theirs, expected = fit(source, target, side_info)
    assert losses == expected
    mapped = ours.apply_to(old, old.side_info, batch_size=16, progress=False)
    np.testing.assert_array_equal(mapped, theirs.apply_to(source, side_info, batch_size=16, progress=False))


def test_views_closed_forms_and_class_centers(folder):
    source, _, _ = data()
    old, labels = FrozenEmbeddings(folder), torch.arange(N) % 3
    fitted = LinearTransformation(D, D).fit(old, 2 * source)
    torch.testing.assert_close(fitted(source), 2 * source, atol=1e-4, rtol=0)
    fit_transformation(LinearTransformation(D, D), [old, old], source, epochs=1, progress=False)
    assert ClassCenters.from_embeddings(old, labels).centers.equal(ClassCenters.from_embeddings(source, labels).centers)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(error, tmp_path):
    def stream():
        yield from batches(*data(), sizes=(9, 9))
        raise error

    with pytest.raises(error):
        FrozenEmbeddings.write(tmp_path / "old", stream())
    assert list(tmp_path.iterdir()) == []
    assert FrozenEmbeddings.write(tmp_path / "old", batches(*data()))[:].equal(data()[0])


def test_killed_write_is_no_whole_one(tmp_path):
    path = tmp_path / "old"
    two_are_written = context().Event()
    process = context().Process(target=endless_write, args=(path, two_are_written))
    process.start()
    try:
        assert two_are_written.wait(60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not path.exists()
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "embeddings.npy").stat().st_size > 100 * 4 * 4
    with pytest.raises(ValueError, match=r"folder written by FrozenEmbeddings.write, '.*' is not.*meta.json"):
        FrozenEmbeddings(leftover)
    with pytest.raises(ValueError, match=r"whole .npy file"):
        FrozenEmbeddings.from_array(leftover / "embeddings.npy")
    with pytest.raises(FileNotFoundError, match=r"old' is not there"):
        FrozenEmbeddings(path)
    FrozenEmbeddings.write(path, batches(*data()))
    assert FrozenEmbeddings(path)[:].equal(data()[0])


def test_place_that_is_taken(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (folder, tmp_path / "file", tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"path must be free, '.*{path.name}' is there already; delete it"):
            FrozenEmbeddings.write(path, pytest.fail)
    assert FrozenEmbeddings(folder)[:].equal(data()[0])


def test_two_writers_do_not_mix(folder, tmp_path):
    def stream():
        yield torch.ones(2, D)
        FrozenEmbeddings.write(tmp_path / "new", [data()[0]])

    with pytest.raises(ValueError, match=r"path must be free, '.*new' is there already"):
        FrozenEmbeddings.write(tmp_path / "new", stream())
    assert FrozenEmbeddings(tmp_path / "new")[:].equal(data()[0])


@pytest.mark.parametrize("name", ["embeddings.npy", "ids.npy", "side_info.npy"])
@pytest.mark.parametrize("size", [0, 60, 128, -1])
def test_file_cut_short(name, size, folder):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf"path must be a whole .npy file of numbers, '.*{name}' is not"):
        FrozenEmbeddings(folder)


def test_file_that_is_too_long(folder):
    with (folder / "ids.npy").open("ab") as file:
        file.write(b"12345")
    with pytest.raises(ValueError, match=r"ids.npy' is not: 5 bytes more than its header says"):
        FrozenEmbeddings(folder)


@pytest.mark.parametrize("name", ["embeddings.npy", "ids.npy", "side_info.npy"])
def test_file_that_is_gone_or_another(name, folder):
    np.save(folder / name, np.ones((2, 2)))
    with pytest.raises(ValueError, match=rf"{name}' must be the file that meta.json describes, .*got .*\[2, 2\]"):
        FrozenEmbeddings(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        FrozenEmbeddings(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"must be a folder written by FrozenEmbeddings.write, '.*old' is not: .*meta.json"),
        ('{"format": "pml_co', r"must be a folder written by FrozenEmbeddings.write, '.*old' is not: Unterminated"),
        ("", r"must be a folder written by FrozenEmbeddings.write, '.*old' is not: Expecting value"),
        ("[]", r"meta.json of format 'pml_compat.FrozenEmbeddings/1', '.*old' has another"),
        ('{"format": "pml_compat.FrozenEmbeddings/2"}', r"meta.json of format '.*/1', '.*old' has another"),
    ],
)
def test_foreign_folder(text, message, folder):
    if text is None:
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text(text)
    for open_it in (FrozenEmbeddings, FrozenEmbeddings.from_array):
        with pytest.raises(ValueError, match=message):
            open_it(folder)


def test_meta_says_what_is_there(folder):
    assert json.loads((folder / "meta.json").read_text()) == {
        "format": "pml_compat.FrozenEmbeddings/1",
        "fingerprint": "abc",
        "arrays": {
            "embeddings": {"shape": [N, D], "dtype": "float32"},
            "ids": {"shape": [N], "dtype": "int64"},
            "side_info": {"shape": [N, S], "dtype": "float32"},
        },
    }
    assert "(50, 4), torch.float32, ids=True, side_info=(50, 3), fingerprint='abc'" in repr(FrozenEmbeddings(folder))


@pytest.mark.parametrize("open_it", [FrozenEmbeddings, FrozenEmbeddings.from_array])
def test_fingerprint_and_width(open_it, folder, tmp_path):
    assert open_it(folder, fingerprint="abc", width=D).fingerprint == "abc"
    with pytest.raises(ValueError, match=r"fingerprint must be .* behind '.*old', 'abc', got 'abd'; load the model"):
        open_it(folder, fingerprint="abd")
    with pytest.raises(ValueError, match=r"width must be that of the embeddings, 4, got 5"):
        open_it(folder, width=5)
    FrozenEmbeddings.write(tmp_path / "nameless", [data()[0]])
    assert open_it(tmp_path / "nameless").fingerprint is None
    with pytest.raises(ValueError, match=r"fingerprint must be .*nameless', None, got 'abc'"):
        open_it(tmp_path / "nameless", fingerprint="abc")


def test_a_model_is_no_fingerprint(folder, tmp_path):
    model = torch.nn.Linear(2, 2)
    message = r"fingerprint must be a string, got Linear; model_fingerprint\(model\) gives one"
    with pytest.raises(ValueError, match=message):
        FrozenEmbeddings(folder, fingerprint=model)
    with pytest.raises(ValueError, match=message):
        FrozenEmbeddings.from_array(torch.eye(2), fingerprint=model)
    with pytest.raises(ValueError, match=message):
        FrozenEmbeddings.write(tmp_path / "new", pytest.fail, fingerprint=model)


NAN = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([], r"batches must not be empty, got none"),
        (EYE, r"batches must be an iterable of batches, got one Tensor; write \[it\]"),
        ([EYE[0]], r"embeddings must be 2-dimensional, \(N, D\), got shape \(2,\)"),
        ([EYE, EYE[:0]], r"embeddings must not be empty"),
        ([EYE.long()], r"embeddings must be floating point, got torch.int64"),
        ([None], r"embeddings must be a torch.Tensor or a numpy.ndarray, got NoneType"),
        ([()], r"batches must be \(embeddings, ids, side_info\) or less, got 0 parts"),
        ([(EYE, None, EYE, EYE)], r"batches must be \(embeddings, ids, side_info\) or less, got 4 parts"),
        ([EYE, torch.eye(3)], r"embeddings must be 2 wide in every batch, from row 2 on the width is 3"),
        ([EYE, EYE.double()], r"embeddings must be float32 in every batch, from row 2 on it is float64"),
        ([EYE, EYE, NAN], r"embeddings must be finite, row 5 has a NaN or an infinity"),
        ([EYE, EYE / 0], r"embeddings must be finite, row 2 has"),
        ([(EYE, None, EYE), (EYE, None, NAN)], r"side_info must be finite, row 3 has"),
        ([(EYE, None, EYE), (EYE, None, torch.eye(2, 3))], r"side_info must be 2 wide in every batch, from row 2"),
        ([(EYE, [1, 2]), EYE], r"same parts: embeddings, ids at first, from row 2 on embeddings"),
        ([EYE, (EYE, None, EYE)], r"same parts: embeddings at first, from row 2 on embeddings, side_info"),
        ([(EYE, [1, 2]), (EYE, [3])], r"ids must have one entry a row: expected 2 from row 2 on, got 1"),
        ([(EYE, None, torch.eye(3))], r"side_info must have one entry a row: expected 2 from row 0 on, got 3"),
        ([(EYE, [1, 2]), (EYE, [3, 2])], r"ids must not repeat, got 2 in rows 1 and 3; a sampler that pads"),
        ([(EYE, [4, 4])], r"ids must not repeat, got 4 in rows 0 and 1"),
        ([(EYE, EYE[0])], r"ids must be integers of shape \(n,\), got torch.float32 of shape \(2,\)"),
        ([(EYE, [["a"], ["b"]])], r"ids must be numbers, got an array of <U1"),
        ([(EYE, EYE.long())], r"ids must be integers of shape \(n,\), got torch.int64 of shape \(2, 2\)"),
        ([(EYE, np.array([2**63, 1], dtype=np.uint64))], r"ids must be below 2\*\*63"),
    ],
)
def test_bad_batches(stream, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FrozenEmbeddings.write(tmp_path / "old", stream)
    assert list(tmp_path.iterdir()) == []


def test_repeated_ids_show_early(tmp_path):
    given = []

    def stream():
        for number in range(1000):
            given.append(number)
            yield EYE, [0, 1]

    with pytest.raises(ValueError, match=r"ids must not repeat, got 0 in rows 0 and 2"):
        FrozenEmbeddings.write(tmp_path / "old", stream())
    assert len(given) == 2


def test_repeated_ids_at_the_very_end(tmp_path):
    with pytest.raises(ValueError, match=r"ids must not repeat, got 6 in rows 6 and 18"):
        FrozenEmbeddings.write(tmp_path / "old", [(EYE, [i, i + 1]) for i in range(0, 18, 2)] + [(EYE, [6, 99])])


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (torch.ones(3), {}, r"embeddings must be 2-dimensional"),
        ([[1.0]], {}, r"embeddings must be a torch.Tensor or a numpy.ndarray, got list"),
        (NAN, {}, r"embeddings must be finite, row 1"),
        (EYE, {"ids": [1]}, r"ids must have one entry a row: expected 2, got 1"),
        (EYE, {"ids": [1, 1]}, r"ids must not repeat, got 1 in rows 0 and 1"),
        (EYE, {"ids": [1.0, 2.0]}, r"ids must be integers"),
        (EYE, {"side_info": torch.eye(3)}, r"side_info must have one entry a row: expected 2, got 3"),
        (EYE, {"width": 3}, r"width must be that of the embeddings, 2, got 3"),
    ],
)
def test_bad_arrays(array, options, message):
    with pytest.raises(ValueError, match=message):
        FrozenEmbeddings.from_array(array, **options)


def test_bad_npy_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        FrozenEmbeddings.from_array(tmp_path / "missing.npy")
    for name, array, message in (
        ("integers", np.eye(2, dtype=int), r"embeddings must be floating point, got torch.int64"),
        ("empty", np.zeros((0, 2)), r"embeddings must not be empty, got shape \(0, 2\)"),
        ("flat", np.zeros(2), r"embeddings must be 2-dimensional"),
        ("big_endian", np.zeros((2, 2), ">f4"), r"whole .npy file of numbers, '.*big_endian.npy' is not: .*byte order"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=message):
            FrozenEmbeddings.from_array(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "archive.npz", np.eye(2))
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    for name in ("archive.npz", "objects.npy"):
        with pytest.raises(ValueError, match=rf"whole .npy file of numbers, '.*{name}' is not"):
            FrozenEmbeddings.from_array(tmp_path / name)
    for own in ({"ids": torch.arange(N)}, {"side_info": data()[2]}):
        with pytest.raises(ValueError, match=r"ids and side_info must be None for a folder, '.*old' has its own"):
            FrozenEmbeddings.from_array(folder, **own)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (N, IndexError, r"indices must be in \[0, 49\], got 50$"),
        (-1, IndexError, r"indices must be in \[0, 49\], got -1; -1 is index_of's answer for 'not stored'"),
        ([0, 99, 3], IndexError, r"got 99$"),
        (torch.tensor([0, -7]), IndexError, r"got -7$"),
        ([0.5], ValueError, r"indices must be integers of shape \(n,\), got torch.float64"),
        (1.0, ValueError, r"indices must be integers"),
        (True, ValueError, r"indices must be integers of shape \(n,\), got torch.bool"),
        (torch.ones(N) > 0, ValueError, r"indices must be integers of shape \(n,\), got torch.bool"),
        ([[1, 2]], ValueError, r"indices must be integers of shape \(n,\), got torch.int64 of shape \(1, 2\)"),
        (None, ValueError, r"indices must be numbers"),
        ((slice(None), 0), ValueError, r"indices must be numbers"),
        ("3", ValueError, r"indices must be numbers"),
    ],
)
def test_bad_indices(indices, error, message, folder):
    with pytest.raises(error, match=message):
        FrozenEmbeddings(folder)[indices]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


def test_fingerprint_tells_weights_apart():
    prints = {model_fingerprint(network()), model_fingerprint(copy.deepcopy(network())), "0" * 16}
    assert len(prints) == 2 and all(len(p) == 16 and set(p) <= set("0123456789abcdef") for p in prints)

    def changed(change):
        model = network()
        change(model)
        return model_fingerprint(model)

    prints |= {
        changed(lambda m: m[0].weight.data[0, 0].add_(1e-6)),
        changed(lambda m: m[1].running_mean.add_(1e-6)),
        changed(lambda m: m.bfloat16()),
        changed(lambda m: setattr(m[2].weight, "data", m[2].weight.data.reshape(3, 2))),
        changed(lambda m: m.insert(1, torch.nn.ReLU())),  # other names
        model_fingerprint(torch.nn.ModuleDict({"net": network()})),
    }
    assert len(prints) == 8


def test_fingerprint_does_not_depend_on_memory_layout_or_gradients():
    model = network()
    expected = model_fingerprint(model)
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    assert not model[0].weight.is_contiguous()
    assert model_fingerprint(model.requires_grad_(False).eval()) == expected


@pytest.mark.parametrize("save", [False, True])
def test_fingerprint_of_frozen_models(save):
    model = network()
    assert model_fingerprint(FrozenModel(model, save=save)) == model_fingerprint(model)
    other = network()
    other[0].weight.data.add_(1)

    def nested(net):
        return torch.nn.Sequential(FrozenModel(torch.nn.Sequential(FrozenModel(net, save=save))), torch.nn.Linear(2, 2))

    torch.manual_seed(1)
    ours = nested(model)
    twin = copy.deepcopy(ours)
    assert model_fingerprint(twin) == model_fingerprint(ours)
    twin[0].model[0] = FrozenModel(other, save=save)
    assert model_fingerprint(twin) != model_fingerprint(ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_and_on_a_gpu(tmp_path):
    embeddings, ids, _ = data()
    old = FrozenEmbeddings.write(tmp_path / "old", [(embeddings.cuda(), ids.cuda())])
    assert old[torch.arange(N).cuda()].equal(embeddings) and old[torch.tensor(3).cuda()].equal(embeddings[3])
    assert FrozenEmbeddings.from_array(embeddings.cuda())[:].equal(embeddings)
    assert model_fingerprint(network().cuda()) == model_fingerprint(network())


def test_fingerprint_errors():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
        model_fingerprint("resnet50")
    with pytest.raises(ValueError, match=r"model must have parameters or buffers, this ReLU has none"):
        model_fingerprint(torch.nn.ReLU())
