import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

from pml_compat.frozen import ClassCenters, FrozenClassifier, FrozenEmbeddings, fit_centers
from pml_compat.losses import BCTLoss, LCELoss
from tests import reference
from tests.pairwise import pairwise


def data(seed=0, n=120, d=5, classes=4, dtype=torch.float64):
    """Classes that lie close together beside what all share, and labels that are not 0 to C-1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) * 3 + 2
    shift = torch.randn(classes * 3 + 2, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (3 + 0.6 * shift[labels] + 0.8 * noise).to(dtype), labels


def fit(embeddings, labels, **kwargs):
    return fit_centers(embeddings, labels, progress=False, **kwargs)


def loss_of(centers, embeddings, labels, scale=16.0):
    return float(FrozenClassifier.from_centers(centers, scale).double().losses(embeddings.double(), labels)[0].mean())


# Values.


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("scale", [4.0, 16.0])
@pytest.mark.parametrize("lr", [1e-2, 0.1])
def test_matches_naive_loop(seed, scale, lr):
    embeddings, labels = data(seed, n=30)
    means = ClassCenters.from_embeddings(embeddings, labels)
    targets = means.index_of(labels).tolist()
    expected = reference.fit_centers(embeddings.numpy(), targets, means.centers.numpy(), scale, 12, lr)
    found = fit(embeddings, labels, scale=scale, epochs=12, lr=lr)  # one step an epoch: the order does not matter
    np.testing.assert_allclose(found.centers, expected, atol=1e-9)
    assert not np.allclose(found.centers, means.centers, atol=1e-3)


def test_by_hand():
    # The first step of Adam is lr in the direction of the gradient's sign, entry by entry. Here rows and directions
    # are (1, 0) and (0, 1), and each direction's gradient lies along the other axis, where the other row draws it:
    # it is pushed off by lr, to (1, -lr) and (-lr, 1).
    found = fit(torch.eye(2), torch.tensor([7, 3]), scale=1.0, epochs=1, lr=0.5)
    long, short = 1 / math.sqrt(1.25), -0.5 / math.sqrt(1.25)
    assert found.labels.tolist() == [3, 7]
    torch.testing.assert_close(found.centers, torch.tensor([[short, long], [long, short]]))
    torch.testing.assert_close(found.boundaries, torch.full((2,), math.acos(long)))
    assert found.counts.tolist() == [1, 1]


def test_one_class_keeps_its_mean():
    embeddings, _ = data()
    labels = torch.full((len(embeddings),), 9)
    means = ClassCenters.from_embeddings(embeddings, labels)
    torch.testing.assert_close(fit(embeddings, labels).centers, means.centers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tells_classes_apart_that_lie_close_together(seed):
    embeddings, labels = data(seed, n=600)
    means, found = ClassCenters.from_embeddings(embeddings, labels), fit(embeddings, labels, epochs=200)
    assert loss_of(found, embeddings, labels) < 0.9 * loss_of(means, embeddings, labels)
    # The old rows most like a direction are of its own class, more often than those most like a mean.
    rows = torch.nn.functional.normalize(embeddings)

    def share(centers):
        nearest = (centers.centers @ rows.t()).topk(20).indices
        return float((labels[nearest] == centers.labels[:, None]).double().mean())

    assert share(found) > share(means) + 0.02


@pytest.mark.parametrize("boundary", ["max", "iqr"])
def test_boundaries_are_measured_around_the_directions(boundary):
    embeddings, labels = data()
    found = fit(embeddings, labels, boundary=boundary)
    own = torch.nn.functional.normalize(embeddings) * found.centers[found.index_of(labels)]
    for row, label in enumerate(found.labels.tolist()):
        angles = sorted(own[labels == label].sum(1).arccos().tolist())
        if boundary == "iqr":
            q1, q3 = angles[len(angles) // 4], angles[3 * len(angles) // 4]
            angles = [angle for angle in angles if angle <= q3 + 1.5 * (q3 - q1)]
        assert float(found.boundaries[row]) == pytest.approx(max(angles), abs=1e-6)
    assert fit(embeddings, labels, boundary=None).boundaries is None


# What it reads, and what it leaves alone.


def test_batches_are_steps():
    embeddings, labels = data()
    whole, halves = fit(embeddings, labels, epochs=2), fit(embeddings, labels, epochs=2, batch_size=60)
    assert not torch.equal(whole.centers, halves.centers)
    torch.testing.assert_close(halves.centers, fit(embeddings, labels, epochs=2, batch_size=119).centers)  # equal parts


def test_the_seed_decides_and_nothing_else():
    embeddings, labels = data()
    torch.manual_seed(1)
    first, state = fit(embeddings, labels, batch_size=10), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first.centers, fit(embeddings, labels, batch_size=10).centers)
    assert not torch.equal(first.centers, fit(embeddings, labels, batch_size=10, seed=5).centers)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_reads_arrays_memory_maps_and_stored_embeddings(tmp_path):
    embeddings, labels = data(dtype=torch.float32)
    expected = fit(embeddings, labels, batch_size=50)
    np.save(tmp_path / "old.npy", embeddings.numpy())
    mapped = np.load(tmp_path / "old.npy", mmap_mode="r")
    stored = FrozenEmbeddings.write(tmp_path / "old", [(embeddings, torch.arange(len(embeddings)))])
    for rows in (embeddings.numpy(), mapped, stored):
        found = fit(rows, labels.numpy(), batch_size=50)
        assert torch.equal(found.centers, expected.centers)
        assert torch.equal(found.boundaries, expected.boundaries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_in_float32(dtype):
    embeddings, labels = data(dtype=dtype)
    found = fit(embeddings, labels)
    assert found.centers.dtype == torch.float32
    torch.testing.assert_close(found.centers, fit(embeddings.float(), labels).centers)


def test_a_zero_embedding_draws_nothing():
    embeddings, labels = data(n=40)
    embeddings[0] = 0
    assert bool(torch.isfinite(fit(embeddings, labels).centers).all())


def test_embeddings_are_left_as_they_are():
    embeddings, labels = data()
    embeddings.requires_grad_()
    before = embeddings.detach().clone()
    found = fit(embeddings, labels)
    assert torch.equal(embeddings.detach(), before) and embeddings.grad is None
    assert not any(tensor.requires_grad for tensor in found.state_dict(keep_vars=True).values())


def test_save_and_load(tmp_path):
    found = fit(*data())
    found.save(tmp_path / "centers.safetensors")
    assert torch.equal(ClassCenters.load(tmp_path / "centers.safetensors").centers, found.centers)


def test_bct_and_lce_take_them():
    embeddings, labels = data(dtype=torch.float32)
    labels = (labels - 2) // 3
    centers = fit(embeddings, labels)
    new = torch.randn(len(embeddings), 5, requires_grad=True)
    task = NormalizedSoftmaxLoss(4, 5)
    for loss_func in (BCTLoss(task, FrozenClassifier.from_centers(centers)), LCELoss(task, centers)):
        loss_func(new, labels).backward()
        assert bool(torch.isfinite(new.grad).all()) and float(new.grad.abs().sum()) > 0


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be a finite number above 0, got 0"),
        ({"scale": math.nan}, "scale must be"),
        ({"lr": -1e-3}, "lr must be a finite number above 0, got -0.001"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"boundary": "mean"}, "boundary must be 'max', 'iqr' or None, got 'mean'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit(*data(), **options)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), "must not be empty"),
        (torch.randn(4), torch.zeros(4, dtype=torch.long), "embeddings must be 2-dimensional"),
        ([[1.0, 2.0]], torch.zeros(1, dtype=torch.long), r"embeddings must be an \(N, D\) tensor or array, got list"),
        (torch.randn(4, 5), torch.zeros(3, dtype=torch.long), "labels must"),
        (torch.randn(4, 5), torch.randn(4), "labels must"),
        (torch.full((4, 5), math.nan), torch.zeros(4, dtype=torch.long), "embeddings must be finite"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([4, 4]), "the centre of label 4 is"),
    ],
)
def test_bad_embeddings(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(embeddings, labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives():
    embeddings, labels = data()
    expected = fit(embeddings, labels, batch_size=50)
    for found in (fit(embeddings.cuda(), labels, batch_size=50), fit(embeddings, labels, batch_size=50, device="cuda")):
        torch.testing.assert_close(found.centers.cpu(), expected.centers)
        torch.testing.assert_close(found.boundaries.cpu(), expected.boundaries)
