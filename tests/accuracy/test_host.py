"""PML's own checks of its AccuracyCalculator, with ours in its place."""

import logging

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from pml_compat.accuracy import CrossModelAccuracyCalculator

pytest.importorskip("faiss", reason="PML's calculator needs faiss")
QUERY_LABELS = torch.tensor([1, 1, 2, 3, 4, 0])
FOUND = [[0, 1, 1, 2, 2], [1, 0, 1, 1, 3], [4, 4, 4, 4, 2], [3, 1, 3, 1, 3], [0, 0, 4, 2, 2], [1, 2, 3, 4, 5]]
HOST_METRICS = (
    "precision_at_1",
    "r_precision",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
)


@pytest.mark.parametrize("settings", [{}, {"avg_of_avgs": True}, {"return_per_class": True}])
@pytest.mark.parametrize("known", [True, False])
def test_metrics_of_neighbours_that_the_caller_found(settings, known):
    given = {
        "query_labels": QUERY_LABELS,
        "knn_labels": torch.tensor(FOUND),
        "label_counts": ([0, 1, 2, 3, 4], [2, 3, 5, 4, 5]),
        "not_lone_query_mask": torch.full((6,), known),
        "ref_includes_query": False,
    }
    host, ours = (
        cls(exclude=("NMI", "AMI"), device=torch.device("cpu"), **settings)
        for cls in (AccuracyCalculator, CrossModelAccuracyCalculator)
    )
    expected = host._get_accuracy(host.get_function_dict(), **given)
    found = ours._get_accuracy(ours.get_function_dict(), **given)
    for metric in HOST_METRICS:
        assert found[metric] == pytest.approx(expected[metric], nan_ok=True), metric
    if known and not settings:
        assert found["cmc_top_1"] == expected["precision_at_1"]
        assert found["cmc_top_5"] == pytest.approx(5 / 6)  # all but the last


class MeanDistance:
    def calculate_mean_dist(self, knn_distances, **kwargs):
        return float(knn_distances.mean())

    def requires_knn(self):
        return [*super().requires_knn(), "mean_dist"]


@pytest.mark.parametrize("given", [{}, {"knn_func": CustomKNN(lambda a, b: torch.cdist(a, b))}])
def test_a_metric_added_as_the_host_documents_it(given):
    class Ours(MeanDistance, CrossModelAccuracyCalculator):
        pass

    class Host(MeanDistance, AccuracyCalculator):
        pass

    generator = torch.Generator().manual_seed(0)
    query, reference = torch.randn(10, 4, generator=generator), torch.randn(30, 4, generator=generator)
    labels = torch.arange(10) % 3, torch.arange(30) % 3
    if given:
        given = {"knn_func": lambda q, k, r, same: torch.cdist(q, r).topk(k, largest=False)}
    found, expected = (
        cls(include=("mean_dist", "precision_at_1"), k=5, device=torch.device("cpu"), **given).get_accuracy(
            query, labels[0], reference, labels[1]
        )
        for cls in (Ours, Host)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_standard_metric_that_a_subclass_computes_itself():
    class Ours(CrossModelAccuracyCalculator):
        def calculate_precision_at_1(self, knn_labels, query_labels, **kwargs):
            return float((knn_labels[:, 0] == query_labels).double().mean()) + 1

    labels = torch.tensor([0, 0, 1])
    assert Ours(include=("precision_at_1",), device="cpu").get_accuracy(torch.eye(3), labels, torch.eye(3), labels) == {
        "precision_at_1": 2.0
    }


@pytest.mark.parametrize(("k", "warned"), [(3, True), (50, False)])
def test_a_cut_off_below_the_largest_label_is_warned_of(k, warned, caplog):
    labels = torch.arange(40) % 4
    with caplog.at_level(logging.INFO):
        CrossModelAccuracyCalculator(k=k, exclude=("NMI", "AMI"), device="cpu").get_accuracy(torch.randn(40, 3), labels)
    assert warned == any("less than the max bin count" in record.message for record in caplog.records)
