"""The nearest positive alone, against the full ranking."""

import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator, first_positive, ranking
from pml_compat.accuracy.calculator import RANK_METRICS
from tests.pairwise import pairwise

NAMES = ("precision_at_1", "cmc_top_1", "cmc_top_3", "cmc_top_40", "mean_reciprocal_rank")


def both(*data, k=None, **options):
    """The metrics of the nearest positive, and the same beside one that needs the full ranking."""
    alone = CrossModelAccuracyCalculator(NAMES, device="cpu", k=k).get_per_query_accuracy(*data, **options)
    full = CrossModelAccuracyCalculator((*NAMES, "r_precision"), device="cpu", k=k)
    expected = full.get_per_query_accuracy(*data, **options)
    return alone, {name: expected[name] for name in NAMES}


def sample(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels, gallery_labels = torch.arange(60) % 7, torch.arange(150) % 6  # label 6 has no positives
    gallery_labels[:60] = labels
    gallery_labels[60:][gallery_labels[60:] == 6] = 0
    query, reference = torch.randn(60, 5, generator=generator), torch.randn(150, 5, generator=generator)
    if kind == "integers":
        query, reference = query.round(), reference.round()
    elif kind == "copies":
        reference = reference[torch.randint(12, (150,), generator=generator)]
        reference += 1e-8 * torch.randn(150, 5, generator=generator)
    elif kind == "double":
        query, reference = query.double(), reference.double()
    elif kind == "huge":
        query, reference = 1e30 * query, 1e30 * reference
    return query, labels, reference, gallery_labels


@pairwise
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("options", [{}, {"ref_includes_query": True}])
@pytest.mark.parametrize("kind", ["plain", "integers", "copies", "double", "huge"])
def test_equals_the_full_ranking(kind, options, k, monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 1500)
    alone, expected = both(*sample(kind), k=k, **options)
    for name in NAMES:
        torch.testing.assert_close(alone[name], expected[name], atol=1e-12, rtol=0, equal_nan=True)


def test_a_wrong_item_as_near_as_rounding_goes_to_float64(monkeypatch):
    left = []

    def spied(query, *arguments):
        left.append(len(query))
        return ranking.exact_ranks(query, *arguments)

    monkeypatch.setattr(first_positive, "exact_ranks", spied)
    query, labels = torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    query[1:] += torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    near = query[:1] + torch.tensor([[1e-3, 0, 0, 0], [1e-3 + 1e-9, 0, 0, 0]])
    reference, gallery_labels = torch.cat([near, query[1:]]), torch.tensor([7, 0, 1, 2])
    found = CrossModelAccuracyCalculator(("precision_at_1",), device="cpu").get_per_query_accuracy(
        query, labels, reference, gallery_labels
    )
    assert found["precision_at_1"].tolist() == [0.0, 1.0, 1.0]
    assert left == [1]


def test_copies_of_a_positive_are_sure(monkeypatch):
    monkeypatch.setattr(first_positive, "exact_ranks", None)
    labels = torch.arange(4)
    found = CrossModelAccuracyCalculator(NAMES, device="cpu").get_accuracy(
        torch.eye(4), labels, torch.eye(4).repeat(3, 1), labels.repeat(3)
    )
    assert found == dict.fromkeys(NAMES, 1.0)


def test_no_buckets_are_made_for_precision_at_1(monkeypatch):
    monkeypatch.setattr(ranking, "Counting", None)
    data = sample("plain")
    CrossModelAccuracyCalculator(("precision_at_1",), device="cpu").get_accuracy(*data)
    with pytest.raises(TypeError):
        CrossModelAccuracyCalculator(RANK_METRICS, device="cpu").get_accuracy(*data)
