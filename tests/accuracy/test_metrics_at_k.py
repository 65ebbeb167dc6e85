import copy
import pickle

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import ndcg_score

from pml_compat.accuracy import CrossModelAccuracyCalculator
from tests.accuracy import naive_metrics
from tests.pairwise import pairwise

FAMILIES = tuple(naive_metrics.AT_K)


def calculator(*include, **kwargs):
    return CrossModelAccuracyCalculator(include=include, device="cpu", **kwargs)


def sample(seed, n_query=20, n_reference=36, classes=5):
    rng = np.random.default_rng(seed)
    labels, gallery_labels = rng.integers(0, classes, n_query), rng.integers(0, classes - 1, n_reference)
    gallery_labels[:n_query] = labels
    return rng.normal(size=(n_query, 4)), labels, rng.normal(size=(n_reference, 4)), gallery_labels


def naive(name, k, *data, **options):
    found = [
        naive_metrics.AT_K[name](hits[np.argsort(distances)], k)
        for _, distances, hits in naive_metrics.rankings(*data, **options)
    ]
    return pytest.approx(np.mean(found), abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 7, 30, 500])
@pytest.mark.parametrize("family", FAMILIES)
def test_naive_parity(family, k):
    data, name = sample(k), f"{family}_{k}"
    got = calculator(name).get_accuracy(*data, ref_includes_query=True)
    assert got == {name: naive(family, k, *data, same_items=True)}


@pairwise
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_ties_take_the_mean_over_every_order(family, k, seed):
    rng = np.random.default_rng(seed)
    reference, labels = rng.integers(0, 3, (6, 1)).astype(float), np.array([0, 0, 1, 1, 2, 2])
    name = f"{family}_{k}"
    got = calculator(name).get_accuracy(np.zeros((1, 1)), np.array([0]), reference, labels)
    assert got[name] == pytest.approx(naive_metrics.at_k_with_ties(family, reference[:, 0], labels == 0, k), abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_that_of_scikit_learn_with_ties_too(k):
    rng = np.random.default_rng(k)
    query, reference = rng.integers(0, 3, (15, 2)).astype(float), rng.integers(0, 3, (40, 2)).astype(float)
    labels, gallery_labels = np.arange(15) % 3, np.arange(40) % 3
    right = labels[:, None] == gallery_labels
    scores = -np.linalg.norm(query[:, None] - reference, axis=2)
    got = calculator(f"ndcg_at_{k}").get_accuracy(query, labels, reference, gallery_labels)
    assert got[f"ndcg_at_{k}"] == pytest.approx(ndcg_score(right, scores, k=k), abs=1e-9)


def test_a_case_by_hand():
    reference, labels = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1, 0, 1, 1])
    names = ("precision_at_3", "recall_at_3", "cmc_top_3", "ndcg_at_3", "mean_average_precision_at_2")
    got = calculator(*names).get_accuracy(torch.zeros(1, 1), torch.tensor([1]), reference, labels)
    best = 1 + 1 / np.log2(3) + 1 / 2
    assert got == pytest.approx(
        {
            "precision_at_3": 2 / 3,
            "recall_at_3": 2 / 3,
            "cmc_top_3": 1.0,
            "ndcg_at_3": (1 + 1 / 2) / best,
            "mean_average_precision_at_2": 1 / 2,
        }
    )


def test_the_constructors_k_does_not_cut_them_off():
    data = sample(0)
    names = [f"{family}_20" for family in FAMILIES]
    expected = calculator(*names).get_accuracy(*data)
    assert calculator(*names, k=3).get_accuracy(*data) == expected
    mixed = calculator("mean_average_precision", *names, k=3).get_accuracy(*data)
    assert {name: mixed[name] for name in names} == expected


@pytest.mark.parametrize("k", [None, 3])
def test_a_knn_func_is_asked_for_as_much_as_the_metrics_look_at(k):
    asked = []

    def knn(query, k, reference, ref_includes_query=False):
        asked.append(k)
        return CustomKNN(LpDistance(normalize_embeddings=False))(query, k, reference, False)

    data, names = sample(0), ("precision_at_12", "ndcg_at_4")
    got = calculator(*names, k=k, knn_func=knn).get_accuracy(*data, ref_includes_query=True)
    assert got == pytest.approx(calculator(*names).get_accuracy(*data, ref_includes_query=True))
    assert asked == [13]


def test_they_are_known_where_any_metric_is():
    data, one = sample(0), calculator("ndcg_at_5", "precision_at_1")
    per_query = one.get_per_query_accuracy(*data)
    got = one.get_accuracy(*data)
    assert {name: float(values.nanmean()) for name, values in per_query.items()} == pytest.approx(got)
    assert sorted(one.get_curr_metrics()) == ["ndcg_at_5", "precision_at_1"]
    assert set(one.get_accuracy(*data, include=("recall_at_9",))) == {"recall_at_9"}
    assert set(one.get_accuracy(*data, exclude=("ndcg_at_5",))) == {"precision_at_1"}
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied.get_accuracy(*data) == got
    averages = calculator("ndcg_at_5", return_per_class=True).get_accuracy(*data)["ndcg_at_5"]
    assert len(averages) == len(np.unique(data[1]))


@pytest.mark.parametrize(
    "name", ["precision_at_0", "precision_at_01", "recall_at_", "ndcg_at_-1", "ndcg", "recall_at_²"]
)
def test_names_without_a_k_are_refused(name):
    with pytest.raises(ValueError, match=r"Or at any k, such as precision_at_20; got \['" + name):
        calculator(name)


def test_a_string_is_no_list_of_names():
    with pytest.raises(TypeError, match="must be of type tuple"):
        CrossModelAccuracyCalculator(include="ndcg_at_5")


# Junk


def junk_of(seed, n_query, n_reference):
    rng = np.random.default_rng(seed)
    return [rng.choice(n_reference, size=rng.integers(0, 9), replace=False) for _ in range(n_query)]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("knn", [False, True])
def test_junk_counts_neither_as_right_nor_as_wrong(kind, knn):
    data = sample(3)
    junk = junk_of(3, 20, 36)
    options = {"knn_func": CustomKNN(LpDistance(normalize_embeddings=False))} if knn else {}
    names = ("mean_average_precision", "precision_at_1", "ndcg_at_5")
    one = calculator(*names, **options)
    got = one.get_accuracy(*data, ref_includes_query=True, junk=[kind(rows) for rows in junk])
    expected = naive_metrics.accuracy(*data, same_items=True, junk=junk)
    assert got["mean_average_precision"] == pytest.approx(expected["mean_average_precision"], abs=1e-9)
    assert got["precision_at_1"] == pytest.approx(expected["precision_at_1"], abs=1e-9)
    assert got["ndcg_at_5"] == naive("ndcg_at", 5, *data, same_items=True, junk=junk)
    alone = calculator("precision_at_1", **options).get_accuracy(*data, ref_includes_query=True, junk=junk)
    assert alone["precision_at_1"] == got["precision_at_1"]
    assert got != one.get_accuracy(*data, ref_includes_query=True)


def test_no_junk_and_a_query_with_junk_alone():
    data = sample(0)
    one = calculator("mean_average_precision")
    assert one.get_accuracy(*data, junk=[[]] * 20) == one.get_accuracy(*data)
    everything = [list(range(36)), *[[]] * 19]
    assert one.get_per_query_accuracy(*data, junk=everything)["mean_average_precision"][0].isnan()


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        ([[]] * 19, "junk must have one list of gallery rows a query: expected 20, got 19"),
        ([[36], *[[]] * 19], "junk must be rows of the gallery, integers from 0 to 35, got 36"),
        ([[-1], *[[]] * 19], "junk must be rows of the gallery, integers from 0 to 35, got -1"),
        ([["a"], *[[]] * 19], "junk must be rows of the gallery, integers from 0 to 35, got values of type"),
    ],
)
def test_unusable_junk_is_named(junk, message):
    with pytest.raises(ValueError, match=message):
        calculator("precision_at_1").get_accuracy(*sample(0), junk=junk)
