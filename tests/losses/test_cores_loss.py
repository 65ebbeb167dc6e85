"""A fixed simplex: its corners, the loss on it, and models that agree without having seen each other."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from sklearn.datasets import load_digits

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.losses import CompatibleLoss, CoReSLoss, PointAlignmentLoss
from pml_compat.losses.cores_loss import simplex
from tests import reference


@pytest.mark.parametrize("count", [2, 3, 10, 257])
def test_corners_are_as_far_apart_as_can_be(count):
    corners = simplex(count).double()
    assert corners.shape == (count, count - 1)
    cosines = corners @ corners.t()
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(corners.sum(0), torch.zeros(count - 1, dtype=torch.float64), atol=1e-4, rtol=0)
    if count < 20:
        np.testing.assert_allclose(corners, reference.simplex(count), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_naive_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (6,), generator=generator)
    corners = reference.simplex(5)
    losses = []
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        logits = [sum(x * y for x, y in zip(row, corner, strict=True)) for corner in corners]
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[label])
    loss_func = CoReSLoss(5)
    assert loss_func(rows, labels).item() == pytest.approx(sum(losses) / 6, rel=1e-6)  # corners are float32


def test_gradcheck_and_no_parameters():
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss_func = CoReSLoss(5).double()
    assert torch.autograd.gradcheck(lambda x: loss_func(x, torch.tensor([0, 4, 2])), rows)
    assert list(loss_func.parameters()) == [] and list(loss_func.state_dict()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.randn(2, 5)}, "num_classes - 1 wide: expected 4, got 5"),
        ({"labels": torch.tensor([0, 5])}, r"labels must be in \[0, 4\]"),
        ({"labels": torch.tensor([0, -1])}, "labels must be in"),
        ({"labels": None}, "labels"),
        ({"embeddings": torch.full((2, 4), torch.nan)}, "embeddings"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        CoReSLoss(5)(**({"embeddings": torch.randn(2, 4), "labels": torch.tensor([0, 3])} | change))
    with pytest.raises(ValueError, match="num_classes"):
        CoReSLoss(1)


def trained(images, labels, seed, hidden):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 15))
    loss_func = CoReSLoss(16)  # ten classes now, six to come
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            loss_func(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model


def test_two_models_that_never_met_find_each_other():
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    few = (labels[:900] < 7).nonzero()[:, 0]
    old = trained(images[few], labels[few], seed=0, hidden=32)
    new = trained(images[:900], labels[:900], seed=1, hidden=128)
    known = labels[900:] < 7
    queries, gallery = (torch.nn.functional.normalize(model(images[900:][known]).detach()) for model in (new, old))
    of = labels[900:][known]
    measure = CrossModelAccuracyCalculator(("precision_at_1",))
    found = measure.get_accuracy(queries, of, gallery, of, ref_includes_query=True)["precision_at_1"]
    assert found > 0.8  # by chance 1 in 7


def test_what_a_miner_took_often_counts_more():
    rows, labels = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 2])
    pairs = (torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2]), torch.tensor([3]))
    weights = convert_to_weights(pairs, labels, dtype=torch.float32)
    rowwise = torch.nn.functional.cross_entropy(rows @ simplex(5).t(), labels, reduction="none")
    assert float(CoReSLoss(5)(rows, labels, pairs)) == pytest.approx(float((rowwise * weights).mean()))


def test_it_may_be_the_task_loss_of_others():
    loss_func = CompatibleLoss(CoReSLoss(5), PointAlignmentLoss(), 0.5)
    rows = torch.randn(4, 4, requires_grad=True)
    loss_func(rows, torch.tensor([0, 1, 2, 3]), ref_emb=torch.randn(4, 4)).backward()
    assert rows.grad.isfinite().all() and set(loss_func.terms) == {"task_loss", "old_loss"}
