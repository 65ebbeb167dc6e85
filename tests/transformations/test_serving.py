"""Both forms for a server give what the transformation gives; tolerances are for outputs of size about 1 to 10."""

import copy
import json
import operator
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    NumpyTransformation,
    OrthogonalTransformation,
    Transformation,
    TransformationChain,
    numpy_form,
)
from pml_compat.transformations.serving import export_transformation, save_numpy
from tests.transformations.cases import TRANSFORMATIONS, batch, build

# torch 2.4's own, in torch.export.load
pytestmark = pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
ROWS = [1, 2, 7, 1000]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
FORMS = [(export_transformation, "map.pt2"), (save_numpy, "map.npz")]
both_forms = pytest.mark.parametrize(("write", "file"), FORMS)


def given(*inputs):
    return [rows for rows in inputs if rows is not None]


def arrays(*inputs):
    return [rows.numpy() for rows in given(*inputs)]


def through_numpy(transformation, folder, *inputs):
    save_numpy(transformation, folder / "map.npz")
    return torch.from_numpy(NumpyTransformation(folder / "map.npz")(*arrays(*inputs)))


def through_export(transformation, folder, *inputs):
    export_transformation(transformation, folder / "map.pt2")
    return torch.export.load(folder / "map.pt2").module()(*given(*inputs))


@every_transformation
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_numpy_form_equals_the_transformation(name, dtype, tolerance, tmp_path):
    transformation = build(name).to(dtype)
    save_numpy(transformation, tmp_path / "map.npz")
    form = NumpyTransformation(tmp_path / "map.npz")
    assert (form.in_features, form.out_features, form.side_features, form.dtype.name) == (
        transformation.in_features,
        transformation.out_features,
        transformation.side_features,
        str(dtype).removeprefix("torch."),
    )
    for n in ROWS:
        inputs = [rows.to(dtype) for rows in given(*batch(transformation, n))]
        result = torch.from_numpy(form(*arrays(*inputs)))
        torch.testing.assert_close(result, transformation(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(  # each kind in both: its variants take turns
    ("name", "dtype", "tolerance"), [(name, *PRECISIONS[number % 2]) for number, name in enumerate(TRANSFORMATIONS)]
)
def test_export_equals_the_transformation(name, dtype, tolerance, tmp_path):
    transformation = build(name).to(dtype)
    export_transformation(transformation, tmp_path / "map.pt2")
    program = torch.export.load(tmp_path / "map.pt2").module()
    for n in ROWS:
        inputs = [rows.to(dtype) for rows in given(*batch(transformation, n))]
        result = program(*inputs)
        assert not result.requires_grad
        torch.testing.assert_close(result, transformation(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "write", "file"),
    [(name, *FORMS[1]) for name in TRANSFORMATIONS]
    + [(name, *FORMS[0]) for name in ("linear", "orthogonal", "residual_bottleneck", "fct_side", "fastfill", "chain")],
)
def test_transformation_stays_as_it_is(name, write, file, tmp_path):
    transformation = build(name).train()
    before = copy.deepcopy(transformation.state_dict())
    random_state = torch.get_rng_state()
    write(transformation, tmp_path / file)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert transformation.training and all(module.training for module in transformation.modules())
    assert transformation.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in transformation.state_dict().items())
    transformation(*batch(transformation)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in transformation.parameters())


@both_forms
def test_transformation_whose_folded_form_is_itself_stays_trainable(write, file, tmp_path):
    class Itself(Own):
        def folded(self):
            return self.eval()

    transformation = Itself(lambda own, e: own.linear(e)).train()
    write(transformation, tmp_path / file)
    assert transformation.training and all(parameter.requires_grad for parameter in transformation.parameters())


@both_forms
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_transformation_on_a_gpu(write, file, tmp_path):
    transformation = build("chain_with_side")
    inputs = batch(transformation)
    expected = transformation(*inputs)
    through = through_export if write is export_transformation else through_numpy
    served = [rows.cuda() for rows in inputs] if write is export_transformation else inputs
    result = through(transformation.cuda(), tmp_path, *served)
    assert next(transformation.parameters()).is_cuda
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)


# Files


@both_forms
def test_interrupted_write_keeps_the_file(write, file, tmp_path, monkeypatch):
    path = tmp_path / file
    write(LinearTransformation(3, 3), path)
    before = path.read_bytes()

    def interrupted(*arguments, **weights):
        Path(next(argument for argument in arguments if isinstance(argument, Path))).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", interrupted)
    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(LinearTransformation(4, 4), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@both_forms
def test_arguments_that_are_none(write, file, tmp_path):
    with pytest.raises(ValueError, match=r"transformation must be a Transformation, got Linear"):
        write(torch.nn.Linear(2, 2), tmp_path / file)
    with pytest.raises(ValueError, match=rf"path must be an? {Path(file).suffix} file, got '.*map.bin'"):
        write(LinearTransformation(2, 2), tmp_path / "map.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 3, 30, 0.5, -1])
def test_a_file_that_is_cut_short(kept, tmp_path):
    path = tmp_path / "map.npz"
    save_numpy(build("fct"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    message = r"path must be a whole file that a transformation exported, .*map.npz. is not: "
    with pytest.raises(ValueError, match=message):
        NumpyTransformation(path)


def test_a_file_with_a_wrong_bit_is_refused_or_harmless(tmp_path):
    path = tmp_path / "map.npz"
    save_numpy(build("chain"), path)
    whole, rows = path.read_bytes(), np.ones((2, 6))
    expected = NumpyTransformation(path)(rows)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        path.write_bytes(broken)
        try:
            form = NumpyTransformation(path)
        except ValueError as error:
            assert "path must be a whole file that a transformation exported" in str(error)
            refused += 1
        else:  # a bit that says nothing, as the date in a zip file
            np.testing.assert_array_equal(form(rows), expected)
    assert refused > 200


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "other.npz"
    message = r"path must be a whole file that a transformation exported, '.*other.npz' is not: "
    np.savez(path, embeddings=np.ones(3))
    with pytest.raises(ValueError, match=message + r"it holds \['embeddings'\] and no program of format pml_compat"):
        NumpyTransformation(path)
    for program in ("[]", '{"format": "pml_compat.NumpyTransformation/0"}'):
        np.savez(path, program=np.array(program))
        with pytest.raises(ValueError, match=message + r"it holds \['program'\] and no program of format"):
            NumpyTransformation(path)
    with path.open("wb") as stream:
        np.save(stream, np.ones(3))
    with pytest.raises(ValueError, match=message + "it holds one array"):
        NumpyTransformation(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match=message):
        NumpyTransformation(path)
    with pytest.raises(FileNotFoundError):
        NumpyTransformation(tmp_path / "none.npz")


class Payload:
    opened = False

    def __reduce__(self):
        return setattr, (Payload, "opened", True)


def test_nothing_is_unpickled(tmp_path):
    assert pickle.loads(pickle.dumps(Payload())) is None and Payload.opened  # the payload works
    Payload.opened = False
    path = tmp_path / "map.npz"
    save_numpy(LinearTransformation(2, 2), path)
    with np.load(path) as file:
        assert not any(array.dtype.hasobject for array in file.values())
        changed = {**file, "weight0": np.array(Payload(), dtype=object)}
    np.savez(path, **changed)
    with pytest.raises(ValueError, match=r"is not: Object arrays cannot be loaded when allow_pickle=False"):
        NumpyTransformation(path)
    assert not Payload.opened


# A server

REFUSE_IMPORTS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def run_on_a_server(code, folder, refused):
    script = "\n".join([REFUSE_IMPORTS.format(refused=refused), "import numpy as np", code])
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_numpy_form_is_one_file_that_needs_numpy_alone(tmp_path):
    transformation = build("chain_with_side")
    inputs = batch(transformation, 3)
    save_numpy(transformation, tmp_path / "map.npz")
    np.savez(tmp_path / "rows.npz", *arrays(*inputs), expected=transformation(*inputs).detach().numpy())
    shutil.copy(numpy_form.__file__, tmp_path / "copied.py")
    code = """
from copied import NumpyTransformation
rows = np.load("rows.npz")
result = NumpyTransformation("map.npz")(rows["arr_0"], rows["arr_1"])
np.testing.assert_allclose(result, rows["expected"], rtol=1e-5, atol=1e-5)
assert not {"torch", "pml_compat", "safetensors"} & set(sys.modules)
"""
    run_on_a_server(code, tmp_path, {"torch", "pml_compat", "pytorch_metric_learning", "safetensors", "tqdm"})
    with pytest.raises(AssertionError, match="ModuleNotFoundError: torch"):  # the imports are refused
        run_on_a_server("import torch", tmp_path, {"torch"})


def test_export_is_read_where_there_is_no_pml_compat(tmp_path):
    transformation = build("chain_with_side")
    inputs = batch(transformation, 3)
    export_transformation(transformation, tmp_path / "map.pt2")
    np.savez(tmp_path / "rows.npz", *arrays(*inputs), expected=transformation(*inputs).detach().numpy())
    code = """
import torch
rows = np.load("rows.npz")
program = torch.export.load("map.pt2").module()
result = program(torch.from_numpy(rows["arr_0"]), torch.from_numpy(rows["arr_1"]))
np.testing.assert_allclose(result.numpy(), rows["expected"], rtol=1e-5, atol=1e-5)
assert not {"pml_compat", "pytorch_metric_learning"} & set(sys.modules)
"""
    run_on_a_server(code, tmp_path, {"pml_compat", "pytorch_metric_learning"})


# Inputs of the NumPy form


@every_transformation
def test_wrong_inputs(name, tmp_path):
    transformation = build(name)
    save_numpy(transformation, tmp_path / "map.npz")
    form = NumpyTransformation(tmp_path / "map.npz")
    embeddings, *side = arrays(*batch(transformation))
    width = form.in_features
    with pytest.raises(ValueError, match=rf"embeddings must be {width} wide, got width {width + 1}"):
        form(np.ones((2, width + 1)), *side)
    with pytest.raises(ValueError, match=rf"embeddings must be 2-dimensional, \(N, D\), got shape \({width},\)"):
        form(embeddings[0], *side)
    with pytest.raises(ValueError, match=rf"embeddings must not be empty, got shape \(0, {width}\)"):
        form(embeddings[:0], *side)
    with pytest.raises(ValueError, match=r"embeddings must be floating point, got int64; convert them with .astype"):
        form(embeddings.astype(np.int64), *side)
    if not side:
        with pytest.raises(ValueError, match=r"side_info must be None for this transformation, got shape \(5, 2\)"):
            form(embeddings, np.ones((5, 2)))
        return
    width = form.side_features
    with pytest.raises(ValueError, match=rf"side_info must be given, \(N, {width}\) for this transformation, got None"):
        form(embeddings)
    with pytest.raises(ValueError, match=rf"side_info must be {width} wide, got width {width + 1}"):
        form(embeddings, np.ones((5, width + 1)))
    with pytest.raises(ValueError, match=r"side_info must have one row an embedding: expected 5, got 4"):
        form(embeddings, side[0][:4])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_output_has_the_dtype_of_the_embeddings(dtype, tmp_path):
    transformation = build("fct_side")
    save_numpy(transformation, tmp_path / "map.npz")
    inputs = batch(transformation)
    embeddings, side_info = arrays(*inputs)
    embeddings = embeddings.astype(np.float16)
    form = NumpyTransformation(tmp_path / "map.npz")
    result = form(embeddings.astype(dtype), side_info.astype(np.float64))
    assert result.dtype == dtype
    # computed in float32, whatever comes in
    np.testing.assert_array_equal(result, form(embeddings.astype(np.float32), side_info).astype(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_as_float32(dtype, tmp_path):
    transformation = build("residual_bottleneck").to(dtype)
    embeddings, _ = batch(transformation)
    result = through_numpy(transformation, tmp_path, embeddings)
    torch.testing.assert_close(result, transformation.float()(embeddings), rtol=1e-5, atol=1e-5)


@every_transformation
def test_inputs_stay_as_they_are(name, tmp_path):
    transformation = build(name)
    inputs = batch(transformation)
    before = copy.deepcopy(inputs)
    result = through_numpy(transformation, tmp_path, *inputs)
    assert all(torch.equal(*pair) for pair in zip(given(*inputs), given(*before), strict=True))
    assert not any(np.shares_memory(result.numpy(), rows.numpy()) for rows in given(*inputs))


def test_large_arrays_are_overwritten_or_let_go(tmp_path):
    def layers(own, embeddings):
        for _ in range(5):
            embeddings = own.prelu(own.linear(embeddings))
        return embeddings

    save_numpy(Own(layers), tmp_path / "map.npz")
    form = NumpyTransformation(tmp_path / "map.npz")
    rows = np.ones((50_000, 6), dtype=np.float32)
    tracemalloc.start()
    try:
        form(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * rows.nbytes  # what is read and what is written; in prelu, what is overwritten and a part of it


def test_threads_share_one_object(tmp_path):
    transformation = build("chain_with_side")
    save_numpy(transformation, tmp_path / "map.npz")
    form = NumpyTransformation(tmp_path / "map.npz")
    embeddings, side_info = arrays(*batch(transformation, 2000))
    expected = form(embeddings, side_info)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda shift: form(np.roll(embeddings, shift, 0), np.roll(side_info, shift, 0)), range(20))
        )
    for shift, result in enumerate(results):
        np.testing.assert_allclose(result, np.roll(expected, shift, 0), rtol=1e-5, atol=1e-5)


# Transformations of one's own


class Own(Transformation):
    """6 wide, with every layer that a function might use."""

    def __init__(self, function, out_features=6, side_features=None):
        super().__init__(6, out_features, side_features)
        self.function = function
        self.linear = torch.nn.Linear(6, 6)
        self.prelu = torch.nn.PReLU()
        self.norm = torch.nn.BatchNorm1d(6)
        self.plain_norm = torch.nn.BatchNorm1d(6, affine=False)
        self.batch_statistics = torch.nn.BatchNorm1d(6, track_running_stats=False)
        self.dropout = torch.nn.Dropout()
        self.orthogonal = OrthogonalTransformation(6, 6)
        self.matrix = torch.nn.Parameter(torch.empty(6, 6))
        self.row = torch.nn.Parameter(torch.empty(6))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)

    def transform(self, embeddings, side_info):
        return self.function(self, embeddings, *given(side_info))


F = torch.nn.functional

KNOWN = {
    "linear": lambda own, e: own.linear(e),
    "linear without bias": lambda own, e: F.linear(e, own.matrix),
    "matmul": lambda own, e: torch.matmul(e @ own.matrix, own.matrix.t()),
    "matrix computed from weights": lambda own, e: e @ torch.linalg.qr(own.matrix).Q.t(),
    "another transformation": lambda own, e: own.orthogonal.transform(e, None),
    "relu of the input": lambda own, e: torch.relu(e),
    "relu method": lambda own, e: e.relu() + own.linear(e).relu(),
    "relu in place": lambda own, e: F.relu(own.linear(e), inplace=True),
    "prelu of the input": lambda own, e: own.prelu(e),
    "prelu with a slope a column": lambda own, e: F.prelu(own.linear(e), own.row),
    "batch norm first": lambda own, e: own.linear(own.norm(e)),
    "batch norm as an attribute": lambda own, e: own.norm(own.linear(e)),
    "batch norm without weights": lambda own, e: own.plain_norm(e),
    "dropout": lambda own, e: own.dropout(e) + own.row,
    "add": lambda own, e: torch.add(own.row + e, 1) + 2.0 + own.linear(e),
    "add reversed": lambda own, e: 2 + e.add(own.row),
    "sum": lambda own, e: sum([e, own.linear(e), own.prelu(e)]),
    "sub": lambda own, e: (own.row - e) - own.row.square() - own.linear(e),
    "sub reversed": lambda own, e: 1 - torch.sub(e, 3).sub(own.row),
    "mul": lambda own, e: own.row * e * 2.0 * own.linear(e),
    "mul reversed": lambda own, e: 3 * torch.mul(e, own.row).mul(own.row),
    "a column times all": lambda own, e: F.linear(e, own.row[None]) * own.linear(e),
    "all plus a column": lambda own, e: own.prelu(e) + F.linear(e, own.row[None]) + own.linear(e)[:, 5:],
    "a column minus the input": lambda own, e: F.linear(e, own.row[None]) - e,
    "slices": lambda own, e: torch.cat([e[:, 3:], own.linear(e)[:, :-4], e[:, -1:]], dim=1),
    "split by number": lambda own, e: torch.cat(list(reversed(torch.split(e, 4, dim=1))), -1),
    "split by widths": lambda own, e: torch.cat(e.split([1, 0, 5], dim=-1)[::-1], dim=1),
    "read twice": lambda own, e: (lambda h: torch.relu(h) - own.prelu(h) + h)(own.linear(e)),
    "twice in one step": lambda own, e: (lambda h: torch.relu(h) * h + (h + h))(own.linear(e)),
    "slice read after its whole": lambda own, e: (lambda h, s: torch.cat([s, own.prelu(h)], 1))(
        *(lambda h: (h, h[:, :2]))(own.linear(e))
    ),
    "relu of a slice of what is read later": lambda own, e: (
        lambda h: torch.cat([torch.relu(h[:, :2]), h[:, 2:], h], 1)
    )(own.linear(e) - 3),
    "output that another step reads": lambda own, e: (lambda h: (h, own.prelu(h)))(own.linear(e))[0],
    "input changed in place": lambda own, e: operator.iadd(e, 1),
    "nothing": lambda own, e: e,
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_transformation_of_ones_own(case, tmp_path):
    embeddings = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    transformation = Own(KNOWN[case]).double().eval()
    expected = transformation.transform(embeddings.double(), None)
    result = through_numpy(transformation, tmp_path, embeddings.double())
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_side_information_of_ones_own_in_a_chain(tmp_path):
    own = Own(lambda own, e, s: torch.cat([own.linear(e) * s[:, :1], s], 1), out_features=8, side_features=2)
    chain = TransformationChain(LinearTransformation(3, 6), own, FCTTransformation(8, 2, 3, 4)).eval()
    inputs = batch(chain, 7)
    expected = chain(*inputs)
    torch.testing.assert_close(through_numpy(chain, tmp_path, *inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(through_export(chain, tmp_path, *inputs), expected, rtol=1e-5, atol=1e-5)


UNKNOWN = {
    "gelu": lambda own, e: F.gelu(e),
    "sum": lambda own, e: e.sum(1, keepdim=True) + e,
    "shape": lambda own, e: e * e.shape[0],
    "normalize": lambda own, e: F.normalize(own.linear(e)),
    "add_": lambda own, e: own.linear(e).add_(1),
    "something else (_elementwise() got an unexpected keyword argument 'alpha'": lambda own, e: torch.add(
        e, e, alpha=2
    ),
    "something else (unsupported operand type(s) for /": lambda own, e: e / 2,
    "cat along dim 0": lambda own, e: torch.cat([e, e]),
    "cat with a weight": lambda own, e: torch.cat([e, own.row.expand(8, 6)], dim=1),
    "split along dim 0": lambda own, e: e.split(8)[0],
    "[0]": lambda own, e: e[0] + e,
    "[(slice(None, 2, None), slice(None, 3, None))]": lambda own, e: e[:2, :3],
    "[(slice(None, None, None), slice(None, None, 2))]": lambda own, e: e[:, ::2],
    "[(slice(None, None, None), 0)]": lambda own, e: e[:, 0],
    "a matmul with anything but a matrix of weights": lambda own, e: e.matmul(own.row),
    "batch normalisation without running statistics": lambda own, e: own.batch_statistics(e),
    "dropout in training mode": lambda own, e: F.dropout(e),
    "no embeddings": lambda own, e: own.matrix,
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_numpy_form_has_not(what, tmp_path):
    with pytest.raises(ValueError, match=r"transformation must be made of linear, matmul, .* this one uses ") as raised:
        save_numpy(Own(UNKNOWN[what]), tmp_path / "map.npz")
    message = str(raised.value)
    assert f"this one uses {what}" in message and message.endswith("; a .pt2 file takes any")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["gelu", "sum", "shape", "normalize", "add_", "[0]", "no embeddings"])
def test_export_takes_what_the_numpy_form_has_not(what, tmp_path):
    transformation = Own(UNKNOWN[what]).eval()
    embeddings = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    expected = transformation(embeddings)
    torch.testing.assert_close(through_export(transformation, tmp_path, embeddings), expected, rtol=1e-5, atol=1e-5)


def in_place_on_what_is_read_later(own, embeddings):
    hidden = own.linear(embeddings) - 3
    return F.relu(hidden, inplace=True) + hidden


@pytest.mark.parametrize("function", [in_place_on_what_is_read_later, lambda own, e: e + torch.randn(6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_numpy_gives_otherwise_is_not_written(function, dtype, tmp_path):
    path = tmp_path / "map.npz"
    save_numpy(LinearTransformation(2, 2), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"transformation must give the same in NumPy, got another output .* in place"):
        save_numpy(Own(function).to(dtype), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_diverged_transformation(tmp_path):
    transformation = LinearTransformation(2, 2)
    torch.nn.init.constant_(transformation.linear.bias, float("nan"))
    with pytest.raises(ValueError, match=r"transformation's output for random rows must be finite, row 0 has a NaN"):
        save_numpy(transformation, tmp_path / "map.npz")


def test_program_is_folded(tmp_path):
    save_numpy(build("fct"), tmp_path / "map.npz")
    with np.load(tmp_path / "map.npz") as file:
        program = json.loads(str(file["program"]))
    layer = ["matmul", "add", "relu"]
    assert [step["op"] for step in program["steps"]] == [*(layer * 4), "cat", *(layer * 2), "matmul", "add"]


@pytest.mark.parametrize("suffix", ["pt2", "npz"])
def test_export_writes_the_form_that_the_suffix_names(suffix, tmp_path):
    transformation, rows = LinearTransformation(3, 2), torch.randn(5, 3)
    path = tmp_path / f"map.{suffix}"
    transformation.export(path)
    served = torch.export.load(path).module() if suffix == "pt2" else NumpyTransformation(path)
    found = served(rows) if suffix == "pt2" else torch.from_numpy(served(rows.numpy()))
    torch.testing.assert_close(found, transformation(rows))
    with pytest.raises(ValueError, match=r"path must end in \.pt2 or \.npz, got .*map\.onnx"):
        transformation.export(tmp_path / "map.onnx")
