"""What every transformation has to do, whatever it computes."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pml_compat._files import save_tensors
from pml_compat.transformations import LinearTransformation, Transformation, TransformationChain, load_transformation
from tests.transformations.cases import TRANSFORMATIONS, batch, build

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


@every_transformation
def test_widths(name):
    transformation = build(name)
    out = transformation(*batch(transformation))
    assert out.shape == (5, transformation.out_features)


@every_transformation
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(name, training):
    transformation = build(name).double().train(training)
    embeddings, side_info = batch(transformation)
    embeddings = embeddings.double().requires_grad_()
    # PReLU has a corner at 0; the other layers are smooth
    assert torch.autograd.gradcheck(lambda e: transformation(e, side_info), (embeddings,), eps=1e-7, atol=1e-4)


@every_transformation
def test_every_parameter_receives_a_gradient(name):
    transformation = build(name).train()
    transformation(*batch(transformation)).square().sum().backward()
    for key, parameter in transformation.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@every_transformation
def test_rows_are_mapped_one_by_one(name):
    transformation = build(name)
    embeddings, side_info = batch(transformation, n=4)
    rows = [
        transformation(embeddings[i : i + 1], None if side_info is None else side_info[i : i + 1]) for i in range(4)
    ]
    torch.testing.assert_close(torch.cat(rows), transformation(embeddings, side_info))


@every_transformation
@pytest.mark.parametrize("training", [False, True])
def test_one_row(name, training):
    transformation = build(name).train(training)
    assert torch.isfinite(transformation(*batch(transformation, n=1))).all()


@every_transformation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_embeddings(name, dtype):
    transformation = build(name)
    embeddings, side_info = batch(transformation)
    out = transformation(embeddings.to(dtype), side_info)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), transformation(embeddings, side_info), rtol=0.05, atol=0.05)


@every_transformation
def test_autocast(name):
    transformation = build(name)
    expected = transformation(*batch(transformation))
    with torch.autocast("cpu", torch.bfloat16):
        out = transformation(*batch(transformation))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    assert {p.dtype for p in transformation.parameters()} == {torch.float32}


@every_transformation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(name, dtype, tmp_path):
    transformation = build(name).to(dtype).train()
    transformation.save(tmp_path / "map.safetensors")
    loaded = load_transformation(tmp_path / "map.safetensors")
    assert type(loaded) is type(transformation) and not loaded.training
    assert loaded.config() == transformation.config()
    embeddings, side_info = batch(transformation)
    torch.testing.assert_close(loaded(embeddings, side_info), transformation.eval()(embeddings, side_info))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@every_transformation
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(name, duplicate):
    transformation = build(name)
    torch.testing.assert_close(
        duplicate(transformation)(*batch(transformation)), transformation(*batch(transformation))
    )


@every_transformation
def test_state_dict_round_trip(name):
    source, target = build(name, seed=0), build(name, seed=1)
    assert not torch.allclose(source(*batch(source)), target(*batch(target)))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(source(*batch(source)), target(*batch(target)))


@every_transformation
def test_wrong_inputs(name):
    transformation = build(name)
    embeddings, side_info = batch(transformation)
    width = transformation.in_features
    with pytest.raises(ValueError, match=rf"embeddings must be {width} wide, got width {width + 1}"):
        transformation(torch.ones(2, width + 1), side_info)
    with pytest.raises(ValueError, match=r"embeddings must be 2-dimensional"):
        transformation(embeddings[0], side_info)
    with pytest.raises(ValueError, match=r"embeddings must not be empty"):
        transformation(embeddings[:0], side_info)
    with pytest.raises(ValueError, match=r"embeddings must be floating point"):
        transformation(embeddings.long(), side_info)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the \w+: got meta and cpu"):
        transformation(embeddings.to("meta"), side_info)
    if side_info is None:
        with pytest.raises(ValueError, match=r"side_info must be None for this \w+, got shape \(5, 2\)"):
            transformation(embeddings, torch.ones(5, 2))


@every_transformation
def test_shows_its_widths(name):
    transformation = build(name)
    assert f"in_features={transformation.in_features}, out_features={transformation.out_features}" in repr(
        transformation
    )


def test_a_file_that_is_cut_short(tmp_path):
    path = tmp_path / "map.safetensors"
    LinearTransformation(3, 3).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file, '.*map.safetensors' is not"):
        load_transformation(path)


def test_a_file_of_something_else(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must be a file written by a transformation's .save, .* holds \['weight'\]"):
        load_transformation(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        load_transformation(tmp_path / "none.safetensors")


def test_a_file_of_an_unknown_class(tmp_path):
    path = tmp_path / "map.safetensors"
    LinearTransformation(3, 3).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["transformation"])
    metadata["transformation"] = json.dumps({**description, "class": "Elsewhere"})
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"whose class is imported, got 'Elsewhere'; import the module .*Linear"):
        load_transformation(path)


def test_an_interrupted_save_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "map.safetensors"
    LinearTransformation(3, 3).save(path)
    before = path.read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pml_compat._files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LinearTransformation(4, 4).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


class Doubling(Transformation):
    """A user's own."""

    def __init__(self, features):
        super().__init__(features, features, side_features=2)
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def transform(self, embeddings, side_info):
        return embeddings * self.factor + side_info.sum(1, keepdim=True)

    def config(self):
        return {"features": self.in_features}


def test_a_transformation_of_ones_own_with_side_information(tmp_path):
    transformation = Doubling(3)
    embeddings, side_info = batch(transformation)
    expected = 2 * embeddings + side_info.sum(1, keepdim=True)
    torch.testing.assert_close(transformation(embeddings, side_info), expected)
    torch.testing.assert_close(transformation(embeddings, side_info.double()), expected)
    transformation.save(tmp_path / "own.safetensors")
    torch.testing.assert_close(load_transformation(tmp_path / "own.safetensors")(embeddings, side_info), expected)
    with pytest.raises(ValueError, match=r"side_info must be given, \(N, 2\) for this Doubling, got None"):
        transformation(embeddings)
    with pytest.raises(ValueError, match=r"side_info must be 2 wide, got width 3"):
        transformation(embeddings, torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"side_info must have one row an embedding: expected 5, got 4"):
        transformation(embeddings, side_info[:4])


def test_chain_takes_side_information_side_by_side():
    chain = TransformationChain(Doubling(3), LinearTransformation(3, 3), Doubling(3))
    assert (chain.in_features, chain.out_features, chain.side_features) == (3, 3, 4)
    embeddings, side_info = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 10.0, 0.0], [0.0, 2.0, 0.0, 20.0]])
    # (2 * 1 + 1) * 2 + 10 and (2 * 1 + 2) * 2 + 20
    torch.testing.assert_close(chain(embeddings, side_info), torch.tensor([[16.0] * 3, [28.0] * 3]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"transformations must not be empty"),
        ((torch.nn.Linear(2, 2),), r"transformations must be Transformations, got Linear"),
        (
            (LinearTransformation(2, 3), LinearTransformation(4, 2)),
            r"transformations must fit each other: number 0 gives width 3, number 1 takes 4",
        ),
    ],
)
def test_chains_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        TransformationChain(*parts)


@pytest.mark.parametrize("width", [0, -1, 2.0, True, "3", None])
def test_widths_that_are_none(width):
    with pytest.raises(ValueError, match=r"in_features must be an integer of at least 1, got"):
        LinearTransformation(width, 3)


def test_numpy_integers_are_widths():
    assert LinearTransformation(np.int64(2), np.int64(3)).config() == {
        "in_features": 2,
        "out_features": 3,
        "bias": True,
    }


@every_transformation
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(name):
    transformation = build(name)
    embeddings, side_info = batch(transformation)
    expected = transformation(embeddings, side_info)
    out = transformation.cuda()(embeddings.cuda(), None if side_info is None else side_info.cuda())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)


def saved(path, tensors, **metadata):
    save_tensors(path, tensors, {"format": "pml_compat.Transformation/1", **metadata})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no description", "does not say which one it holds"),
        ("half a description", "does not say which one it holds"),
        ("a list", "does not say which one it holds"),
        ("other settings", "must hold a LinearTransformation of this version, its settings are others"),
        ("another width", "must hold the parameters of the LinearTransformation that it describes"),
        ("a folder", "is a folder"),
    ],
)
def test_a_file_that_is_no_transformation(kind, message, tmp_path):
    path, weight = tmp_path / "map.safetensors", {"linear.weight": torch.ones(3, 4), "linear.bias": torch.zeros(3)}
    config = LinearTransformation(4, 3).config()
    if kind == "no description":
        saved(path, weight)
    elif kind == "half a description":
        saved(path, weight, transformation='{"class": "Lin')
    elif kind == "a list":
        saved(path, weight, transformation="[1, 2]")
    elif kind == "other settings":
        saved(path, weight, transformation=json.dumps({"class": "LinearTransformation", "config": {"depth": 3}}))
    elif kind == "another width":
        weight["linear.weight"] = torch.ones(3, 9)
        saved(path, weight, transformation=json.dumps({"class": "LinearTransformation", "config": config}))
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=message):
        load_transformation(path)
