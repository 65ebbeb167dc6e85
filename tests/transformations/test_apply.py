import copy
import tracemalloc

import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation
from pml_compat.transformations import apply as apply_module
from tests.pairwise import pairwise
from tests.transformations.cases import TRANSFORMATIONS, batch, build

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def apply_to(transformation, *arguments, **kwargs):
    return transformation.apply_to(*arguments, progress=False, **kwargs)


def expected_of(transformation, source, side_info=None):
    with torch.no_grad():
        return transformation.eval()(source, side_info).numpy()


class Rows:
    """Stored rows that give themselves by slices alone, and remember how many were asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        assert isinstance(index, slice)
        self.asked.append(len(range(*index.indices(len(self)))))
        return self.rows[index]


@every_transformation
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_gives_what_a_direct_call_gives(name, batch_size):
    transformation = build(name)
    source, side_info = batch(transformation, n=7)
    mapped = apply_to(transformation, source, side_info, batch_size=batch_size)
    assert type(mapped) is np.ndarray and mapped.dtype == np.float32
    np.testing.assert_allclose(mapped, expected_of(transformation, source, side_info), rtol=1e-5, atol=1e-5)


@every_transformation
def test_the_transformation_stays_as_it_is(name):
    transformation = build(name).train()
    transformation.requires_grad_(False)
    parameters = list(transformation.parameters())
    before = copy.deepcopy(transformation.state_dict())
    mapped = apply_to(transformation, *batch(transformation, n=7), batch_size=3)
    assert all(module.training for module in transformation.modules())
    assert [id(p) for p in transformation.parameters()] == [id(p) for p in parameters]
    assert not any(p.requires_grad for p in parameters)
    assert list(transformation.state_dict()) == list(before)
    assert all(tensor.equal(before[key]) for key, tensor in transformation.state_dict().items())
    # though it is in train mode, no row saw its batch
    np.testing.assert_allclose(mapped, expected_of(transformation, *batch(transformation, n=7)), rtol=1e-5, atol=1e-5)


@every_transformation
def test_float64(name):
    transformation = build(name).double()
    source, side_info = (None if rows is None else rows.double() for rows in batch(transformation))
    mapped = apply_to(transformation, source, side_info)
    assert mapped.dtype == np.float64
    np.testing.assert_allclose(mapped, expected_of(transformation, source, side_info), rtol=1e-12, atol=1e-12)


@every_transformation
def test_folded_gives_the_same(name):
    transformation = build(name).double()
    source, side_info = (None if rows is None else rows.double() for rows in batch(transformation))
    expected = transformation(source, side_info)
    folded = transformation.train().folded()
    assert not any(module.training for module in folded.modules()) and transformation.training
    torch.testing.assert_close(folded(source, side_info), expected)


@pairwise
@pytest.mark.parametrize("name", ["fct_side", "linear"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["tensor", "array", "read-only map", "slices of tensors", "slices of arrays"])
def test_sources(name, dtype, kind, tmp_path):
    transformation = build(name)
    given = [rows if rows is None else rows.to(getattr(torch, dtype)) for rows in batch(transformation, n=7)]
    expected = expected_of(transformation, *(rows if rows is None else rows.float() for rows in given))

    def stored(rows, number):
        if rows is None or kind == "tensor":
            return rows
        if kind == "read-only map":
            np.save(tmp_path / f"{number}.npy", rows.numpy())
            return np.load(tmp_path / f"{number}.npy", mmap_mode="r")
        if kind == "array":
            return rows.numpy()
        return Rows(rows if kind == "slices of tensors" else rows.numpy())

    arrays = [stored(rows, number) for number, rows in enumerate(given)]
    mapped = apply_to(transformation, *arrays, batch_size=3)  # a warning would be an error here
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)


def test_strided_and_gradient_carrying_sources():
    transformation = build("linear")
    source = torch.randn(6, 7)
    expected = expected_of(transformation, source.t()[:, :6].contiguous())
    np.testing.assert_allclose(apply_to(transformation, source.t().numpy()), expected, rtol=1e-5)
    mapped = apply_to(transformation, source.t().requires_grad_(), batch_size=2)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5)


@pytest.mark.parametrize("out", [False, True])
def test_normalize(out, tmp_path):
    transformation = build("fct")
    source, _ = batch(transformation, n=7)
    file = {"out": tmp_path / "mapped.npy"} if out else {}
    expected = expected_of(transformation, source)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    mapped = apply_to(transformation, source, batch_size=3, normalize=True, **file)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_out_is_a_file_and_a_memory_map(as_text, double, tmp_path):
    transformation = build("fct_side").to(torch.float64 if double else torch.float32)
    path = tmp_path / "new" / "mapped.npy"
    given = batch(transformation, n=7)
    mapped = apply_to(transformation, *given, out=str(path) if as_text else path, batch_size=3)
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert [file.name for file in path.parent.iterdir()] == ["mapped.npy"]
    read = np.load(path, allow_pickle=False)
    assert read.shape == (7, 3) and read.dtype == (np.float64 if double else np.float32)
    np.testing.assert_array_equal(read, mapped)
    np.testing.assert_array_equal(read, apply_to(transformation, *given, batch_size=3))


def test_out_is_never_the_source(tmp_path):
    path = tmp_path / "gallery.npy"
    np.save(path, np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    before = path.read_bytes()
    writable, rows = np.load(path, mmap_mode="r+"), np.load(path)
    given = [
        {"source": np.load(path, mmap_mode="r"), "out": path, "overwrite": True},
        {"source": writable, "out": writable},
        {"source": writable, "out": np.load(path, mmap_mode="r+")},
        {"source": rows, "out": rows},
        {"source": torch.from_numpy(rows), "out": rows[:]},
    ]
    for arguments in given:
        with pytest.raises(ValueError, match="out must not be the source"):
            apply_to(LinearTransformation(4, 4), **arguments, batch_size=2)
    assert path.read_bytes() == before


def test_a_file_that_stands_at_out_is_replaced_on_request_alone(tmp_path):
    path, transformation = tmp_path / "mapped.npy", build("linear")
    first, second = batch(transformation, n=5)[0], batch(transformation, n=5)[0] + 1
    apply_to(transformation, first, out=path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="give overwrite=True to replace it"):
        apply_to(transformation, second, out=path)
    assert path.read_bytes() == before
    apply_to(transformation, second, out=path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("kind", ["nan", "interrupt"])
@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_pass_leaves_an_earlier_file(kind, older, tmp_path):
    path = tmp_path / "mapped.npy"
    transformation = build("linear")
    source, _ = batch(transformation, n=8)
    if older:
        apply_to(transformation, source, out=path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if kind == "nan":
        source[7, 2] = torch.nan
        with pytest.raises(ValueError, match=r"source must be finite, row 7 has a NaN or an infinity"):
            apply_to(transformation, source + 1, out=path, batch_size=3, overwrite=True)
    else:

        class Interrupted(Rows):
            def __getitem__(self, index):
                if index.start == 6:
                    raise KeyboardInterrupt
                return super().__getitem__(index)

        with pytest.raises(KeyboardInterrupt):
            apply_to(transformation, Interrupted(source + 1), out=path, batch_size=3, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pairwise
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ["source", "side_info"])
def test_rows_that_are_not_finite_are_counted_from_the_first_of_all(array, value, batch_size):
    transformation = build("fct_side")
    source, side_info = batch(transformation, n=8)
    {"source": source, "side_info": side_info}[array][4:7] = float(value)
    with pytest.raises(ValueError, match=rf"^{array} must be finite, row 4 has a NaN or an infinity; look for a"):
        apply_to(transformation, source, side_info, batch_size=batch_size)


def test_infinities_that_a_relu_would_hide():
    transformation = build("fct_side")
    with torch.no_grad():
        transformation.side_branch[0].weight.abs_().neg_()
    source, side_info = batch(transformation)
    side_info[3] = torch.inf
    assert torch.isfinite(transformation(source, side_info)).all()
    with pytest.raises(ValueError, match=r"side_info must be finite, row 3"):
        apply_to(transformation, source, side_info)


def test_a_map_that_overflows():
    transformation = LinearTransformation(2, 2)
    with torch.no_grad():
        transformation.linear.weight.copy_(torch.tensor([[1e20, 0.0], [0.0, 1.0]]))
    source = torch.ones(8, 2)
    source[5, 0] = 1e20
    with pytest.raises(ValueError, match=r"source, mapped, must be finite, row 5 has a NaN or an infinity"):
        apply_to(transformation, source, batch_size=2)
    large = torch.full((8, 2), 3e38)  # their sum is infinite, they are not
    torch.nn.init.eye_(transformation.linear.weight)
    np.testing.assert_array_equal(apply_to(transformation, large), large.numpy())


@every_transformation
@pytest.mark.parametrize("out", [False, True])
def test_an_empty_gallery(name, out, tmp_path):
    transformation = build(name)
    source, side_info = batch(transformation)
    file = {"out": tmp_path / "mapped.npy"} if out else {}
    mapped = apply_to(transformation, source[:0], side_info if side_info is None else side_info[:0], **file)
    assert mapped.shape == (0, transformation.out_features) and mapped.dtype == np.float32
    assert not out or np.load(tmp_path / "mapped.npy").shape == (0, transformation.out_features)


def test_reads_batch_size_rows_at_a_time():
    transformation = build("fct_side")
    source, side_info = (Rows(rows) for rows in batch(transformation, n=20))
    apply_to(transformation, source, side_info, batch_size=6)
    assert source.asked == side_info.asked == [6, 6, 6, 2]


def test_memory_is_set_by_the_batch_size(tmp_path):
    """Both ends on disk: 40,000 rows of 64 floats are 10 MB, a batch of 500 is 0.1 MB."""
    np.lib.format.open_memmap(tmp_path / "gallery.npy", "w+", np.float32, (40_000, 64))[:] = 1.0
    source, transformation = np.load(tmp_path / "gallery.npy", mmap_mode="r"), LinearTransformation(64, 64)
    tracemalloc.start()
    apply_to(transformation, source, out=tmp_path / "mapped.npy", batch_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_batch_sizes_that_are_none(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be an integer of at least 1, got"):
        apply_to(build("linear"), torch.ones(3, 6), batch_size=batch_size)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", lambda s, i: (s[:, :5], i), r"source must be 6 wide, got width 5"),
        ("linear", lambda s, i: (s[:, 0], i), r"source must be 2-dimensional, \(N, D\), got shape \(3,\)"),
        ("linear", lambda s, i: (s.long(), i), r"source must be floating point, got torch.int64"),
        ("linear", lambda s, i: (s.tolist(), i), r"source must be a torch.Tensor or a numpy.ndarray, got list"),
        ("linear", lambda s, i: (s, s), r"side_info must be None for this LinearTransformation, got shape \(3, 6\)"),
        ("fct_side", lambda s, i: (s, None), r"side_info must be given, \(N, 5\) for this FCTTransformation, got None"),
        ("fct_side", lambda s, i: (s, i[:, 1:]), r"side_info must be 5 wide, got width 4"),
        ("fct_side", lambda s, i: (s, i[1:]), r"side_info must have one row an embedding: expected 7, got 6"),
        ("fct_side", lambda s, i: (s[1:], i), r"side_info must have one row an embedding: expected 6, got 7"),
    ],
)
def test_wrong_inputs(name, change, message, tmp_path):
    transformation = build(name)
    arguments = change(*batch(transformation, n=7))
    with pytest.raises(ValueError, match=message):
        apply_to(transformation, *arguments, out=tmp_path / "mapped.npy", batch_size=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mapped", "mapped.npz", "mapped.npy.gz"])
def test_out_must_be_an_npy_file(name, tmp_path):
    source = Rows(torch.ones(3, 6))
    with pytest.raises(ValueError, match=rf"out must be an .npy file, got '.*{name}'"):
        apply_to(build("linear"), source, out=tmp_path / name)
    assert source.asked == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_transformation
def test_on_a_gpu(name):
    transformation = build(name)
    source, side_info = batch(transformation, n=7)
    expected = expected_of(transformation, source, side_info)
    mapped = apply_to(transformation.cuda(), source, side_info, batch_size=3)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in transformation.parameters()} == {"cuda"}


def test_out_may_be_an_array():
    transformation = build("fct")
    source = batch(transformation, n=7)[0]
    out = np.zeros((7, 3), np.float32)
    result = transformation.apply_to(source, out=out, batch_size=3, progress=False)
    assert result is out
    np.testing.assert_array_equal(out, transformation.apply_to(source, batch_size=3, progress=False))


@pytest.mark.parametrize(
    "out", [np.zeros((6, 3), np.float32), np.zeros((7, 3)), np.broadcast_to(np.float32(0), (7, 3))]
)
def test_an_array_that_does_not_fit(out):
    transformation = build("fct")
    with pytest.raises(ValueError, match=r"out must be a writable array of shape \(7, 3\) and float32, got"):
        transformation.apply_to(batch(transformation, n=7)[0], out=out, progress=False)


def test_blocks_of_the_cpu_change_nothing(monkeypatch):
    transformation = build("fct_side")
    source, side_info = batch(transformation, n=9)
    whole = transformation.apply_to(source, side_info, normalize=True, progress=False)
    monkeypatch.setattr(apply_module, "_CPU_BLOCK", 2)
    np.testing.assert_allclose(
        transformation.apply_to(source, side_info, batch_size=5, normalize=True, progress=False), whole, atol=1e-6
    )
    source[8, 1] = torch.nan
    with pytest.raises(ValueError, match="source must be finite, row 8 has"):
        transformation.apply_to(source, side_info, batch_size=5, progress=False)
