import numpy as np
import pytest
import torch

from pml_compat.transformations import FCTTransformation, TransformationChain, load_transformation
from pml_compat.transformations.batch_norm import BatchNorm, fold_batch_norm
from tests import reference
from tests.pairwise import pairwise
from tests.transformations.cases import batch, build

every_fct = pytest.mark.parametrize("name", ["fct", "fct_side"])


@pairwise
@every_fct
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_matches_the_formula(name, seed, training):
    transformation = build(name, seed).double().train(training)
    torch.nn.init.constant_(transformation.mix[-1].bias, -1.0)
    old, side_info = (None if rows is None else rows.double() for rows in batch(transformation, 6, seed))
    state = {key: tensor.numpy().copy() for key, tensor in transformation.state_dict().items()}
    side = old if side_info is None else side_info
    expected = reference.fct_transformation(old.numpy(), side.numpy(), state, training)
    np.testing.assert_allclose(transformation(old, side_info).detach(), expected, rtol=1e-9, atol=1e-9)
    assert expected.min() < 0  # no ReLU at the end


def test_parameters():
    """At 128, 128, 128: the weights of seven linear layers, two of each norm's units, the last bias."""
    transformation = FCTTransformation(128, 128, side_features=128)
    count = sum(parameter.numel() for parameter in transformation.parameters())
    branch = 128 * 256 + 256 * 256
    assert count == 2 * branch + 512 * 2048 + 2048 * 2048 + 2048 * 128 + 2 * (4 * 256 + 2 * 2048) + 128 == 5_712_000
    linear = {key: layer.bias for key, layer in transformation.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert [key for key, bias in linear.items() if bias is not None] == ["mix.6"]


def test_widths_of_the_layers():
    """Branches d -> 2 d -> 2 d_new, then 4 d_new -> hidden -> hidden -> d_new."""
    weights = {key: tuple(p.shape) for key, p in FCTTransformation(4, 3, 5, 7).named_parameters() if p.ndim == 2}
    assert weights == {
        "old_branch.0.weight": (8, 4),
        "old_branch.3.weight": (6, 8),
        "side_branch.0.weight": (10, 5),
        "side_branch.3.weight": (6, 10),
        "mix.0.weight": (7, 12),
        "mix.3.weight": (7, 7),
        "mix.6.weight": (3, 7),
    }


@pytest.mark.parametrize("training", [False, True])
def test_without_side_information_the_old_embedding_feeds_both_branches(training):
    without = build("fct").train(training)
    with_side = FCTTransformation(4, 3, side_features=4, hidden_features=6).train(training)
    with_side.load_state_dict(without.state_dict())
    old, _ = batch(without)
    assert without(old).equal(with_side(old, old))


def convolutions(layers):
    """Return the same layers for images, and copy what is in them."""
    copies = []
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            copy = torch.nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
            state = layer.state_dict()
            copy.load_state_dict({**state, "weight": state["weight"][:, :, None, None]})
        elif isinstance(layer, torch.nn.BatchNorm1d):
            copy = torch.nn.BatchNorm2d(layer.num_features)
            copy.load_state_dict(layer.state_dict())
        else:
            copy = torch.nn.ReLU()
        copies.append(copy)
    return torch.nn.Sequential(*copies)


@pytest.mark.parametrize("training", [False, True])
def test_is_the_network_of_1x1_convolutions(training):
    transformation = build("fct_side").double().train(training)
    branches = (transformation.old_branch, transformation.side_branch, transformation.mix)
    one, two, mix = (convolutions(layers).double().train(training) for layers in branches)
    for seed in range(3):
        old, side_info = (rows.double() for rows in batch(transformation, seed=seed))
        images = mix(torch.cat([one(old[:, :, None, None]), two(side_info[:, :, None, None])], dim=1))
        torch.testing.assert_close(transformation(old, side_info), images[:, :, 0, 0])
    for layers, copies in zip(branches, (one, two, mix), strict=True):
        for layer, copy in zip(layers, copies, strict=True):
            if isinstance(layer, torch.nn.BatchNorm1d):
                torch.testing.assert_close(layer.running_mean, copy.running_mean)
                torch.testing.assert_close(layer.running_var, copy.running_var)
                assert int(copy.num_batches_tracked) == 3 * training


@every_fct
def test_gradcheck_of_both_inputs(name):
    transformation = build(name).double()
    inputs = [rows.double().requires_grad_() for rows in batch(transformation) if rows is not None]
    assert torch.autograd.gradcheck(transformation, inputs, eps=1e-7, atol=1e-4)


def test_side_information_is_used_row_by_row():
    transformation = build("fct_side")
    old, side_info = batch(transformation)
    other = side_info.clone()
    other[3] += 1
    changed = (transformation(old, other) != transformation(old, side_info)).any(1)
    assert changed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_side_information_of_another_dtype(dtype):
    transformation = build("fct_side")
    old, side_info = batch(transformation)
    out = transformation(old, side_info.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, transformation(old, side_info), rtol=1e-2, atol=1e-2)


@every_fct
def test_a_batch_of_one_gets_the_running_statistics_and_leaves_them(name):
    transformation = build(name)
    row = batch(transformation, n=1)
    expected = transformation(*row)
    before = {key: buffer.clone() for key, buffer in transformation.named_buffers()}
    assert transformation.train()(*row).equal(expected)
    assert all(buffer.equal(before[key]) for key, buffer in transformation.named_buffers())


@every_fct
@pytest.mark.parametrize("training", [False, True])
def test_folded(name, training):
    transformation = build(name).double().train(training)
    before = {key: tensor.clone() for key, tensor in transformation.state_dict().items()}
    folded = transformation.folded()
    assert transformation.training == training and not folded.training
    assert all(tensor.equal(before[key]) for key, tensor in transformation.state_dict().items())
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in folded.modules())
    assert sum(isinstance(layer, torch.nn.Linear) for layer in folded.modules()) == 7
    old, side_info = batch(transformation)
    old = old.double()
    expected = transformation.eval()(old, side_info)
    torch.testing.assert_close(folded(old, side_info), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        folded.mix[0].weight.zero_()
    assert transformation(old, side_info).equal(expected)  # nothing is shared


def test_fold_leaves_what_cannot_be_folded():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        BatchNorm(3),
        torch.nn.Linear(3, 4),
        torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), BatchNorm(4), BatchNorm(4)),
        torch.nn.ReLU(),
        BatchNorm(4),
        torch.nn.Linear(4, 2),
        torch.nn.BatchNorm1d(2, affine=False),
    ).double()
    for _ in range(3):
        layers(torch.randn(8, 3, dtype=torch.double) * 3 + 1)
    rows = torch.randn(5, 3, dtype=torch.double)
    expected = layers.eval()(rows)
    torch.testing.assert_close(fold_batch_norm(layers)(rows), expected)
    no_statistics = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2, track_running_stats=False))
    assert len(fold_batch_norm(no_statistics.eval())) == 2
    kinds = [type(layer).__name__ for layer in layers.modules() if not isinstance(layer, torch.nn.Sequential)]
    assert kinds == ["BatchNorm", "Linear", "Linear", "ReLU", "BatchNorm", "Linear", "BatchNorm1d"]


@every_fct
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    transformation = build(name)
    transformation.save(tmp_path / "fct.safetensors")
    loaded = load_transformation(tmp_path / "fct.safetensors")
    assert loaded.config() == transformation.config()
    assert loaded.config()["side_features"] == (5 if name == "fct_side" else None)
    assert loaded(*batch(transformation)).equal(transformation(*batch(transformation)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), r"in_features must be an integer of at least 1, got 0"),
        ((4, -1), r"out_features must be an integer of at least 1, got -1"),
        ((4, 3, 0), r"side_features must be an integer of at least 1, got 0"),
        ((4, 3, 2.0), r"side_features must be an integer of at least 1, got 2.0"),
        ((4, 3, None, 0), r"hidden_features must be an integer of at least 1, got 0"),
    ],
)
def test_bad_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        FCTTransformation(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda side: None, r"side_info must be given, \(N, 5\) for this FCTTransformation, got None"),
        (lambda side: side[:, :4], r"side_info must be 5 wide, got width 4"),
        (lambda side: side[:-1], r"side_info must have one row an embedding: expected 5, got 4"),
        (lambda side: side[:1], r"side_info must have one row an embedding: expected 5, got 1"),
        (lambda side: side[0], r"side_info must be 2-dimensional, \(N, D\), got shape \(5,\)"),
        (lambda side: side.long(), r"side_info must be floating point, got torch.int64"),
    ],
)
def test_bad_side_information(change, message):
    transformation = build("fct_side")
    old, side_info = batch(transformation)
    with pytest.raises(ValueError, match=message):
        transformation(old, change(side_info))


def test_a_folded_one_is_not_saved(tmp_path):
    transformation = FCTTransformation(4, 3, hidden_features=5)
    for folded in (transformation.folded(), TransformationChain(transformation).folded()):
        with pytest.raises(ValueError, match=r"a folded .+ must not be saved, .+; save the transformation it was made"):
            folded.save(tmp_path / "folded.safetensors")
    transformation.save(tmp_path / "whole.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["whole.safetensors"]
