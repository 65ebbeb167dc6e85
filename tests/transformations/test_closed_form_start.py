"""Maps that start at the closed-form linear map, and what a training keeps of what it adds."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.regularizers import LpRegularizer

from pml_compat.losses import FCTLoss
from pml_compat.transformations import (
    FastFillTransformation,
    FCTTransformation,
    LinearTransformation,
    NumpyTransformation,
    ResidualBottleneckTransformation,
    Transformation,
    TransformationChain,
    fit_transformation,
    load_transformation,
)
from pml_compat.transformations.pairs import moments_of
from pml_compat.transformations.serving import export_transformation, save_numpy
from pml_compat.transformations.training_run import TrainingRun
from tests.transformations.test_fit import assert_same_state, copied, interrupt

MAPS = {
    "fct": lambda: FCTTransformation(6, 4, hidden_features=16),
    "fct_side": lambda: FCTTransformation(6, 4, side_features=3, hidden_features=16),
    "fastfill": lambda: FastFillTransformation(6, 4, hidden_features=16),
    "fastfill_side": lambda: FastFillTransformation(6, 4, 3, 16, variance_gradient=False),
    "residual": lambda: ResidualBottleneckTransformation(6, 4, 3, 2, 2),
    "residual_equal": lambda: ResidualBottleneckTransformation(6, 6, 3, 2, 2),
}
every_map = pytest.mark.parametrize("name", MAPS)
FAST = {"epochs": 6, "lr": 5e-3, "progress": False}


def data(name, n=200, seed=0, bent=True):
    """Return source, target and side-information; the target bends the source, and needs what the side tells."""
    transformation = MAPS[name]()
    torch.manual_seed(seed)
    source = torch.randn(n, 6) @ torch.randn(6, 6) + 1
    side = torch.randn(n, 3) if transformation.side_features else None
    known = source if side is None else torch.cat([source, side], dim=1)
    target = known @ torch.randn(known.shape[1], transformation.out_features) + 0.5
    if bent:
        target = target + 3 * (known @ torch.randn(known.shape[1], transformation.out_features)).abs()
    return source, target, side


def together(source, side):
    return source if side is None else torch.cat([source, side], dim=1)


def unit_of(part):
    unit = (part - part.mean(0)).square().mean().sqrt()
    return unit if unit > 0 else 1.0


def closed_form(source, target, side):
    """Linear regression on the parts of the source, each in its own unit."""
    parts = [part / unit_of(part) for part in (source, side) if part is not None]
    known = torch.cat(parts, dim=1)
    return LinearTransformation(known.shape[1], target.shape[1]).fit(known, target)(known).detach()


def assert_closed_form(found, source, target, side, rtol=1e-5, atol=1e-4):
    """Side-information may be left out of it, where it costs more than it tells."""
    expected = [closed_form(source, target, part) for part in {id(part): part for part in (None, side)}.values()]
    assert any(torch.allclose(found, rows, rtol=rtol, atol=atol) for rows in expected)


def started(name, source, target, side, dtype=torch.float32):
    torch.manual_seed(1)
    transformation = MAPS[name]().to(dtype)
    assert transformation.start_from(moments_of([(together(source, side).double(), target.double())]))
    return transformation


def fitted(name, n=200, seed=0, bent=True, **kwargs):
    torch.manual_seed(1)
    transformation, rows = MAPS[name](), data(name, n, seed, bent)
    history = fit_transformation(transformation, *rows, **{**FAST, **kwargs})
    return transformation, rows, history


# --- the start


@every_map
@pytest.mark.parametrize("training", [False, True])
def test_the_start_is_the_closed_form(name, training):
    source, target, side = data(name)
    transformation = started(name, source, target, side).train(training)
    torch.testing.assert_close(transformation(source, side), closed_form(source, target, side), rtol=1e-5, atol=1e-4)


@every_map
@pytest.mark.parametrize(("n", "unit"), [(4, 1.0), (8, 1.0), (200, 1e-4), (200, 1e3)])
def test_the_start_with_few_rows_and_at_other_scales(name, n, unit):
    source, target, side = data(name, n)
    source, target, side = (None if part is None else part.double() for part in (source, target, side))
    transformation = started(name, unit * source, target, side, torch.double)
    assert_closed_form(transformation(unit * source, side), source, target, side, rtol=1e-3, atol=1e-3)


def test_side_information_that_tells_nothing_is_left_out():
    torch.manual_seed(0)
    source, side = torch.randn(40, 6), torch.randn(40, 20)
    target = source @ torch.randn(6, 4) + torch.randn(40, 4)
    transformation = FCTTransformation(6, 4, 20, 16)
    moments = moments_of([(torch.cat([source, side], dim=1).double(), target.double())])
    assert transformation.start_from(moments)
    torch.testing.assert_close(transformation(source, side), closed_form(source, target, None), rtol=1e-4, atol=1e-4)
    assert transformation.linear_path.weight[:, 6:].equal(torch.zeros(4, 20))


@every_map
def test_a_constant_source_or_target(name):
    source, target, side = data(name)
    constant = None if side is None else torch.ones_like(side)
    transformation = started(name, torch.ones_like(source), target, constant)
    out = transformation(torch.ones_like(source), constant)
    torch.testing.assert_close(out, target.mean(0).expand_as(out), rtol=1e-4, atol=1e-4)
    out = started(name, source, torch.ones_like(target), side)(source, side)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-4, atol=1e-4)


@every_map
def test_training_leaves_the_linear_path_and_moves_the_rest(name):
    source, target, side = data(name)
    transformation = started(name, source, target, side)
    before = copied(transformation)
    optimizer = torch.optim.SGD(transformation.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (transformation(source, side) - target).square().mean().backward()
        optimizer.step()
    after, linear = transformation.state_dict(), ("linear_path", "blocks.0.skip")
    for key, tensor in before.items():
        if any(part in key for part in linear):
            assert after[key].equal(tensor), key
    assert not transformation(source, side).equal(closed_form(source, target, side))
    assert (transformation.eval()(source, side) - target).isfinite().all()
    transformation.back_to_start()
    torch.testing.assert_close(transformation(source, side), closed_form(source, target, side), rtol=1e-5, atol=1e-4)


@every_map
def test_gradcheck(name):
    transformation, (source, _, side), _ = fitted(name, validation=0.0)
    inputs = [rows[:5].double().requires_grad_() for rows in (source, side) if rows is not None]
    assert torch.autograd.gradcheck(transformation.double(), inputs, eps=1e-7, atol=1e-3, rtol=1e-2)


@every_map
def test_a_trained_map_is_not_started_again(name):
    transformation, rows, _ = fitted(name, validation=0.0)
    before = copied(transformation)
    assert not transformation.start_from(moments_of([(together(rows[0], rows[2]).double(), rows[1].double())]))
    assert_same_state(transformation, before)
    torch.manual_seed(0)
    by_hand = MAPS[name]().train()
    by_hand(rows[0], rows[2])  # its norms have seen a batch
    assert not by_hand.start_from(moments_of([(together(rows[0], rows[2]).double(), rows[1].double())]))


def test_the_variance_starts_at_what_the_linear_map_leaves():
    for name in ("fastfill", "fastfill_side"):
        source, target, side = data(name)
        log_variance = started(name, source, target, side).with_log_variance(source, side)[1]
        left = (closed_form(source, target, side) - target).square().mean().log()
        torch.testing.assert_close(log_variance, left.expand(200), rtol=1e-4, atol=1e-4)


# --- the forms that every transformation has, with the linear path


@every_map
def test_saved_loaded_and_exported(name, tmp_path):
    transformation, (source, _, side), _ = fitted(name, validation=0.0)
    rows = [part for part in (source, side) if part is not None]
    expected = transformation(*rows).detach()
    transformation.save(tmp_path / "map.safetensors")
    assert load_transformation(tmp_path / "map.safetensors")(*rows).equal(expected)
    fresh = MAPS[name]()
    fresh.load_state_dict(transformation.state_dict())
    assert fresh.eval()(*rows).equal(expected)
    save_numpy(transformation, tmp_path / "map.npz")
    found = NumpyTransformation(tmp_path / "map.npz")(*(part.numpy() for part in rows))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if name in ("fct_side", "fastfill", "residual"):  # one of each kind: a program takes long to trace
        export_transformation(transformation, tmp_path / "map.pt2")
        program = torch.export.load(tmp_path / "map.pt2").module()
        torch.testing.assert_close(program(*rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transformation.folded()(*rows), expected, rtol=1e-4, atol=1e-4)
    chain = TransformationChain(transformation, LinearTransformation(transformation.out_features, 2)).eval()
    torch.testing.assert_close(chain(*rows), expected[:, :2])


def test_uncertainty_of_a_gallery_with_a_linear_path():
    for name in ("fastfill", "fastfill_side"):
        transformation, (source, _, side), _ = fitted(name, validation=0.0)
        scores = transformation.uncertainty(source, side, progress=False)
        torch.testing.assert_close(scores, transformation.with_log_variance(source, side)[1].detach())


@pytest.mark.parametrize("name", ["fct", "fct_side", "fastfill"])
def test_a_state_from_before_there_was_a_linear_path(name):
    torch.manual_seed(0)
    before, (source, target, side) = MAPS[name]().eval(), data(name)
    after = started(name, source, target, side).eval()
    after.load_state_dict(before.state_dict())
    assert after(source, side).equal(before(source, side))
    assert list(after.state_dict()) == list(before.state_dict())


# --- what is kept


@every_map
@pytest.mark.parametrize("n", [12, 200])
def test_an_exact_linear_map_stays_as_it_is(name, n):
    transformation, (source, target, side), history = fitted(name, n, bent=False)
    assert history["best_epoch"] == -1
    assert_closed_form(transformation(source, side), source, target, side)


@pytest.mark.parametrize(("name", "seed"), [(name, number % 3) for number, name in enumerate(MAPS)])
def test_a_target_that_has_nothing_to_do_with_the_source(name, seed):
    source, target, side = data(name, 60, seed)
    torch.manual_seed(seed)
    target = torch.randn_like(target)
    transformation = MAPS[name]()
    history = fit_transformation(transformation, source, target, side, **{**FAST, "epochs": 20})
    if history["best_epoch"] == -1:
        assert_closed_form(transformation(source, side), source, target, side)
    else:
        scores = history["validation_score"]
        assert scores[1 + history["best_epoch"]] == max(scores) > scores[0]


@every_map
def test_a_trained_map_that_gets_no_better_stays_as_it_was(name):
    transformation, (source, target, side), _ = fitted(name, validation=0.0)
    expected = transformation(source, side)
    history = fit_transformation(transformation, source, target, side, **{**FAST, "lr": 1.0})
    assert history["best_epoch"] == -1
    torch.testing.assert_close(transformation(source, side), expected)


@pytest.mark.parametrize("name", ["fct", "fct_side", "residual"])
def test_what_a_linear_map_cannot_is_learned_and_kept(name):
    transformation, (source, target, side), history = fitted(name, 400, epochs=30)
    assert history["best_epoch"] >= 0
    assert history["validation_score"][1 + history["best_epoch"]] == max(history["validation_score"])
    error = (transformation(source, side) - target).square().mean()
    assert error < 0.7 * (closed_form(source, target, side) - target).square().mean()


# --- rows drawn to their mean


@pytest.mark.parametrize("name", ["fct", "fct_side"])
@pytest.mark.parametrize("validation", [None, 0.0])
def test_what_was_trained_keeps_two_thirds_of_what_it_differs_by_from_the_mean(name, validation, monkeypatch):
    drawn, (source, target, side), history = fitted(name, validation=validation, epochs=30)
    monkeypatch.setattr(TrainingRun, "_shrink", lambda run: None)
    plain, *_ = fitted(name, validation=validation, epochs=30)
    assert history["best_epoch"] >= 0
    mean = target.mean(0)
    expected = mean + (plain(source, side) - mean) * 2 / 3
    torch.testing.assert_close(drawn(source, side), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "own"),
    [("fct", {"loss": FCTLoss()}), ("fastfill", {"validation": 0.0}), ("residual", {}), ("fct", {"bent": False})],
)
def test_other_losses_and_maps_and_the_closed_form_are_not_drawn_to_the_mean(name, own, monkeypatch):
    given, (source, _, side), history = fitted(name, **own)
    monkeypatch.setattr(TrainingRun, "_shrink", lambda run: None)
    plain, *_ = fitted(name, **own)
    assert (history["best_epoch"] == -1) == ("bent" in own)
    assert given(source, side).equal(plain(source, side))


@pytest.mark.parametrize("validation", [None, 0.0])
def test_a_drawn_map_that_goes_on_is_drawn_as_far_as_one_trained_at_once(validation, tmp_path):
    transformation, (source, target, side), _ = fitted("fct_side", validation=validation)
    expected = transformation(source, side).detach()
    transformation.save(tmp_path / "map.safetensors")
    transformation = load_transformation(tmp_path / "map.safetensors")
    for _ in range(3):
        little = {"epochs": 1, "lr": 1e-9, "freeze_norm_at": 0.0, "progress": False}
        fit_transformation(transformation, source, target, side, validation=validation, **little)
        torch.testing.assert_close(transformation(source, side), expected, rtol=1e-4, atol=1e-3)


def test_a_map_saved_before_it_was_kept_how_far_rows_are_drawn_is_loaded():
    transformation, (source, _, side), _ = fitted("fct_side")
    state = transformation.state_dict()
    older = {name: tensor for name, tensor in state.items() if not name.endswith((".mean", ".kept"))}
    assert len(older) == len(state) - 2
    loaded = MAPS["fct_side"]()
    loaded.load_state_dict(state)
    loaded.load_state_dict(older)
    assert loaded.eval()(source, side).equal(transformation(source, side))
    assert loaded.linear_path.kept == 1 and not loaded.linear_path.mean.any()


def test_a_drawn_map_is_saved_and_served_as_it_is(tmp_path):
    transformation, (source, _, side), _ = fitted("fct_side")
    transformation.save(tmp_path / "map.safetensors")
    expected = transformation(source, side).detach()
    torch.testing.assert_close(load_transformation(tmp_path / "map.safetensors")(source, side), expected)
    save_numpy(transformation, tmp_path / "map.npz")
    found = NumpyTransformation(tmp_path / "map.npz")(source.numpy(), side.numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_with_too_few_rows_to_tell_the_closed_form_is_kept(n):
    transformation, (source, target, side), history = fitted("fct_side", n)
    assert history["best_epoch"] == -1 and "validation_score" not in history
    assert_closed_form(transformation(source, side), source, target, side)


@pytest.mark.parametrize("classes", [1, 3, 30, 200])
def test_labels_of_any_number_of_classes(classes):
    labels = torch.arange(200) % classes
    _, _, history = fitted("fct", labels=labels)
    assert len(history["validation_score"]) == 7 and len(history["train_loss"]) == 6


def test_few_classes_are_judged_by_what_the_new_model_says():
    """Of three classes nearly all that is found is right, whatever the map."""
    labels = torch.arange(200) % 3
    assert fitted("fct", labels=labels)[2] == fitted("fct")[2]
    assert fitted("fct", labels=torch.arange(200) % 30)[2] != fitted("fct")[2]


@pytest.mark.parametrize("own_loss", [False, True])
def test_classes_are_left_out_where_the_loss_is_ours(own_loss):
    """A contrast by labels may be for just these classes."""
    labels, seen = torch.arange(200) % 25, []

    class Watched(FCTTransformation):
        def transform(self, embeddings, side_info):
            if self.training:
                seen.append(embeddings.clone())
            return super().transform(embeddings, side_info)

    source, target, _ = data("fct")
    loss = FCTLoss(0.1, 0.1) if own_loss else None
    fit_transformation(Watched(6, 4, hidden_features=8), source, target, labels=labels, loss=loss, **FAST)
    trained = (torch.cat(seen)[:, None] == source).all(2).any(0)
    assert len(torch.unique(labels[trained])) == (25 if own_loss else 22)
    assert int(trained.sum()) == (180 if own_loss else 22 * 8)


def test_a_split_of_ones_own_keeps_the_closed_form_where_its_loss_is_lowest():
    _, _, history = fitted("fct", bent=False, validation=0.2, lr=0.5, loss=FCTLoss())
    assert history["best_epoch"] == -1 and len(history["validation_loss"]) == 6


def test_memory_maps_give_what_tensors_give(tmp_path):
    rows, maps = data("fct_side"), []
    for number, part in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", part.numpy())
        maps.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    states = []
    for arrays in (rows, maps):
        torch.manual_seed(1)
        transformation = MAPS["fct_side"]()
        fit_transformation(transformation, *arrays, **FAST)
        states.append(copied(transformation))
    assert_same_state(transformation, states[0])


# --- the steps


@pytest.mark.parametrize(("n", "largest"), [(40, 20), (2720, 340), (20000, 1000)])
def test_few_rows_are_passed_often(n, largest):
    calls, steps = [], 500

    def loss(mapped, labels=None, *, ref_emb):
        calls.append(len(mapped))
        if len(calls) > 700:
            raise KeyboardInterrupt
        return mapped.sum() * 0

    fit_transformation(LinearTransformation(2, 2), torch.ones(n, 2), torch.ones(n, 2), loss=loss, progress=False)
    assert steps <= len(calls) <= 1.05 * steps and max(calls) == largest


# --- checkpoints and seeds


def run(path=None, name="fct_side", **kwargs):
    transformation, _, history = fitted(name, checkpoint=path, **kwargs)
    return transformation, history


@pytest.mark.parametrize(
    ("name", "labelled"), [("fct_side", False), ("fct_side", True), ("fastfill", True), ("residual", False)]
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(name, labelled, tmp_path, monkeypatch):
    options = {"name": name, "labels": torch.arange(200) % 25 if labelled else None}
    whole, history = run(**options)
    monkeypatch.setattr(TrainingRun, "_loss", _stop_after(12))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "fit.safetensors", **options)
    monkeypatch.undo()
    resumed, resumed_history = run(tmp_path / "fit.safetensors", **options)
    assert resumed_history == history
    assert_same_state(resumed, copied(whole))


def _stop_after(calls):
    original, left = TrainingRun._loss, [calls]

    def loss(self, index):
        left[0] -= 1
        return interrupt() if left[0] < 0 else original(self, index)

    return loss


@pytest.mark.parametrize("changed", [0, 1, 2, "labels", "view"])
def test_a_checkpoint_of_other_data_of_the_same_length(changed, tmp_path):
    options = {"checkpoint": tmp_path / "fit.safetensors", "labels": torch.zeros(200).long()}
    rows = list(data("fct_side"))
    fit_transformation(MAPS["fct_side"](), *rows, **FAST, **options)
    if changed == "labels":
        options["labels"] = torch.ones(200).long()
    elif changed == "view":
        rows[0] = rows[0].flip(0)
    else:
        rows[changed] = rows[changed].clone()
        rows[changed][77, 1] += 1e-3
    with pytest.raises(ValueError, match=r"checkpoint must be of this run, .* has data = \w+, not \w+; delete it"):
        fit_transformation(MAPS["fct_side"](), *rows, **FAST, **options)


@pytest.mark.parametrize(
    "other",
    [
        lambda: FCTLoss(99.0),
        lambda: FCTLoss(0.1, 0.5),
        lambda: FCTLoss(0.1, distance=LpDistance(p=2, power=2, normalize_embeddings=True)),
        lambda: FCTLoss(0.1, distance=CosineSimilarity()),
        lambda: FCTLoss(0.1, embedding_regularizer=LpRegularizer()),
    ],
)
def test_a_checkpoint_of_another_setting_of_the_loss(other, tmp_path):
    options = {"checkpoint": tmp_path / "fit.safetensors", "labels": torch.arange(200)}
    run_of = lambda loss: fitted("fct", loss=loss, **options)  # noqa: E731
    run_of(FCTLoss(0.1))
    run_of(FCTLoss(0.1))
    with pytest.raises(ValueError, match=r"checkpoint must be of this run, .* has loss_settings = .*; delete it"):
        run_of(other())


class Dropping(Transformation):
    """A user's own, with dropout."""

    def __init__(self):
        super().__init__(6, 4)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))

    def transform(self, embeddings, side_info):
        return self.layers(embeddings)

    def config(self):
        return {}


def test_the_seed_covers_dropout(tmp_path, monkeypatch):
    def dropped(noise, seed=0, **kwargs):
        torch.manual_seed(1)
        transformation, rows = Dropping(), data("fct")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        fit_transformation(transformation, *rows, seed=seed, **FAST, **kwargs)
        assert torch.get_rng_state().equal(state)
        return transformation

    first = copied(dropped(1))
    assert_same_state(dropped(2), first)
    assert not dropped(1, seed=1).layers[0].weight.equal(first["layers.0.weight"])
    monkeypatch.setattr(TrainingRun, "_loss", _stop_after(20))
    with pytest.raises(KeyboardInterrupt):
        dropped(3, checkpoint=tmp_path / "fit.safetensors")
    monkeypatch.undo()
    assert_same_state(dropped(4, checkpoint=tmp_path / "fit.safetensors"), first)


@pytest.mark.parametrize("form", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.astype(">f4")])
def test_arrays_that_run_backwards_or_are_big_endian(form):
    rows = [form(part.numpy()) for part in data("fct_side")]
    plain = [np.ascontiguousarray(part).astype(np.float32) for part in rows]
    states = []
    for arrays in (rows, plain):
        torch.manual_seed(1)
        transformation = MAPS["fct_side"]()
        fit_transformation(transformation, *arrays, **FAST)
        states.append(copied(transformation))
    assert_same_state(transformation, states[0])
