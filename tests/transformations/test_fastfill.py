import math

import numpy as np
import pytest
import torch

from pml_compat.frozen import FrozenClassifier
from pml_compat.losses import FastFillLoss, FCTLoss
from pml_compat.transformations import (
    FastFillTransformation,
    FCTTransformation,
    LinearTransformation,
    NumpyTransformation,
    TransformationChain,
    fit_transformation,
    load_transformation,
)
from pml_compat.transformations.fastfill import gaussian_losses
from pml_compat.transformations.serving import save_numpy
from pml_compat.upgrade import backfill_curve
from tests import reference
from tests.pairwise import pairwise
from tests.transformations.cases import batch, build

every_fastfill = pytest.mark.parametrize("name", ["fastfill", "fastfill_side"])


def given(rows, dtype):
    return [None if values is None else values.to(dtype) for values in rows]


# --- the layers


@pairwise
@every_fastfill
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_matches_the_formula(name, seed, training):
    transformation = build(name, seed).double().train(training)
    old, side_info = given(batch(transformation, 6, seed), torch.double)
    state = {key.removeprefix("layers."): value.numpy().copy() for key, value in transformation.state_dict().items()}
    side = old if side_info is None else side_info
    expected = reference.fct_transformation(old.numpy(), side.numpy(), state, training)
    mapped, log_variance = transformation.with_log_variance(old, side_info)
    np.testing.assert_allclose(mapped.detach(), expected[:, :3], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_variance.detach(), expected[:, 3], rtol=1e-9, atol=1e-9)
    assert log_variance.abs().max() < 10


@every_fastfill
def test_the_layers_are_those_of_fct_but_for_one_output(name):
    transformation, fct = build(name), build(name.replace("fastfill", "fct"))
    shapes = {key: tuple(value.shape) for key, value in fct.state_dict().items()}
    assert {key.removeprefix("layers."): tuple(value.shape) for key, value in transformation.state_dict().items()} == {
        **shapes,
        "mix.6.weight": (4, 6),
        "mix.6.bias": (4,),
    }
    assert transformation.config() == fct.config() | {"variance_gradient": True}


@every_fastfill
def test_h_is_what_a_call_gives(name):
    transformation = build(name)
    rows = batch(transformation)
    mapped, log_variance = transformation.with_log_variance(*rows)
    assert mapped.equal(transformation(*rows)) and mapped.shape == (5, 3) and log_variance.shape == (5,)


@every_fastfill
@pytest.mark.parametrize(("bias", "expected"), [(100.0, 10.0), (-100.0, -10.0)])
def test_bounds(name, bias, expected):
    transformation = build(name)
    with torch.no_grad():
        transformation.layers.mix[-1].bias[-1] = bias
    rows = batch(transformation)
    assert transformation.with_log_variance(*rows)[1].tolist() == [expected] * 5
    assert transformation.uncertainty(*rows, progress=False).tolist() == [expected] * 5


@every_fastfill
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_both_outputs(name, training):
    transformation = build(name).double().train(training)
    inputs = [rows.double().requires_grad_() for rows in batch(transformation) if rows is not None]
    assert torch.autograd.gradcheck(transformation.with_log_variance, inputs, eps=1e-7, atol=1e-4)


def test_without_its_gradient_the_variance_is_the_same_and_leaves_the_map_alone():
    torch.manual_seed(0)
    shared, apart = FastFillTransformation(4, 3, 2, 6), FastFillTransformation(4, 3, 2, 6, variance_gradient=False)
    apart.load_state_dict(shared.state_dict())
    inputs = torch.randn(5, 4), torch.randn(5, 2)
    outputs = [transformation.with_log_variance(*inputs) for transformation in (shared, apart)]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    for (mapped, log_variance), leaves in zip(outputs, (False, True), strict=True):
        transformation = apart if leaves else shared
        first = transformation.layers.old_branch[0].weight
        (gradient,) = torch.autograd.grad(log_variance.sum(), first, retain_graph=True, allow_unused=True)
        assert (gradient is None) == leaves
        assert torch.autograd.grad(mapped.sum(), first)[0].abs().sum() > 0
    assert apart.config()["variance_gradient"] is False


@every_fastfill
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_both_outputs_have_the_dtype_of_the_embeddings(name, dtype):
    transformation = build(name)
    old, side_info = batch(transformation)
    expected = transformation.with_log_variance(old, side_info)
    found = transformation.with_log_variance(old.to(dtype), side_info)
    for out, value in zip(found, expected, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), value, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        low = transformation.with_log_variance(old, side_info)
    assert {out.dtype for out in low} == {torch.float32}
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.1)


@every_fastfill
@pytest.mark.parametrize("training", [False, True])
def test_one_row_gets_the_running_statistics(name, training):
    transformation = build(name)
    row = batch(transformation, n=1)
    expected = transformation.with_log_variance(*row)
    torch.testing.assert_close(transformation.train(training).with_log_variance(*row), expected)


# --- the forms that every transformation has, with the log variance where they keep it


@every_fastfill
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    transformation = build(name)
    transformation.save(tmp_path / "fastfill.safetensors")
    loaded = load_transformation(tmp_path / "fastfill.safetensors")
    assert isinstance(loaded, FastFillTransformation) and loaded.config() == transformation.config()
    rows = batch(transformation)
    for found, expected in zip(loaded.with_log_variance(*rows), transformation.with_log_variance(*rows), strict=True):
        assert found.equal(expected)


@every_fastfill
def test_folded(name):
    transformation = build(name).double()
    folded = transformation.folded()
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in folded.modules())
    rows = given(batch(transformation), torch.double)
    torch.testing.assert_close(folded.with_log_variance(*rows), transformation.with_log_variance(*rows))
    torch.testing.assert_close(
        folded.uncertainty(*rows, progress=False), transformation.uncertainty(*rows, progress=False)
    )


@every_fastfill
def test_numpy_form_is_that_of_h(name, tmp_path):
    transformation = build(name)
    save_numpy(transformation, tmp_path / "fastfill.npz")
    rows = batch(transformation)
    result = NumpyTransformation(tmp_path / "fastfill.npz")(*(values.numpy() for values in rows if values is not None))
    torch.testing.assert_close(torch.from_numpy(result), transformation(*rows).detach(), rtol=1e-5, atol=1e-5)


def test_in_a_chain():
    fastfill, linear = build("fastfill_side"), LinearTransformation(3, 2)
    rows = batch(fastfill)
    chain = TransformationChain(fastfill, linear).eval()
    torch.testing.assert_close(chain(*rows), linear(fastfill(*rows)))


# --- a whole gallery


@pairwise
@every_fastfill
@pytest.mark.parametrize("batch_size", [1, 4, 8192])
@pytest.mark.parametrize("training", [False, True])
def test_uncertainty_of_a_gallery(name, batch_size, training):
    transformation = build(name)
    rows = batch(transformation, n=9)
    expected = transformation.with_log_variance(*rows)[1].detach()
    transformation.train(training)
    before = {key: value.clone() for key, value in transformation.state_dict().items()}
    scores = transformation.uncertainty(*rows, batch_size, progress=False)
    torch.testing.assert_close(scores, expected)
    assert scores.dtype == torch.float32 and not scores.requires_grad and not scores.is_inference()
    assert transformation.training == training
    assert all(value.equal(before[key]) for key, value in transformation.state_dict().items())
    assert all(parameter.requires_grad for parameter in transformation.parameters())


def test_uncertainty_of_arrays_and_memory_maps(tmp_path):
    transformation = build("fastfill_side").double()
    rows = [values.numpy() for values in batch(transformation, n=9)]
    maps = []
    for i, values in enumerate(rows):
        np.save(tmp_path / f"{i}.npy", values)
        maps.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    expected = transformation.uncertainty(*batch(transformation, n=9), progress=False)
    assert expected.dtype == torch.float32
    assert transformation.uncertainty(*rows, progress=False).equal(expected)
    assert transformation.uncertainty(*maps, batch_size=2, progress=False).equal(expected)


def test_uncertainty_shows_its_progress(capsys):
    transformation = build("fastfill")
    transformation.uncertainty(batch(transformation)[0])
    assert "transform" in capsys.readouterr().err


# --- the likelihood


def test_likelihood_by_hand():
    """Squared errors of 25 and 0 in two coordinates at variances 2 and e^-4: (25 / 4 + log 2) / 2 and -4 / 2."""
    mapped, target = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    losses = gaussian_losses(mapped, target, torch.tensor([math.log(2.0), -4.0]))
    assert losses.tolist() == pytest.approx([3.125 + math.log(2.0) / 2, -2.0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_likelihood_is_that_of_the_distribution(seed):
    generator = torch.Generator().manual_seed(seed)
    mapped, target = torch.randn(2, 7, 5, generator=generator, dtype=torch.double)
    log_variance = torch.randn(7, generator=generator, dtype=torch.double)
    normal = torch.distributions.Normal(mapped, (log_variance / 2).exp()[:, None])
    expected = -normal.log_prob(target).mean(1) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(gaussian_losses(mapped, target, log_variance), expected)


def test_the_best_prediction_is_the_mean_squared_error():
    mapped, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    best = torch.tensor([math.log(12.5)], requires_grad=True)
    loss = gaussian_losses(mapped, target, best)
    loss.sum().backward()
    assert best.grad.item() == pytest.approx(0.0, abs=1e-6)
    for other in (best - 0.1, best + 0.1):
        assert gaussian_losses(mapped, target, other) > loss


# --- training

CLASSES = 10


def gallery_data(n, seed):
    """Return old and new embeddings, labels; the last old coordinate tells how much noise is on the others."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % CLASSES
    new = centers[labels] + 0.2 * torch.randn(n, 6, generator=generator)
    noise = 3.0 * torch.rand(n, 1, generator=generator) ** 2
    old = new.flip(1) + noise * torch.randn(n, 6, generator=generator)
    return torch.cat([old, noise], dim=1), new, labels


def fitted(loss=None, n=1500, **kwargs):
    torch.manual_seed(0)
    transformation = FastFillTransformation(7, 6, hidden_features=32)
    old, new, labels = gallery_data(n, seed=0)
    options = {"epochs": 15, "batch_size": 100, "lr": 5e-3, "progress": False, **kwargs}
    return transformation, fit_transformation(transformation, old, new, labels=labels, loss=loss, **options)


@pytest.fixture(scope="module", params=["default", "classifier"])
def trained(request):
    centers = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(99))
    classifier = FrozenClassifier(centers, kind="cosine", scale=10.0)
    return fitted(None if request.param == "default" else FastFillLoss(classifier, 0.2))


def spearman(one, other):
    ranks = [torch.argsort(torch.argsort(values)).double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_the_prediction_ranks_the_error_of_rows_not_trained_on(trained):
    transformation, history = trained
    assert history["train_loss"][-1] < history["train_loss"][0]
    old, new, _ = gallery_data(600, seed=1)
    errors = (transformation(old) - new).norm(dim=1).detach()
    log_variance = transformation.uncertainty(old, progress=False)
    assert spearman(log_variance, errors) > 0.5
    # and not only the order: the mean squared error of the surer half is what it says, roughly
    surer = log_variance < log_variance.median()
    predicted, found = log_variance.exp(), errors.square() / 6
    assert found[surer].mean() < 0.5 * found[~surer].mean()
    assert float(found.mean() / predicted.mean()) == pytest.approx(1.0, abs=0.6)


def test_a_backfill_in_its_order_beats_a_random_one(trained):
    transformation, _ = trained
    old, new, labels = gallery_data(400, seed=2)
    _, query, query_labels = gallery_data(200, seed=3)
    mapped, scores = transformation.apply_to(old, progress=False), transformation.uncertainty(old, progress=False)

    def area(order, seed=0):
        curve = backfill_curve(query, query_labels, mapped, new, labels, order=order, seed=seed)
        return curve.area("mean_average_precision")

    by_chance = [area("random", seed) for seed in range(3)]
    assert area(scores) > max(by_chance) + 0.02 and area(-scores) < min(by_chance)


def test_the_default_is_the_fastfill_loss():
    options = {"n": 60, "epochs": 3, "batch_size": 20, "validation": 0.2}
    (plain, history), (with_loss, of_loss) = fitted(**options), fitted(FastFillLoss(), **options)
    assert of_loss == {key: pytest.approx(value, rel=1e-4) for key, value in history.items()}
    torch.testing.assert_close(plain.state_dict(), with_loss.state_dict(), rtol=1e-3, atol=1e-4)
    assert len(history["validation_loss"]) == 3


@pytest.mark.parametrize("loss", [None, FastFillLoss()])
def test_validation_measures_the_likelihood(loss):
    """A rate of nearly 0 keeps the map still; the weighted mean over two batches is that over all held-out rows."""
    options = {"n": 40, "epochs": 1, "batch_size": 6, "lr": 1e-12, "validation": 0.25, "freeze_norm_at": 0.0}
    transformation, history = fitted(loss, **options)
    old, new, _ = gallery_data(40, seed=0)
    losses = gaussian_losses(transformation(old), new, transformation.with_log_variance(old)[1]).detach()
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:10]
    assert history["validation_loss"][0] == pytest.approx(losses[held_out].mean().item(), rel=1e-4)
    assert not torch.isclose(losses[held_out].mean(), losses.mean(), rtol=1e-4)


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    options = {"n": 60, "epochs": 3, "batch_size": 20, "checkpoint": tmp_path / "fit.safetensors"}
    (first, history), (second, same) = fitted(**options), fitted(**options)
    assert history == same
    assert all(value.equal(second.state_dict()[key]) for key, value in first.state_dict().items())


def test_without_a_target_the_loss_still_gets_the_prediction():
    seen = []

    def loss(mapped, labels, log_var):
        seen.append((mapped.shape, log_var.shape))
        return mapped.square().mean() + log_var.square().mean()

    transformation = build("fastfill_side")
    fit_transformation(transformation, batch(transformation)[0], None, batch(transformation)[1], loss=loss, epochs=1)
    assert seen == [((5, 3), (5,))]


def test_in_a_chain_h_alone_is_trained():
    """A chain predicts no error, so that it is regressed as ever."""
    chain = TransformationChain(LinearTransformation(7, 7), FastFillTransformation(7, 6, hidden_features=8))
    old, new, _ = gallery_data(40, seed=0)
    history = fit_transformation(chain, old, new, loss=FCTLoss(), epochs=2, progress=False)
    assert min(history["train_loss"]) > 0


# --- bad inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), r"in_features must be an integer of at least 1, got 0"),
        ((4, -1), r"out_features must be an integer of at least 1, got -1"),
        ((4, 3, 0), r"side_features must be an integer of at least 1, got 0"),
        ((4, 3, None, 0), r"hidden_features must be an integer of at least 1, got 0"),
    ],
)
def test_bad_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        FastFillTransformation(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda old, side: (old, None), r"side_info must be given, \(N, 5\) for this \w+, got None"),
        (lambda old, side: (old[:, 1:], side), r"embeddings must be 4 wide, got width 3"),
        (lambda old, side: (old, side[:, 1:]), r"side_info must be 5 wide, got width 4"),
        (lambda old, side: (old, side[1:]), r"side_info must have one row an embedding: expected 5, got 4"),
        (lambda old, side: (old.long(), side), r"embeddings must be floating point, got torch.int64"),
    ],
)
def test_bad_calls(change, message):
    transformation = build("fastfill_side")
    with pytest.raises(ValueError, match=message):
        transformation.with_log_variance(*change(*batch(transformation)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda old, side: (old, side[1:]), r"side_info must have one row an embedding: expected 5, got 4"),
        (lambda old, side: (old[:, 1:], side), r"source must be 4 wide, got width 3"),
        (lambda old, side: (old / (torch.arange(5.0)[:, None] != 3), side), r"source must be finite, row 3 has"),
        (lambda old, side: (old, side, 0), r"batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_galleries(change, message):
    transformation = build("fastfill_side")
    with pytest.raises(ValueError, match=message):
        transformation.uncertainty(*change(*batch(transformation)), progress=False)


def test_fct_predicts_no_error():
    assert not hasattr(FCTTransformation(4, 3, hidden_features=5), "with_log_variance")


@every_fastfill
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(name):
    transformation = build(name)
    rows = batch(transformation)
    expected = transformation.uncertainty(*rows, progress=False)
    scores = transformation.cuda().uncertainty(*rows, progress=False)
    assert scores.device.type == "cpu"
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
