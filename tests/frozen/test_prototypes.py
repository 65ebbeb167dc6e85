import math

import numpy as np
import pytest
import torch

from pml_compat.frozen import ClassCenters, FrozenEmbeddings, prototypes
from pml_compat.frozen.prototypes import refine_prototypes
from tests.pairwise import pairwise
from tests.reference import unit


def data(seed=0, n=60, classes=5, old=4, new=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) * 3 + 2  # 2, 5, 8, ...: not 0 to C-1
    made = (torch.randn(n, width, generator=generator, dtype=dtype) + labels[:, None] / 4 for width in (old, new))
    return *made, labels


def softmax_graph(new, temperature, axis):
    """S of one class, one entry at a time; ``axis`` 1: rows sum to 1; 0: columns do."""
    n = len(new)
    graph = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            graph[i, j] = 0.0 if i == j else math.exp(float(unit(new[i]) @ unit(new[j])) / temperature)
    return graph / graph.sum(axis=axis, keepdims=True)


def naive_mean(old, new, smoothing=0.9, temperature=0.05, axis=1):
    """The mean of the refined old embeddings of one class."""
    if len(old) == 1:
        return unit(old[0])
    graph = softmax_graph(new, temperature, axis)
    directions = np.array([unit(row) for row in old])
    refined = (1 - smoothing) * np.linalg.inv(np.eye(len(old)) - smoothing * graph) @ directions
    return sum(refined) / len(refined)


def naive(old, new, labels, **options):
    old, new, labels = old.numpy(), new.numpy(), labels.numpy()
    return {y: unit(naive_mean(old[labels == y], new[labels == y], **options)) for y in sorted(set(labels.tolist()))}


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("max_class_size", [1, 12, 2048])  # every class iterated, some, none
def test_matches_naive_loop(seed, smoothing, temperature, max_class_size):
    old, new, labels = data(seed)
    ours = refine_prototypes(
        old, new, labels, smoothing=smoothing, temperature=temperature, max_class_size=max_class_size
    )
    expected = naive(old, new, labels, smoothing=smoothing, temperature=temperature)
    assert ours.labels.tolist() == list(expected) and ours.boundaries is None
    assert ours.counts.tolist() == [int((labels == y).sum()) for y in expected]
    np.testing.assert_allclose(
        ours.centers, np.array(list(expected.values())), atol=1e-12 if max_class_size > 99 else 3e-9
    )


def test_by_hand():
    """Three samples, two of them equal and at right angles to the third in the new space; tau so that e^(1/tau) = 3.

    S = [[0, 3/4, 1/4], [3/4, 0, 1/4], [1/2, 1/2, 0]], lambda = 1/2. By symmetry w = (a, a, c), with
    a = 1/6 + (3/4 a + 1/2 c) / 2 and c = 1/6 + (1/4 a + 1/4 a) / 2: c = 1/6 + a/4, so a (5/8 - 1/16) = 1/6 + 1/24,
    a = 10/27, c = 7/27.
    """
    old = torch.eye(3, dtype=torch.float64) * torch.tensor([[2.0], [5.0], [0.1]])
    new = torch.tensor([[1.0, 0.0], [7.0, 0.0], [0.0, 2.0]])
    ours = refine_prototypes(old, new, torch.tensor([4, 4, 4]), smoothing=0.5, temperature=1 / math.log(3))
    expected = torch.tensor([[10.0, 10.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(ours.centers, expected / expected.norm(), rtol=0, atol=1e-7)


def test_a_softmax_over_columns_would_change_nothing_and_ours_changes_much():
    old, new, _ = data(n=20)
    mean = sum(unit(row) for row in old.numpy()) / 20
    np.testing.assert_allclose(naive_mean(old.numpy(), new.numpy(), axis=0), mean, atol=1e-14)
    ours = refine_prototypes(old, new, torch.zeros(20, dtype=torch.long)).centers[0].numpy()
    assert np.linalg.norm(ours - unit(mean)) > 0.05


def class_with_noise(seed, new_axes):
    """30 old and new embeddings around one direction each, then 5 whose old ones lie at right angles to it.

    The new ones of the 5 lie along ``new_axes``, 0 being that of the other 30. And the mean of the 30 old ones.
    """
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randn(35, 16, generator=generator, dtype=torch.float64) / 12 for _ in range(2))
    old[:30, 0] += 1
    old[30:, 1] += 1
    new[:30, 0] += 1
    new[range(30, 35), new_axes] += 1
    return old, new, ClassCenters.from_embeddings(old[:30], torch.zeros(30, dtype=torch.long)).centers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("new_axes", "least", "most"),
    [
        ([1, 2, 3, 4, 5], 0.0, 0.4),  # items that are not of their class, each in its own way
        ([1, 1, 1, 1, 1], 0.9, 1.1),  # all of one other class: they are one another's neighbours
        ([0, 0, 0, 0, 0], 0.7, 1.2),  # spoilt in the old space alone, of which the graph knows nothing
    ],
)
def test_which_noise_loses_its_say(seed, new_axes, least, most):
    """The angle to the clean class mean, against that of the plain mean; the docstring says as much."""
    old, new, clean = class_with_noise(seed, new_axes)
    labels = torch.zeros(35, dtype=torch.long)
    plain = (ClassCenters.from_embeddings(old, labels).centers * clean).sum().arccos()
    refined = (refine_prototypes(old, new, labels).centers * clean).sum().arccos()
    assert plain > 0.15 and least < float(refined / plain) < most


@pytest.mark.parametrize("max_class_size", [1, 2048])
def test_classes_of_one_and_of_two(max_class_size):
    old, new, _ = data(n=3)
    ours = refine_prototypes(old, new, torch.tensor([9, 1, 1]), max_class_size=max_class_size)
    rows = [unit(row) for row in old.numpy()]
    np.testing.assert_allclose(ours.centers, np.array([unit(rows[1] + rows[2]), rows[0]]), atol=1e-12)


def test_smoothing_of_0_gives_the_plain_means():
    old, new, labels = data()
    expected = ClassCenters.from_embeddings(old, labels)
    ours = refine_prototypes(old, new, labels, smoothing=0)
    torch.testing.assert_close(ours.centers, expected.centers, rtol=0, atol=1e-12)
    assert ours.counts.equal(expected.counts) and ours.labels.equal(expected.labels)


@pytest.mark.parametrize("block", [1, 300, 2**25])  # one sample or class at a time, some, all
def test_blocks_change_nothing(monkeypatch, block):
    old, new, labels = data()
    expected = refine_prototypes(old, new, labels).centers
    monkeypatch.setattr(prototypes, "_BLOCK_ELEMENTS", block)
    torch.testing.assert_close(refine_prototypes(old, new, labels).centers, expected, rtol=0, atol=1e-12)
    iterated = refine_prototypes(old, new, labels, max_class_size=3).centers
    torch.testing.assert_close(iterated, expected, rtol=0, atol=3e-9)


@pytest.mark.parametrize("smoothing", [0.5, 0.9, 0.99])
def test_the_iteration_keeps_its_bound(monkeypatch, smoothing):
    _, new, _ = data(n=40)
    directions = torch.nn.functional.normalize(new, dim=1)
    exact = prototypes._solve_weights(directions[None], smoothing, 0.05)[0]
    assert exact.min() > 0 and float(exact.sum()) == pytest.approx(1)
    for tolerance in (1e-2, 1e-5, 1e-9):
        monkeypatch.setattr(prototypes, "_TOLERANCE", tolerance)
        error = (prototypes._iterate_weights(directions, smoothing, 0.05) - exact).abs().sum()
        assert 0 < error < tolerance


def test_equal_embeddings_zero_rows_and_a_low_temperature():
    old, new, labels = data()
    old[3], new[5] = 0, 0
    assert torch.isfinite(refine_prototypes(old, new, labels, temperature=1e-4).centers).all()
    same = refine_prototypes(old, torch.ones_like(new), labels)
    expected = ClassCenters.from_embeddings(old, labels)  # every sample as near as any other
    torch.testing.assert_close(same.centers, expected.centers, rtol=0, atol=1e-12)


def test_order_of_the_samples_and_lengths_change_nothing():
    old, new, labels = data()
    order, lengths = torch.randperm(60), torch.rand(60, 1, dtype=torch.float64) + 0.1
    ours = refine_prototypes((old * lengths)[order], (new / lengths)[order], labels[order])
    torch.testing.assert_close(ours.centers, refine_prototypes(old, new, labels).centers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_inputs(dtype):
    old, new, labels = data()
    old, new = old.to(dtype).requires_grad_(), new.to(dtype)
    before = old.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        ours = refine_prototypes(old, new, labels)
    assert ours.centers.dtype == torch.promote_types(dtype, torch.float32) and not ours.centers.requires_grad
    exact = refine_prototypes(old.detach().double(), new.double(), labels).centers
    torch.testing.assert_close(ours.centers.double(), exact, rtol=0, atol=1e-7)
    assert old.equal(before)


def test_arrays_memory_maps_and_stored_embeddings(tmp_path):
    old, new, labels = data(dtype=torch.float32)
    expected = refine_prototypes(old, new, labels).centers
    np.save(tmp_path / "old.npy", old.numpy())
    mapped = np.load(tmp_path / "old.npy", mmap_mode="r")
    for stored in (old.numpy(), mapped, FrozenEmbeddings.from_array(old)):
        ours = refine_prototypes(stored, new.numpy(), labels.numpy()).centers
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_many_samples_need_no_matrix_of_all():
    """100000 samples: a matrix of all their similarities would be 75 GiB."""
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(100_000, 8, generator=generator) for _ in range(2))
    labels = torch.randint(2000, (100_000,), generator=generator)
    labels[:3000] = 5000  # one class above max_class_size
    ours = refine_prototypes(old, new, labels)
    assert len(ours) == 2001 and int(ours.counts.sum()) == 100_000
    own = labels == 7
    expected = unit(naive_mean(old[own].double().numpy(), new[own].double().numpy()))
    np.testing.assert_allclose(ours.centers[7], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda o, n, y: (o, n, y), {"smoothing": -0.1}, r"smoothing must be .* at least 0, got -0.1"),
        (lambda o, n, y: (o, n, y), {"smoothing": 1.0}, r"smoothing must be below 1, got 1.0"),
        (lambda o, n, y: (o, n, y), {"temperature": 0.0}, r"temperature must be .* above 0, got 0.0"),
        (lambda o, n, y: (o, n, y), {"max_class_size": 0}, r"max_class_size must be an integer of at least 1, got 0"),
        (lambda o, n, y: (o[0], n, y), {}, r"old_embeddings must be a non-empty \(N, D\) .*, got shape \(4,\)"),
        (lambda o, n, y: (o[:0], n[:0], y[:0]), {}, r"old_embeddings must be a non-empty .*, got shape \(0, 4\)"),
        (lambda o, n, y: (o, n.tolist(), y), {}, r"new_embeddings must be a non-empty \(N, D\) .*, got list"),
        (lambda o, n, y: (o, n[:-1], y), {}, r"new_embeddings must have a row for each .*: expected 60, got 59"),
        (lambda o, n, y: (o, n, y[:-1]), {}, r"labels must have one entry a row: expected 60, got 59"),
        (lambda o, n, y: (o, n, None), {}, r"labels must be given, got None"),
        (lambda o, n, y: (o.long(), n, y), {}, r"old_embeddings must be floating point, got torch.int64"),
        (lambda o, n, y: (o, n / (torch.arange(60)[:, None] != 7), y), {}, r"new_embeddings must be finite, row 7"),
        (lambda o, n, y: (o * torch.nan, n, y * 0), {}, r"old_embeddings must be finite, row 0"),
        (lambda o, n, y: (o * 0, n, y), {}, r"centers must not be 0, the centre of label 2 is"),
    ],
)
def test_bad_arguments(change, options, message):
    with pytest.raises(ValueError, match=message):
        refine_prototypes(*change(*data()), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives():
    old, new, labels = data()
    expected = refine_prototypes(old, new, labels).centers
    for stored in (old, old.cuda()):
        ours = refine_prototypes(stored, new.cuda(), labels, max_class_size=12).centers
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=3e-9)
