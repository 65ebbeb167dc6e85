import itertools
import math
import os
import random
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

from pml_compat.frozen import ClassCenters
from pml_compat.losses import FCTLoss, LCETransformationLoss
from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    ResidualBottleneckTransformation,
    Transformation,
    TransformationChain,
    fit_transformation,
)
from tests.pairwise import pairwise
from tests.processes import exit_code


def fit(transformation, *arguments, **kwargs):
    return fit_transformation(transformation, *arguments, **{"progress": False, **kwargs})


def linear_map(n=40, seed=0):
    """Return embeddings, and what a linear map makes of them."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, 4, generator=generator)
    return source, source @ torch.randn(4, 3, generator=generator) + torch.randn(3, generator=generator)


def linear(seed=0):
    torch.manual_seed(seed)
    return LinearTransformation(4, 3)


def fct(seed=0):
    torch.manual_seed(seed)
    return FCTTransformation(4, 3, side_features=2, hidden_features=8)


def fct_data(n=20, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    arrays = [[torch.randn(n, width, generator=generator) for _ in range(views)] for width in (4, 3, 2)]
    return arrays if views > 1 else [array[0] for array in arrays]


def copied(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same_state(module, state):
    assert list(module.state_dict()) == list(state)
    for key, tensor in module.state_dict().items():
        assert tensor.equal(state[key]), key


# --- what is learnt


def test_learns_a_linear_map():
    source, target = linear_map(200)
    transformation = linear()
    history = fit(transformation, source, target, epochs=40, batch_size=32, lr=0.1, weight_decay=0.0)
    assert history["train_loss"][0] > 1 and history["train_loss"][-1] < 1e-5
    torch.testing.assert_close(transformation(source), target, rtol=0, atol=0.02)


def test_fct_learns_what_the_side_information_tells():
    torch.manual_seed(1)
    source, side_info = torch.randn(256, 4), torch.randn(256, 2)
    target = torch.cat([source[:, :2], side_info[:, :1].abs()], dim=1)
    transformation = FCTTransformation(4, 3, side_features=2, hidden_features=32)
    history = fit(transformation, source, target, side_info, epochs=30, batch_size=64, lr=0.01)
    both = torch.cat([source, side_info], dim=1)
    linear_error = (LinearTransformation(6, 3).fit(both, target)(both) - target).square().mean()
    assert history["train_loss"][-1] < history["train_loss"][0] / 3
    mean = target.mean(0)
    learned = mean + (transformation(source, side_info) - mean) * 3 / 2  # rows are drawn to their mean at the end
    assert (learned - target).square().mean() < linear_error / 3


def test_matches_a_loop_by_hand():
    """Adam on the whole set, its learning rates and weight decay: a batch of all rows leaves nothing to chance."""
    source, target = (rows.double() for rows in linear_map())
    fitted, by_hand = linear().double(), linear().double()
    rates = {"lr": 0.2, "weight_decay": 0.05}
    history = fit(fitted, source, target, epochs=6, warmup_epochs=2, batch_size=100, **rates)
    optimizer, losses = torch.optim.Adam(by_hand.parameters(), **rates), []
    for factor in (0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2):
        optimizer.param_groups[0]["lr"] = 0.2 * factor
        optimizer.zero_grad()
        loss = (by_hand(source) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert history["train_loss"] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(fitted.linear.weight, by_hand.linear.weight)


@pytest.mark.parametrize(
    ("epochs", "warmup", "factors"),
    [
        (3, 0, [1.0, 0.75, 0.25]),
        (4, 2, [0.5, 1.0, 1.0, 0.5]),
        (5, 4, [0.25, 0.5, 0.75, 1.0, 1.0]),
        (2, 2, [0.5, 1.0]),
        (2, 5, [0.2, 0.4]),
        (1, 0, [1.0]),
    ],
)
def test_learning_rates_by_hand(epochs, warmup, factors):
    history = fit(linear(), *linear_map(), epochs=epochs, warmup_epochs=warmup, lr=0.03)
    assert history["lr"] == pytest.approx([0.03 * factor for factor in factors])


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows():
    """40 rows in batches of 14, 13 and 13 count by their rows; a rate of nearly 0 keeps the map still."""
    source, target = linear_map()
    transformation = linear()
    expected = (transformation(source) - target).square().mean().item()
    history = fit(transformation, source, target, epochs=2, batch_size=16, lr=1e-12)
    assert history["train_loss"] == pytest.approx([expected] * 2, rel=1e-5)


def test_maps_without_a_closed_form_start_are_trained_by_the_squared_error():
    plain, given = linear(), linear()
    history = fit(plain, *linear_map(), epochs=4, batch_size=8)
    assert fit(given, *linear_map(), epochs=4, batch_size=8, loss=FCTLoss()) == {
        key: pytest.approx(value, rel=1e-4) for key, value in history.items()
    }


# --- rows and views

FACTOR, ROWS, VIEWS = 0.5, 23, 3


class Seen(Transformation):
    """Keeps what it was called with; its width is (view, row)."""

    def __init__(self, side_features=2):
        super().__init__(2, 2, side_features)
        self.factor = torch.nn.Parameter(torch.tensor(FACTOR))
        self.calls = []

    def transform(self, embeddings, side_info):
        self.calls.append((self.training, embeddings.clone(), None if side_info is None else side_info.clone()))
        return embeddings * self.factor

    def config(self):
        return {"side_features": self.side_features}

    def rows(self, training):
        """Return the (view, row) of all calls of that mode, in order."""
        return torch.cat([embeddings for mode, embeddings, _ in self.calls if mode == training])


class SeenLoss:
    def __init__(self):
        self.calls = []

    def __call__(self, mapped, labels, ref_emb=None):
        self.calls.append((labels, ref_emb))
        return mapped.sum() * 0


def numbered(views, kind=np.asarray):
    """Return arrays whose entries are (view, row)."""
    arrays = [np.stack([np.full(ROWS, view), np.arange(ROWS)], axis=1).astype(np.float32) for view in range(views)]
    return [kind(array) for array in arrays]


def test_every_row_once_an_epoch_in_another_order_with_its_own_label():
    transformation, loss = Seen(), SeenLoss()
    source, target, side_info = (numbered(1)[0] for _ in range(3))
    fit(transformation, source, target, side_info, labels=np.arange(ROWS) * 10, loss=loss, epochs=3, batch_size=5)
    assert [len(rows) for _, rows, _ in transformation.calls] == 3 * [5, 5, 5, 4, 4]
    orders = transformation.rows(training=True)[:, 1].long().chunk(3)
    assert all(sorted(order.tolist()) == list(range(ROWS)) for order in orders)
    assert len({tuple(order.tolist()) for order in [torch.arange(ROWS), *orders]}) == 4
    for (_, rows, side), (labels, ref_emb) in zip(transformation.calls, loss.calls, strict=True):
        assert rows.equal(side) and rows.equal(ref_emb) and (rows[:, 1] * 10).long().equal(labels)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_same_view_in_source_target_and_side_information(kind):
    transformation, loss = Seen(), SeenLoss()
    epochs = 12
    fit(transformation, *(numbered(VIEWS, kind) for _ in range(3)), loss=loss, epochs=epochs, batch_size=5)
    for (_, rows, side), (_, ref_emb) in zip(transformation.calls, loss.calls, strict=True):
        assert rows.equal(side) and rows.equal(ref_emb)
    drawn = transformation.rows(training=True).long()
    for epoch in drawn.chunk(epochs):
        assert sorted(epoch[:, 1].tolist()) == list(range(ROWS))
        assert set(epoch[:, 0].tolist()) == set(range(VIEWS))
    for row in range(ROWS):  # no row is tied to a view: 12 draws of 3 all the same have a chance of 6e-6 a row
        assert len(set(drawn[drawn[:, 1] == row, 0].tolist())) > 1
    shares = drawn[:, 0].bincount() / len(drawn)
    assert shares.min() > 0.25


def test_one_target_and_side_information_for_all_views():
    transformation, loss = Seen(), SeenLoss()
    fit(transformation, numbered(VIEWS), numbered(1)[0], tuple(numbered(1)), loss=loss, epochs=3, batch_size=5)
    for (_, rows, side), (_, ref_emb) in zip(transformation.calls, loss.calls, strict=True):
        assert rows[:, 1].equal(side[:, 1]) and rows[:, 1].equal(ref_emb[:, 1])
        assert side[:, 0].sum() == ref_emb[:, 0].sum() == 0


def test_a_loss_without_target_or_labels():
    transformation, loss = Seen(None), SeenLoss()
    fit(transformation, numbered(1)[0], None, loss=loss, epochs=1)
    assert loss.calls == [(None, None)] and transformation.calls[0][2] is None


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.95])
def test_held_out_rows_are_never_trained_on(share):
    transformation = Seen()
    fit(transformation, *(numbered(VIEWS) for _ in range(3)), loss=SeenLoss(), epochs=3, batch_size=5, validation=share)
    trained, held_out = (transformation.rows(training)[:, 1].long().tolist() for training in (True, False))
    assert len(set(held_out)) == math.ceil(share * ROWS) and len(held_out) == 3 * len(set(held_out))
    assert set(trained) | set(held_out) == set(range(ROWS)) and not set(trained) & set(held_out)
    assert transformation.rows(training=False)[:, 0].sum() == 0  # measured on the first view, every time the same


def test_the_split_comes_from_the_seed():
    def held_out(seed, epochs=1):
        transformation = Seen(None)
        fit(transformation, numbered(1)[0], None, loss=SeenLoss(), epochs=epochs, validation=0.3, seed=seed)
        return set(transformation.rows(training=False)[:, 1].tolist())

    assert held_out(0) == held_out(0, epochs=4) and held_out(0) != held_out(1)
    assert held_out(0) != set(range(ROWS - 7, ROWS))


class Recorder:
    """Gives rows by an index, and remembers how many at once."""

    def __init__(self, rows):
        self.rows, self.shape, self.asked = rows, rows.shape, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(len(index))
        return self.rows[index]


def test_rows_are_read_by_batches():
    arrays = [Recorder(rows) for rows in fct_data()]
    read, whole = fct(), fct()
    options = {"epochs": 2, "batch_size": 6, "validation": 0.1, "loss": FCTLoss()}
    history = fit(read, *arrays, **options)
    assert all(array.asked == [20, 2] + 2 * [6, 6, 6, 2] for array in arrays)  # the closed form, and what it is worth
    assert fit(whole, *fct_data(), **options) == history
    assert_same_state(read, whole.state_dict())


@pytest.mark.parametrize("views", [1, 3])
def test_read_only_memory_maps_give_what_tensors_give(views, tmp_path):
    arrays = fct_data(50, views)

    def stored(rows, name):
        np.save(tmp_path / name, rows.numpy())
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    maps = [
        [stored(view, f"{i}_{j}") for j, view in enumerate(array)] if views > 1 else stored(array, str(i))
        for i, array in enumerate(arrays)
    ]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    of_maps, of_tensors = fct(), fct()
    options = {"epochs": 3, "batch_size": 8, "validation": 0.1}
    assert fit(of_maps, *maps, **options) == fit(of_tensors, *arrays, **options)  # a warning would be an error here
    assert_same_state(of_maps, of_tensors.state_dict())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_memory_is_set_by_the_batch_size(tmp_path):
    """40,000 rows of 64 floats are 10 MB, a batch of 500 is 0.1 MB."""
    np.lib.format.open_memmap(tmp_path / "old.npy", "w+", np.float32, (40_000, 64))[:] = 1.0
    source, target = (np.load(tmp_path / "old.npy", mmap_mode="r") for _ in range(2))
    tracemalloc.start()
    fit(LinearTransformation(64, 64), source, target, epochs=1, batch_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes(dtype):
    source, target = (rows.numpy().astype(dtype) for rows in linear_map())
    low, single = linear(), linear()
    fit(low, source, torch.from_numpy(target), epochs=3)
    fit(single, source.astype(np.float32), target.astype(np.float32), epochs=3)
    assert_same_state(low, single.state_dict())


def test_a_float64_transformation():
    source, target = linear_map()
    transformation = linear().double()
    fit(transformation, source, target, epochs=2)
    assert transformation.linear.weight.dtype == torch.float64


def test_inputs_are_not_changed_and_receive_no_gradient():
    arrays = [rows.requires_grad_() for rows in fct_data()]
    before = [rows.detach().clone() for rows in arrays]
    fit(fct(), *arrays, epochs=2, batch_size=8)
    assert all(rows.equal(old) and rows.grad is None for rows, old in zip(arrays, before, strict=True))


# --- chance

EVERYTHING = {"epochs": 6, "batch_size": 4, "validation": 0.2, "lr": 0.01, "warmup_epochs": 2}


def test_the_seed_alone_decides():
    def run(seed, noise):
        transformation = fct()
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002 (the state that must not matter)
        random.seed(noise)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        history = fit(transformation, *fct_data(views=3), seed=seed, **EVERYTHING)
        assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[2]
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        return transformation, history

    (one, history), (same, same_history), (other, other_history) = run(5, 1), run(5, 2), run(6, 1)
    assert history == same_history and history != other_history
    assert_same_state(one, same.state_dict())
    assert not one.mix[0].weight.equal(other.mix[0].weight)


# --- interruptions


class Stopping(torch.nn.Module):
    """The squared error with a factor to learn; stops at a call."""

    def __init__(self, stop_at=-1, stop=None):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.5))
        self.calls, self.stop_at, self.stop = 0, stop_at, stop

    def forward(self, mapped, labels, ref_emb):
        if self.calls == self.stop_at:
            self.stop()
        self.calls += 1
        return (mapped * self.factor - ref_emb).square().mean()


def interrupt():
    raise KeyboardInterrupt


def run_everything(loss, checkpoint=None, seed=0, **changes):
    transformation = fct(seed)
    history = fit(transformation, *fct_data(views=3), loss=loss, checkpoint=checkpoint, **EVERYTHING | changes)
    return transformation, history


@pytest.fixture(scope="module")
def uninterrupted():
    loss = Stopping()
    transformation, history = run_everything(loss)
    assert loss.calls == 31  # 4 held out before, then 16 rows in four batches and the 4, six times
    return copied(transformation), copied(loss), history


@pytest.mark.parametrize(
    "stops", [[2], [5], [7], [9], [17], [22], [29], [7, 4], [12, 8, 3]], ids=lambda stops: "-".join(map(str, stops))
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(stops, uninterrupted, tmp_path):
    """In the first epoch, between two, in a validation, with frozen norms, in the last; and more than once."""
    path = tmp_path / "fit.safetensors"
    for seed, stop_at in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            run_everything(Stopping(stop_at, interrupt), path, seed if path.exists() else 0)
    loss = Stopping()
    # all but the first epoch's start is in the checkpoint, whatever the transformation was built from
    transformation, history = run_everything(loss, path, seed=9 if path.exists() else 0)
    state, loss_state, expected = uninterrupted
    assert history == expected
    assert_same_state(transformation, state)
    assert_same_state(loss, loss_state)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_finished_run_is_not_run_again(uninterrupted, tmp_path):
    state, loss_state, expected = uninterrupted
    for seed in (0, 1):
        loss = Stopping()
        transformation, history = run_everything(loss, tmp_path / "fit.safetensors", seed)
        assert history == expected and loss.calls == (31 if seed == 0 else 0)
        assert_same_state(transformation, state)
        assert_same_state(loss, loss_state)
        assert not transformation.training


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_ends_as_the_uninterrupted_one(uninterrupted, tmp_path):
    path = tmp_path / "fit.safetensors"
    assert exit_code(run_everything, Stopping(18, kill), path) == -signal.SIGKILL
    loss = Stopping()
    transformation, history = run_everything(loss, path, seed=9)
    assert loss.calls == 15  # three epochs of six
    assert history == uninterrupted[2]
    assert_same_state(transformation, uninterrupted[0])


def test_interrupted_with_scaled_gradients(tmp_path):
    source, target = linear_map()
    options = {"epochs": 4, "batch_size": 8, "autocast": torch.float16}

    def run(stop_at, **kwargs):
        transformation = linear()
        return transformation, fit(
            transformation, source, target, loss=Stopping(stop_at, interrupt), **options, **kwargs
        )

    whole, history = run(-1)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(12, checkpoint=path)
    resumed, resumed_history = run(-1, checkpoint=path)
    assert resumed_history == history
    assert_same_state(resumed, whole.state_dict())


def smaller(array):
    return [view[:-1] for view in array]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 7}, r"epochs = 6, not 7"),
        ({"batch_size": 5}, r"batch_size = 4, not 5"),
        ({"lr": 0.02}, r"lr = 0.01, not 0.02"),
        ({"weight_decay": 0.0}, r"weight_decay = 3.05\d+e-05, not 0.0"),
        ({"warmup_epochs": 1}, r"warmup_epochs = 2, not 1"),
        ({"freeze_norm_at": 0.6}, r"freeze_norm_at = 0.5, not 0.6"),
        ({"validation": 0.3}, r"validation = 0.2, not 0.3"),
        ({"seed": 1}, r"seed = 0, not 1"),
        ({"autocast": torch.bfloat16}, r"autocast = None, not torch.bfloat16"),
        ({"loss": FCTLoss()}, r"loss = Stopping, not FCTLoss"),
        ({"loss": None}, r"loss = Stopping, not None"),
        ({"arrays": [view[:2] for view in fct_data(views=3)]}, r"views = 3, not 2"),
        ({"arrays": [smaller(array) for array in fct_data(views=3)]}, r"rows = 20, not 19"),
        ({"transformation": FCTTransformation(4, 3, 2, 9)}, r"transformation = .*'hidden_features': 8.*not .* 9}}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run(changes, message, tmp_path):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_everything(Stopping(7, interrupt), path)
    contents = path.read_bytes()
    arguments = {"loss": Stopping(), "transformation": fct(), "arrays": fct_data(views=3), **EVERYTHING, **changes}
    transformation = arguments.pop("transformation")
    before = copied(transformation)
    with pytest.raises(ValueError, match=rf"checkpoint must be of this run, '.*fit.safetensors' has {message}; delete"):
        fit(transformation, *arguments.pop("arrays"), checkpoint=path, **arguments)
    assert_same_state(transformation, before)
    assert path.read_bytes() == contents


def test_a_checkpoint_that_is_cut_short_or_something_else(tmp_path):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_everything(Stopping(7, interrupt), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"must be a whole safetensors file, '.*fit.safetensors' is not"):
        run_everything(Stopping(), path)
    linear().save(path)
    with pytest.raises(ValueError, match=r"must be a file written by fit_transformation, '.*fit.safetensors' holds"):
        run_everything(Stopping(), path)


# --- batch normalisation, validation, precision


def norms(transformation):
    return [module for module in transformation.modules() if isinstance(module, torch.nn.BatchNorm1d)]


TRANSFORMATIONS_WITH_NORMS = {
    "fct": lambda: FCTTransformation(4, 3, hidden_features=8),
    "residual_bottleneck": lambda: ResidualBottleneckTransformation(4, 3, 4, 2, 2),
    "chain": lambda: TransformationChain(LinearTransformation(4, 4), FCTTransformation(4, 3, hidden_features=8)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS_WITH_NORMS)
@pytest.mark.parametrize(
    ("freeze_norm_at", "moving"), [(0.5, 2), (0.0, 0), (1.0, 4), (0.75, 3), (0.6, 3)], ids=lambda value: str(value)
)
def test_norms_are_frozen_for_the_last_epochs(name, freeze_norm_at, moving):
    transformation = TRANSFORMATIONS_WITH_NORMS[name]()
    seen = [torch.cat([norm.running_mean for norm in norms(transformation)]).clone()]

    def loss(mapped, labels, ref_emb):
        assert all(module.training for module in transformation.modules() if module not in norms(transformation))
        seen.append(torch.cat([norm.running_mean for norm in norms(transformation)]).clone())
        return (mapped - ref_emb).square().mean()

    options = {"epochs": 4, "batch_size": 20, "validation": 0.0}
    fit(transformation, *linear_map(), loss=loss, freeze_norm_at=freeze_norm_at, **options)
    moved = [not after.equal(before) for before, after in itertools.pairwise(seen)]
    assert moved == [True, True] * moving + [False, False] * (4 - moving)
    assert torch.cat([norm.running_mean for norm in norms(transformation)]).equal(seen[-1])


def test_frozen_norms_normalise_by_the_running_statistics():
    torch.manual_seed(0)
    transformation = FCTTransformation(4, 3, hidden_features=8)
    source = linear_map()[0]
    target, options = source[:, :3].square(), {"loss": FCTLoss(), "validation": 0.0}
    fit(transformation, source, target, epochs=2, lr=0.01, **options)
    expected = (transformation(source) - target).square().mean().item()
    history = fit(transformation, source, target, epochs=1, freeze_norm_at=0.0, batch_size=7, **options)
    assert history["train_loss"][0] == pytest.approx(expected, rel=0.05)
    weights = [norm.weight for norm in norms(transformation)]
    assert all(weight.grad is not None and weight.requires_grad for weight in weights)  # they still learn


def test_batches_are_of_equal_size():
    """One row more than fits is no batch of its own, in which batch normalisation has no variance."""
    transformation, loss = Seen(None), SeenLoss()
    fit(transformation, numbered(1)[0], None, loss=loss, epochs=1, batch_size=ROWS - 1)
    assert [len(rows) for _, rows, _ in transformation.calls] == [12, 11]


@pytest.mark.parametrize("n", [1, 3])
def test_batches_of_one_row(n):
    history = fit(fct(), *fct_data(n), epochs=3, batch_size=1)
    assert np.isfinite(history["train_loss"]).all()


def test_validation_keeps_the_best_state():
    """A rate that rises to where the loss goes up again."""
    source, target = linear_map()
    seen = {}

    class Watched(LinearTransformation):
        def transform(self, embeddings, side_info):
            if not self.training:
                seen["held out"] = embeddings.clone()
            return super().transform(embeddings, side_info)

    transformation = Watched(4, 3)
    history = fit(transformation, source, target, epochs=30, warmup_epochs=30, lr=20.0, batch_size=10, validation=0.25)
    losses = history["validation_loss"]
    assert history["best_epoch"] == losses.index(min(losses)) < 29 and losses[-1] > 2 * min(losses)
    held_out = seen["held out"]
    rows = (source[:, None] == held_out).all(2).any(1)
    assert int(rows.sum()) == 10
    with torch.no_grad():
        assert (transformation(source[rows]) - target[rows]).square().mean().item() == pytest.approx(min(losses))


def test_validation_loss_by_hand_in_batches():
    source, target = linear_map(21)
    transformation = linear()
    with torch.no_grad():
        errors = (transformation(source) - target).square().mean(1)
    history = fit(transformation, source, target, epochs=1, lr=1e-12, batch_size=4, validation=0.5)
    # 11 rows in batches of 4, 4 and 3, with the 10 others they are all
    total = 11 * history["validation_loss"][0] + 10 * history["train_loss"][0]
    assert total == pytest.approx(errors.sum().item(), rel=1e-5)


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_history_and_mode(validation):
    transformation = fct()
    transformation.side_branch[0].weight.requires_grad_(False)
    frozen = transformation.side_branch[0].weight.clone()
    history = fit(transformation, *fct_data(), epochs=3, batch_size=8, validation=validation)
    assert list(history) == ["train_loss", "validation_loss", "lr", "best_epoch", "steps"]
    assert len(history["train_loss"]) == len(history["lr"]) == 3
    assert len(history["validation_loss"]) == (3 if validation else 0)
    assert validation or history["best_epoch"] == 2
    assert not any(module.training for module in transformation.modules())
    assert transformation.side_branch[0].weight.equal(frozen)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast):
    low, single, dtypes = fct(), fct(), set()
    low.mix[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    options = {"epochs": 4, "batch_size": 8, "validation": 0.2}
    history = fit(low, *fct_data(), autocast=autocast, **options)
    assert dtypes == {autocast}
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert history["train_loss"] == pytest.approx(fit(single, *fct_data(), **options)["train_loss"], rel=0.05)


def test_progress_bar(capsys):
    fit(linear(), *linear_map(), epochs=3, progress=True)
    shown = capsys.readouterr().err
    assert "fit" in shown and "3/3" in shown and "loss=" in shown
    fit(linear(), *linear_map(), epochs=3)
    assert capsys.readouterr().err == ""


# --- losses


def test_a_loss_with_labels_and_parameters_of_its_own():
    source, _ = linear_map(60)
    labels = (source[:, 0] > 0).long()
    torch.manual_seed(0)
    transformation, loss = linear(), NormalizedSoftmaxLoss(2, 3)
    weights = loss.W.detach().clone()
    history = fit(transformation, source, None, labels=labels, loss=loss, epochs=15, batch_size=20, lr=0.05)
    assert history["train_loss"][-1] < history["train_loss"][0] / 2
    assert not loss.W.equal(weights)
    classes = torch.nn.functional.normalize(transformation(source), dim=1) @ torch.nn.functional.normalize(
        loss.W, dim=0
    )
    assert (classes.argmax(1) == labels).float().mean() > 0.95


def test_a_loss_that_holds_the_transformation(tmp_path):
    """Its parameters are trained once, not twice; a checkpoint with both goes on."""
    torch.manual_seed(0)
    source, labels = torch.randn(40, 4), torch.arange(40) % 4
    target = ClassCenters.from_embeddings(torch.randn(40, 3), labels)

    def run(epochs_of_calls=None, **kwargs):
        transformation = ResidualBottleneckTransformation(4, 3, 4, 2, 1)
        torch.manual_seed(1)
        torch.nn.init.normal_(transformation.blocks[0].skip.weight)
        loss = LCETransformationLoss(transformation, ClassCenters.from_embeddings(source, labels), target)
        if epochs_of_calls is not None:
            hook = [interrupt if call == epochs_of_calls else (lambda: None) for call in range(10)]
            loss.register_forward_pre_hook(lambda *_: hook.pop(0)())
        history = fit(transformation, source, None, labels=labels, loss=loss, epochs=4, batch_size=20, **kwargs)
        return transformation, history

    torch.manual_seed(2)
    whole, history = run()
    torch.manual_seed(2)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(5, checkpoint=path)
    resumed, resumed_history = run(checkpoint=path)
    assert resumed_history == history and history["train_loss"][-1] < history["train_loss"][0]
    assert_same_state(resumed, whole.state_dict())


# --- errors


def change(position, function):
    """Return the three arrays of ``fct_data`` with one of them changed."""
    arrays = fct_data()
    arrays[position] = function(arrays[position])
    return arrays


ARRAYS = ["source", "target", "side_info"]
WIDTHS = {"source": 4, "target": 3, "side_info": 2}


def refused(message, arrays, transformation=None, **kwargs):
    """The call raises, and nothing was trained."""
    transformation = fct() if transformation is None else transformation
    before = copied(transformation)
    with pytest.raises(ValueError, match=message):
        fit(transformation, *arrays, **{"epochs": 2, **kwargs})
    assert_same_state(transformation, before)


@pytest.mark.parametrize("name", ["target", "side_info"])
@pytest.mark.parametrize("n", [0, 19])
def test_lengths_that_differ(name, n):
    arrays = change(ARRAYS.index(name), lambda rows: rows[:n])
    refused(rf"{name} must have one row for each row of source, in the same order: expected 20, got {n}", arrays)


def test_a_source_of_another_length():
    refused(r"target must have one row for each row of source.* expected 19, got 20", change(0, lambda rows: rows[1:]))
    refused(r"source must not be empty, got 0 rows", [rows[:0] for rows in fct_data()])


@pytest.mark.parametrize("name", ARRAYS)
def test_shapes_of_one_array(name):
    position, width = ARRAYS.index(name), WIDTHS[name]
    message = rf"{name} must be \(N, {width}\), got shape "
    refused(message + rf"\(20, {width - 1}\)", change(position, lambda rows: rows[:, 1:]))
    refused(message + r"\(20,\)", change(position, lambda rows: rows[:, 0]))
    refused(message + rf"\(20, 1, {width}\)", change(position, lambda rows: rows[:, None]))
    refused(rf"{name} must be an \(N, D\) array or a list of them, got \['str'\]", change(position, lambda rows: "x"))
    refused(rf"{name} must be an \(N, D\) array or a list of them, got \[\]", change(position, lambda rows: []))


@pytest.mark.parametrize("name", ARRAYS)
def test_views_that_do_not_match(name):
    arrays = fct_data(views=3)
    arrays[ARRAYS.index(name)] = arrays[ARRAYS.index(name)][:2]
    # two views of source make the other two wrong
    message = r"target must have 1 or 2 views like source, got 3"
    refused(message if name == "source" else rf"{name} must have 1 or 3 views like source, got 2", arrays)
    arrays = fct_data(views=3)
    position = ARRAYS.index(name)
    arrays[position][2] = arrays[position][2][:-1]
    refused(rf"{name} must have one row for each row of source, .* expected 20, got 19", arrays)
    arrays[position][2] = fct_data(views=3)[position][2][:, :1]
    refused(rf"{name} must be \(N, {WIDTHS[name]}\), got shape \(20, 1\)", arrays)


@pairwise
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_rows_that_are_not_finite(name, value, validation):
    arrays = fct_data()
    arrays[ARRAYS.index(name)][13, 1] = value
    message = rf"^{name} must be finite, row 13 has a NaN or an infinity; look for a diverged training"
    transformation = fct()
    with pytest.raises(ValueError, match=message):
        fit(transformation, *arrays, batch_size=4, validation=validation)
    assert all(torch.isfinite(tensor).all() for tensor in transformation.state_dict().values())
    if validation == 0:
        refused(message, arrays, batch_size=20)  # before the step of its batch


@pytest.mark.parametrize("name", ARRAYS)
def test_a_view_that_is_not_finite_though_the_first_epoch_may_not_draw_it(name):
    for seed in range(4):
        arrays = fct_data(views=3)
        arrays[ARRAYS.index(name)][1][13] = math.nan
        transformation = fct()
        with pytest.raises(ValueError, match=rf"^{name} must be finite, row 13 has a NaN or an infinity"):
            fit(transformation, *arrays, seed=seed, epochs=20)
        assert all(torch.isfinite(tensor).all() for tensor in transformation.state_dict().values())


def test_a_training_that_diverges():
    message = r"lr must let the training converge, at 1e\+30 the loss of epoch 1 is inf"
    with pytest.raises(ValueError, match=message):
        fit(linear(), *linear_map(), lr=2e30, warmup_epochs=4, epochs=4, batch_size=100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, r"epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, r"epochs must be an integer of at least 1, got 1.5"),
        ({"batch_size": 0}, r"batch_size must be an integer of at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be a finite number above 0, got 0.0"),
        ({"lr": math.nan}, r"lr must be a finite number above 0, got nan"),
        ({"weight_decay": -1.0}, r"weight_decay must be a finite number of at least 0, got -1.0"),
        ({"warmup_epochs": -1}, r"warmup_epochs must be an integer of at least 0, got -1"),
        ({"freeze_norm_at": 1.1}, r"freeze_norm_at must be in \[0, 1\], got 1.1"),
        ({"freeze_norm_at": -0.1}, r"freeze_norm_at must be a finite number of at least 0, got -0.1"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1.0"),
        ({"validation": -0.1}, r"validation must be a finite number of at least 0, got -0.1"),
        ({"validation": "some"}, r"validation must be a finite number of at least 0, got 'some'"),
        ({"validation": 0.99}, r"validation must leave samples to train on, got 0.99 of 20"),
        ({"seed": -1}, r"seed must be an integer of at least 0, got -1"),
        ({"labels": torch.zeros(19).long()}, r"labels must have one entry a row: expected 20, got 19"),
        ({"labels": torch.zeros(20)}, r"labels must be integers, got torch.float32"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    refused(message, fct_data(), **kwargs)


def test_no_target_without_a_loss_of_ones_own():
    source, _, side_info = fct_data()
    refused(r"target must be given, got None; without a loss of your own", (source, None, side_info))


def test_side_information_missing_or_not_asked_for():
    source, target, side_info = fct_data()
    refused(r"side_info must be \(N, 2\) for this FCTTransformation, got None", (source, target))
    refused(r"side_info must be None for this LinearTransformation, got ", (source, target, side_info), linear())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu(autocast, tmp_path):
    options = {"epochs": 4, "batch_size": 8, "validation": 0.2}
    single, transformation = fct(), fct().cuda()
    arrays = [array.cuda() if i == 1 else array for i, array in enumerate(fct_data())]
    history = fit(transformation, *arrays, autocast=autocast, checkpoint=tmp_path / "fit.safetensors", **options)
    assert {p.device.type for p in transformation.parameters()} == {"cuda"}
    expected = fit(single, *fct_data(), **options)
    assert history["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
    again = fct().cuda()
    assert fit(again, *arrays, autocast=autocast, checkpoint=tmp_path / "fit.safetensors", **options) == history
    assert_same_state(again, transformation.state_dict())
