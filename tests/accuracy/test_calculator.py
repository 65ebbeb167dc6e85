import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN
from torch.utils._python_dispatch import TorchDispatchMode

from pml_compat import fit_width
from pml_compat.accuracy import CrossModelAccuracyCalculator, gallery, ranking
from pml_compat.accuracy.calculator import RANK_METRICS
from tests.accuracy import naive_metrics
from tests.pairwise import pairwise

ROOT = Path(__file__).parents[2]


def calculator(include=RANK_METRICS, **kwargs):
    return CrossModelAccuracyCalculator(include=include, device="cpu", **kwargs)


def same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name] == pytest.approx(expected[name], abs=tolerance, nan_ok=True), name


def sample(seed, n_query=24, n_reference=40, width=5, classes=6):
    """Queries and a gallery without ties; class 0 is not in the gallery."""
    rng = np.random.default_rng(seed)
    query_labels = rng.integers(0, classes, n_query)
    reference_labels = rng.integers(1, classes, n_reference)
    centers = rng.normal(size=(classes, width))
    query = centers[query_labels] + rng.normal(size=(n_query, width))
    reference = centers[reference_labels] + rng.normal(size=(n_reference, width))
    return query, query_labels, reference, reference_labels


def same_items(seed, n_query=20, n_reference=36):
    """A gallery whose first rows are the queries' items, as another model embeds them."""
    query, query_labels, reference, reference_labels = sample(seed, n_query, n_reference)
    reference_labels[:n_query] = query_labels
    return query, query_labels, reference, reference_labels


def self_test(seed, n=60, width=8, classes=7):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.integers(0, classes, n - 1), [99]])  # one query without a positive
    return torch.from_numpy(rng.normal(size=(n, width)) + rng.normal(size=(100, width))[labels]).float(), labels


@pytest.fixture
def tiny_chunks(monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(ranking, "_MIN_QUERIES", 3)
    monkeypatch.setattr(gallery, "_BLOCK", 7)


# The naive reference


@pytest.mark.parametrize("k", [None, 1, 4, 20, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_naive_parity(seed, k):
    data = sample(seed)
    same(calculator(k=k).get_accuracy(*data), naive_metrics.accuracy(*data, k=k))


@pytest.mark.parametrize("k", [None, 4, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_naive_parity_with_the_same_items_by_position(seed, k):
    data = same_items(seed)
    got = calculator(k=k).get_accuracy(*data, ref_includes_query=True)
    same(got, naive_metrics.accuracy(*data, same_items=True, k=k))


@pytest.mark.parametrize("kind", [int, str, torch.tensor])
@pytest.mark.parametrize("seed", range(3))
def test_naive_parity_with_the_same_items_by_id(seed, kind):
    query, query_labels, reference, reference_labels = same_items(seed)
    order = np.random.default_rng(seed).permutation(len(reference))
    ids = 10**12 + np.arange(len(reference))
    convert = kind if kind is torch.tensor else lambda values: np.array([kind(value) for value in values])
    options = {"query_ids": convert(ids[: len(query)]), "reference_ids": convert(ids[order])}
    data = query, query_labels, reference[order], reference_labels[order]
    got = calculator().get_accuracy(*data, **options)
    same(got, naive_metrics.accuracy(*data, **options))
    same(got, calculator().get_accuracy(query, query_labels, reference, reference_labels, ref_includes_query=True))


def test_ids_of_signed_and_unsigned_integers_stay_apart():
    data, ids = same_items(0), 2**60 + np.arange(36)
    got = calculator().get_accuracy(*data, query_ids=ids[:20], reference_ids=ids.astype(np.uint64))
    same(got, calculator().get_accuracy(*data, ref_includes_query=True))


def test_an_id_leaves_out_every_gallery_item_that_has_it():
    data = sample(0)
    options = {"query_ids": np.arange(24) % 9, "reference_ids": np.arange(40) % 9}
    same(calculator().get_accuracy(*data, **options), naive_metrics.accuracy(*data, **options))


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("positions", [False, True])
def test_naive_parity_with_cameras(positions, kind):
    data = same_items(3)
    rng = np.random.default_rng(3)
    cameras = {
        "query_cameras": np.array([kind(camera) for camera in rng.integers(0, 3, 20)]),
        "reference_cameras": np.array([kind(camera) for camera in rng.integers(0, 3, 36)]),
    }
    got = calculator().get_accuracy(*data, ref_includes_query=positions, **cameras)
    same(got, naive_metrics.accuracy(*data, same_items=positions, **cameras))


@pytest.mark.parametrize(("option", "average"), [("avg_of_avgs", "labels"), ("return_per_class", "per_class")])
@pytest.mark.parametrize("k", [None, 4])
def test_naive_parity_of_averages_over_labels(option, average, k):
    data = sample(1)
    got = calculator(k=k, **{option: True}).get_accuracy(*data)
    same(got, naive_metrics.accuracy(*data, k=k, average=average))
    if option == "return_per_class":
        assert len(got["precision_at_1"]) == 5  # class 0 has no positives


@pytest.mark.parametrize("positions", [False, True])
def test_max_bin_count_is_the_most_positives_of_a_query(positions):
    data = same_items(2)
    got = calculator(k="max_bin_count").get_accuracy(*data, ref_includes_query=positions)
    most = max(np.sum(data[3] == label) for label in data[1]) - positions
    expected = naive_metrics.accuracy(*data, same_items=positions, k=most)
    same(got, expected)
    assert got != naive_metrics.accuracy(*data, same_items=positions, k=most + 1)


def test_max_bin_count_is_the_same_by_position_and_by_id():
    data, ids = same_items(2), np.arange(36)
    by_position = calculator(k="max_bin_count").get_accuracy(*data, ref_includes_query=True)
    by_id = calculator(k="max_bin_count").get_accuracy(*data, query_ids=ids[:20], reference_ids=ids)
    same(by_id, by_position)


def test_k_does_not_cut_off_the_cmc():
    data = sample(0)
    cut, full = calculator(k=1).get_accuracy(*data), calculator().get_accuracy(*data)
    assert cut["cmc_top_10"] == full["cmc_top_10"] > cut["cmc_top_1"]
    assert cut["mean_average_precision"] < full["mean_average_precision"]


# PML


@pairwise
@pytest.mark.parametrize("options", [{}, {"avg_of_avgs": True}, {"return_per_class": True}], ids=str)
@pytest.mark.parametrize("k", [None, 10, "max_bin_count"])
@pytest.mark.parametrize("seed", range(2))
def test_self_test_equals_that_of_pml(seed, k, options):
    pytest.importorskip("faiss")
    embeddings, labels = self_test(seed)
    theirs = AccuracyCalculator(k=k, device=torch.device("cpu"), **options).get_accuracy(embeddings, labels)
    got = CrossModelAccuracyCalculator(k=k, device="cpu", **options).get_accuracy(embeddings, labels)
    assert set(got) == {*theirs, "cmc_top_1", "cmc_top_5", "cmc_top_10"}
    same({name: got[name] for name in theirs}, theirs, tolerance=1e-6)


@pytest.mark.parametrize("k", [None, 10, "max_bin_count"])
def test_queries_and_gallery_equal_those_of_pml(k):
    pytest.importorskip("faiss")
    data = sample(0)
    names = tuple(name for name in RANK_METRICS if not name.startswith("cmc"))
    theirs = AccuracyCalculator(include=names, k=k, device=torch.device("cpu")).get_accuracy(*data)
    same(calculator(names, k=k).get_accuracy(*data), theirs, tolerance=1e-6)


@pytest.mark.parametrize("positions", [False, True], ids=["by_id", "by_position"])
@pytest.mark.parametrize("knn", ["faiss", "custom"])
def test_knn_func_gives_what_the_exact_search_does(knn, positions, tiny_chunks):
    if knn == "faiss":
        pytest.importorskip("faiss")
    knn_func = FaissKNN() if knn == "faiss" else CustomKNN(LpDistance(normalize_embeddings=False))
    data, ids = same_items(0), np.arange(36)
    same_item = {"ref_includes_query": True} if positions else {"query_ids": ids[:20], "reference_ids": ids}
    expected = calculator(k=20).get_accuracy(*data, **same_item)
    same(calculator(k=20, knn_func=knn_func).get_accuracy(*data, **same_item), expected)


def test_knn_func_gives_what_the_exact_search_does_with_cameras(tiny_chunks):
    data, cameras = sample(4), {"query_cameras": np.arange(24) % 2, "reference_cameras": np.arange(40) % 2}
    knn_func = CustomKNN(LpDistance(normalize_embeddings=False))
    expected = calculator(k=15).get_accuracy(*data, **cameras)
    same(calculator(k=15, knn_func=knn_func).get_accuracy(*data, **cameras), expected)


def test_knn_func_is_asked_for_the_whole_gallery_at_most():
    asked = []

    def knn(query, k, reference, ref_includes_query=False):
        asked.append((k, ref_includes_query, query.dtype))
        return torch.cdist(query, reference).topk(k, largest=False)

    data = same_items(0)
    expected = calculator().get_accuracy(*data, ref_includes_query=True)
    for k in (None, 1000):
        same(calculator(k=k, knn_func=knn).get_accuracy(*data, ref_includes_query=True), expected)
    assert asked == [(36, False, torch.float32)] * 2


def test_knn_func_may_find_less_than_it_was_asked_for():
    def knn(query, k, reference, ref_includes_query=False):
        distances, indices = torch.cdist(query, reference).topk(k, largest=False)
        indices[:, k - 3 :] = -1  # as faiss fills up
        return distances, indices

    data = sample(0)
    data[1][:6] = data[3][0]  # an index of -1 read as row 0 would be a find
    names = ("precision_at_1", "mean_average_precision", "mean_reciprocal_rank")
    expected = naive_metrics.accuracy(*data, k=9)
    got = calculator(names, k=12, knn_func=knn).get_accuracy(*data)
    same(got, {name: expected[name] for name in names})


def test_k_does_not_cut_off_the_cmc_of_a_knn_func():
    data, knn_func = sample(0), CustomKNN(LpDistance(normalize_embeddings=False))
    same(calculator(k=1, knn_func=knn_func).get_accuracy(*data), calculator(k=1).get_accuracy(*data))


# Ties


def tied(kind, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 30)
    reference_labels = rng.integers(0, 4, 50)
    if kind == "integers":
        return rng.integers(-2, 3, (30, 3)).astype(float), labels, rng.integers(-2, 3, (50, 3)), reference_labels
    rows = rng.normal(size=(12, 9))
    return rng.normal(size=(30, 9)), labels, rows[rng.integers(0, 12, 50)], reference_labels


@pytest.mark.parametrize("kind", ["integers", "duplicates"])
@pytest.mark.parametrize("seed", range(3))
def test_ties_count_as_those_of_sklearn(kind, seed):
    query, query_labels, reference, reference_labels = tied(kind, seed)
    data = query, query_labels, reference.astype(float), reference_labels
    got = calculator(("mean_average_precision",)).get_accuracy(*data)
    same(got, {"mean_average_precision": naive_metrics.accuracy(*data)["mean_average_precision"]})


@pytest.mark.parametrize("kind", ["integers", "duplicates"])
@pytest.mark.parametrize("k", [None, 3, 10])
def test_no_order_of_rows_changes_a_metric(kind, k):
    query, query_labels, reference, reference_labels = tied(kind, 5)
    reference = reference.astype(float)
    expected = calculator(k=k).get_accuracy(query, query_labels, reference, reference_labels)
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows, columns = rng.permutation(len(query)), rng.permutation(len(reference))
        got = calculator(k=k).get_accuracy(
            query[rows], query_labels[rows], reference[columns], reference_labels[columns]
        )
        same(got, expected, tolerance=1e-12)


def test_a_collapsed_model_scores_chance():
    labels = torch.arange(40) % 4
    got = calculator().get_accuracy(torch.ones(40, 3), labels)
    share = 9 / 39
    miss_5 = math.comb(30, 5) / math.comb(39, 5)
    assert got["precision_at_1"] == got["cmc_top_1"] == pytest.approx(share)
    assert got["r_precision"] == got["mean_average_precision"] == pytest.approx(share)
    assert got["cmc_top_5"] == pytest.approx(1 - miss_5)
    assert got["mean_reciprocal_rank"] == pytest.approx(10 / 40)  # first of 9 among 39: expected place 40 / 10


# Items, labels, queries


def test_an_item_does_not_find_itself_in_the_other_models_gallery():
    labels = np.array([0, 0, 1, 1])
    items = np.array([[0.0], [10.0], [1.0], [11.0]])  # the nearest other item has the other label
    expected = {"precision_at_1": 0.0}
    one = calculator(("precision_at_1",))
    assert one.get_accuracy(items + 0.1, labels, items, labels) == {"precision_at_1": 1.0}
    assert one.get_accuracy(items + 0.1, labels, items, labels, ref_includes_query=True) == expected
    ids = {"query_ids": np.array([*"abcd"]), "reference_ids": np.array([*"dcba"])}
    assert one.get_accuracy(items + 0.1, labels, items[::-1].copy(), labels[::-1].copy(), **ids) == expected


def test_no_reference_means_a_self_test():
    embeddings, labels = self_test(0)
    expected = calculator().get_accuracy(embeddings, labels, embeddings, labels, ref_includes_query=True)
    same(calculator().get_accuracy(embeddings, labels), expected)
    same(calculator().get_accuracy(embeddings, labels, query_ids=np.arange(len(labels))), expected)


def test_no_reference_takes_ids_and_cameras_of_the_queries():
    query, labels, *_ = sample(0)
    ids, cameras = np.arange(24) // 2, np.arange(24) % 3
    got = calculator().get_accuracy(query, labels, query_ids=ids, query_cameras=cameras)
    both = {"query_ids": ids, "reference_ids": ids, "query_cameras": cameras, "reference_cameras": cameras}
    same(got, naive_metrics.accuracy(query, labels, query, labels, **both))


@pytest.mark.parametrize("base", [2**24, 2**53, 2**62])
def test_labels_too_large_for_a_float_stay_apart(base):
    query, gallery = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    labels, gallery_labels = torch.tensor([base, base + 1]), torch.tensor([base + 1, base, base, base + 1])
    got = calculator(("precision_at_1", "mean_average_precision")).get_accuracy(query, labels, gallery, gallery_labels)
    # The nearest item has the label one off; the positives of both queries stand at ranks 2 and 3 or 2 and 4.
    assert got["precision_at_1"] == 0.0
    assert got["mean_average_precision"] == pytest.approx(((1 / 2 + 2 / 3) + (1 / 2 + 2 / 4)) / 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32])
def test_label_types_mix(dtype):
    query, query_labels, reference, reference_labels = same_items(0)
    expected = calculator().get_accuracy(query, query_labels, reference, reference_labels, ref_includes_query=True)
    labels = torch.from_numpy(query_labels).to(dtype)
    same(calculator().get_accuracy(query, labels, reference, reference_labels, ref_includes_query=True), expected)


def test_queries_without_positives_are_left_out():
    query, query_labels, reference, reference_labels = sample(0)
    known = query_labels > 0
    assert 0 < known.sum() < len(known)
    expected = calculator().get_accuracy(query[known], query_labels[known], reference, reference_labels)
    same(calculator().get_accuracy(query, query_labels, reference, reference_labels), expected)


@pytest.mark.parametrize("k", [None, 5, "max_bin_count"])
def test_no_positives_at_all_is_nan(k, caplog):
    embeddings = torch.randn(6, 2)
    got = calculator(k=k).get_accuracy(embeddings, torch.arange(6))
    assert set(got) == set(RANK_METRICS)
    assert all(math.isnan(value) for value in got.values())
    assert "None of the query labels are in the reference set." in caplog.text
    per_class = calculator(k=k, return_per_class=True).get_accuracy(embeddings, torch.arange(6))
    assert all(len(values) == 6 and all(math.isnan(value) for value in values) for values in per_class.values())


def test_a_gallery_that_is_left_out_whole_is_nan():
    everything = torch.zeros(3, dtype=torch.long)
    got = calculator().get_accuracy(
        torch.randn(3, 2), everything, torch.randn(3, 2), everything, query_ids=everything, reference_ids=everything
    )
    assert all(math.isnan(value) for value in got.values())


# Size and type


@pytest.mark.parametrize("options", [{}, {"ref_includes_query": True}], ids=["gallery", "same_items"])
def test_chunks_change_nothing(options, monkeypatch):
    data = same_items(1)
    expected = calculator().get_accuracy(*data, **options)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(gallery, "_BLOCK", 7)
    for queries in (1, 3, 19):
        monkeypatch.setattr(ranking, "_MIN_QUERIES", queries)
        same(calculator().get_accuracy(*data, **options), expected, tolerance=1e-12)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("k", [None, "max_bin_count"])
@pytest.mark.parametrize("labels", [10, 120], ids=["few_labels", "many_labels"])
def test_no_tensor_of_all_queries_by_the_gallery(labels, k, tiny_chunks):
    query, reference = torch.randn(120, 4), torch.randn(100, 4)
    cameras = {"query_cameras": torch.zeros(120), "reference_cameras": torch.ones(100)}
    with Largest() as largest:
        calculator(k=k).get_accuracy(
            query, torch.arange(120) % labels, reference, torch.arange(100) % labels, **cameras
        )
    assert 0 < largest.elements <= 8 * 120  # a chunk has 3 x 100; 8 metrics of 120 queries


@pytest.mark.parametrize(("query_width", "reference_width"), [(3, 5), (5, 3)])
def test_widths_may_differ(query_width, reference_width):
    query, query_labels, reference, reference_labels = sample(0)
    query, reference = query[:, :query_width], reference[:, :reference_width]
    narrow = fit_width(torch.from_numpy(query), reference_width).numpy()
    with pytest.raises(ValueError, match=f"query must be as wide as reference, got widths {query_width} and"):
        calculator().get_accuracy(query, query_labels, reference, reference_labels)
    got = calculator(fit_width=True).get_accuracy(query, query_labels, reference, reference_labels)
    same(got, naive_metrics.accuracy(narrow, query_labels, reference, reference_labels))


def test_embeddings_are_not_normalised():
    got = calculator(("precision_at_1",)).get_accuracy(
        torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([[9.0, 0.0], [1.0, 1.0]]), torch.tensor([1, 0])
    )
    assert got == {"precision_at_1": 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_computed_on_in_full(dtype):
    query, query_labels, reference, reference_labels = sample(0)
    query, reference = torch.from_numpy(query).to(dtype), torch.from_numpy(reference).to(dtype)
    before = query.clone(), reference.clone()
    got = calculator().get_accuracy(query, query_labels, reference, reference_labels)
    same(got, naive_metrics.accuracy(query.double(), query_labels, reference.double(), reference_labels))
    assert torch.equal(query, before[0])
    assert torch.equal(reference, before[1])


def test_float64_keeps_its_digits():
    reference = torch.tensor([[1.0], [1.0 + 1e-9]], dtype=torch.float64)
    query = torch.tensor([[2.0]], dtype=torch.float64)
    got = calculator(("precision_at_1",)).get_accuracy(query, torch.tensor([1]), reference, torch.tensor([0, 1]))
    assert got == {"precision_at_1": 1.0}


def test_read_only_arrays_and_tensors_mix():
    data = sample(0)
    expected = calculator().get_accuracy(*map(torch.from_numpy, data))
    for array in data[:3]:
        array.flags.writeable = False
    same(calculator().get_accuracy(*data[:3], torch.from_numpy(data[3])), expected)


def test_embeddings_may_carry_a_gradient():
    embeddings, labels = self_test(0)
    expected = calculator().get_accuracy(embeddings, labels)
    same(calculator().get_accuracy(embeddings.clone().requires_grad_(), labels), expected)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        torch.device("cpu"),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
    ids=str,
)
def test_device_may_be_a_string(device):
    data = same_items(0)
    one = CrossModelAccuracyCalculator(include=RANK_METRICS, device=device)
    assert one.device == torch.device(device)
    options = {"query_cameras": np.arange(20) % 2, "reference_cameras": np.arange(36) % 2, "ref_includes_query": True}
    same(one.get_accuracy(*data, **options), calculator().get_accuracy(*data, **options))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_calculators_can_be_copied(clone):
    data = sample(0)
    one = calculator(k=3)
    same(clone(one).get_accuracy(*data), one.get_accuracy(*data))


# Which metrics


def test_every_metric_by_default():
    assert set(CrossModelAccuracyCalculator(device="cpu").get_curr_metrics()) == {*RANK_METRICS, "NMI", "AMI"}


@pytest.mark.parametrize("name", RANK_METRICS)
def test_each_metric_alone(name):
    data = sample(0)
    assert calculator((name,)).get_accuracy(*data) == {name: calculator().get_accuracy(*data)[name]}


def test_include_and_exclude_of_one_call():
    data = sample(0)
    one = calculator(("precision_at_1", "r_precision", "cmc_top_5"))
    assert set(one.get_accuracy(*data, include=("r_precision",))) == {"r_precision"}
    assert set(one.get_accuracy(*data, exclude=("r_precision",))) == {"precision_at_1", "cmc_top_5"}
    assert set(one.get_accuracy(*data)) == {"precision_at_1", "r_precision", "cmc_top_5"}


NO_FAISS = """
import json, sys
sys.modules["faiss"] = None  # "import faiss" raises ModuleNotFoundError
import numpy as np
from pml_compat.accuracy import CrossModelAccuracyCalculator
arrays = np.load(sys.argv[1])
data = [arrays[name] for name in ("query", "query_labels", "reference", "reference_labels")]
print(json.dumps(CrossModelAccuracyCalculator(device="cpu").get_accuracy(*data)))
"""


def test_faiss_is_not_needed(tmp_path):
    query, query_labels, reference, reference_labels = sample(0, classes=3)
    query += 100 * np.eye(3, 5)[query_labels]  # clusters that k-means cannot miss
    reference += 100 * np.eye(3, 5)[reference_labels]
    names = ("query", "query_labels", "reference", "reference_labels")
    data = query, query_labels, reference, reference_labels
    np.savez(tmp_path / "data.npz", **dict(zip(names, data, strict=True)))
    command = [sys.executable, "-W", "error", "-c", NO_FAISS, str(tmp_path / "data.npz")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    same(json.loads(run.stdout), calculator().get_accuracy(*data) | {"NMI": 1.0, "AMI": 1.0})


class PrecisionAt2(CrossModelAccuracyCalculator):
    def requires_knn(self):
        return [*super().requires_knn(), "precision_at_2"]

    def calculate_precision_at_2(self, knn_labels, query_labels, not_lone_query_mask, **kwargs):
        hits = knn_labels[:, :2] == query_labels[:, None]
        return hits[not_lone_query_mask].double().mean().item()


def naive_precision_at_2(*data, **options):
    found = naive_metrics.rankings(*data, **options)
    return {"precision_at_2": float(np.mean([hits[np.argsort(d)][:2].mean() for _, d, hits in found]))}


@pytest.mark.parametrize("k", [None, 3, 1000])
@pytest.mark.parametrize("positions", [False, True])
def test_a_subclass_adds_a_metric_from_neighbours(positions, k, tiny_chunks):
    data = same_items(1)
    one = PrecisionAt2(include=("precision_at_2", "precision_at_1"), k=k, device="cpu")
    got = one.get_accuracy(*data, ref_includes_query=positions)
    expected = calculator(("precision_at_1",)).get_accuracy(*data, ref_includes_query=positions)
    same(got, expected | naive_precision_at_2(*data, same_items=positions))


class Neighbors(CrossModelAccuracyCalculator):
    def requires_knn(self):
        return [*super().requires_knn(), "neighbors"]

    def calculate_neighbors(self, knn_labels, **kwargs):
        return knn_labels.tolist()


@pytest.mark.parametrize("knn_func", [None, CustomKNN(LpDistance(normalize_embeddings=False))], ids=["exact", "custom"])
@pytest.mark.parametrize("k", [None, 3, 1000])
def test_a_subclass_gets_every_neighbour_that_is_not_left_out(k, knn_func, tiny_chunks):
    query, _, reference, _ = same_items(1)
    query[4] = reference[4]  # itself first, were it not left out
    numbers = np.arange(36)  # as labels, so that neighbours can be told apart
    order = np.argsort(np.linalg.norm(query[:, None] - reference, axis=2), axis=1)
    expected = [[j for j in row if j != i][:k] for i, row in enumerate(order.tolist())]
    one = Neighbors(include=("neighbors",), k=k, device="cpu", knn_func=knn_func)
    assert one.get_accuracy(query, numbers[:20], reference, numbers, ref_includes_query=True) == {"neighbors": expected}


def test_a_subclass_skips_queries_whose_only_positive_is_left_out_by_id():
    data, ids = same_items(1), np.arange(36)
    data[1][4] = data[3][4] = 77  # alone with its label
    options = {"query_ids": ids[:20], "reference_ids": ids}
    got = PrecisionAt2(include=("precision_at_2",), device="cpu").get_accuracy(*data, **options)
    same(got, naive_precision_at_2(*data, **options))


def test_a_subclass_gets_the_neighbours_of_the_knn_func():
    def farthest(query, k, reference, ref_includes_query=False):
        return torch.cdist(query, reference).topk(k)

    query, query_labels, reference, reference_labels = sample(1)
    one = PrecisionAt2(include=("precision_at_2",), k=5, device="cpu", knn_func=farthest)
    expected = [
        hits[np.argsort(-distances)][:2].mean()
        for _, distances, hits in naive_metrics.rankings(query, query_labels, reference, reference_labels)
    ]
    got = one.get_accuracy(query, query_labels, reference, reference_labels)
    same(got, {"precision_at_2": float(np.mean(expected))})


def test_a_knn_func_that_finds_too_few_for_a_subclass_is_named():
    def finds_one(query, k, reference, ref_includes_query=False):
        indices = torch.full((len(query), k), -1)
        indices[:, 0] = 1
        return None, indices

    one = Neighbors(include=("neighbors",), k=2, device="cpu", knn_func=finds_one)
    with pytest.raises(ValueError, match="knn_func must find at least 2 gallery items a query, got 1"):
        one.get_accuracy(*sample(0))


@pytest.mark.parametrize("k", [None, "max_bin_count"])
@pytest.mark.parametrize("positions", [False, True])
def test_label_comparison_fn_with_two_dimensional_labels(positions, k):
    query, query_labels, reference, reference_labels = same_items(2)
    rng = np.random.default_rng(0)
    query_labels = np.stack([query_labels, rng.integers(0, 2, 20)], 1)
    reference_labels = np.stack([reference_labels, rng.integers(0, 2, 36)], 1)
    reference_labels[:20] = query_labels

    def match(one, other):
        return one[..., 0] == other[..., 0]

    data = query, query_labels, reference, reference_labels
    got = calculator(label_comparison_fn=match, k=k).get_accuracy(*data, ref_includes_query=positions)
    largest = max(np.sum(reference_labels[:, 0] == label) for label in query_labels[:, 0]) - positions
    expected = naive_metrics.accuracy(*data, same_items=positions, match=match, k=None if k is None else largest)
    same(got, expected)


def test_label_comparison_fn_need_not_be_an_equality():
    data = sample(3)

    def near(one, other):
        return abs(one - other) <= 1

    same(calculator(label_comparison_fn=near).get_accuracy(*data), naive_metrics.accuracy(*data, match=near))


# Errors


EMBEDDINGS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) // 2
HOLED = EMBEDDINGS.clone()
HOLED[2, 1] = float("nan")
INFINITE = EMBEDDINGS.clone()
INFINITE[4, 0] = float("-inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": EMBEDDINGS[:0]}, r"query must not be empty, got shape \(0, 4\)"),
        ({"reference": EMBEDDINGS[:0]}, r"reference must not be empty, got shape \(0, 4\)"),
        ({"query": EMBEDDINGS[:, :0]}, r"query must not be empty, got shape \(6, 0\)"),
        ({"query": EMBEDDINGS[0]}, r"query must be 2-dimensional, \(N, D\), got shape \(4,\)"),
        ({"query": HOLED}, "query must be finite, row 2 has a NaN or an infinity"),
        ({"reference": INFINITE}, "reference must be finite, row 4 has a NaN or an infinity"),
        ({"query": EMBEDDINGS.tolist()}, "query must be a torch.Tensor or a numpy.ndarray, got list"),
        ({"query_labels": None}, "query_labels must be given, got None"),
        ({"reference_labels": None}, "reference_labels must be given, got None"),
        ({"query_labels": LABELS.to(torch.complex64)}, "query_labels must be numbers .*, got complex"),
        ({"query_labels": LABELS[:5]}, "query_labels must have one entry an embedding: expected 6, got 5"),
        ({"query_labels": torch.tensor(3)}, "query_labels must have .* expected 6, got a single number"),
        ({"reference_labels": LABELS[:5]}, "reference_labels must have one entry an embedding: expected 6, got 5"),
        (
            {"query_labels": LABELS[:, None]},
            r"query_labels must be 1-dimensional without a label_comparison_fn, got \(6, 1\)",
        ),
        ({"query_ids": LABELS}, "reference_ids must be given with query_ids, got None"),
        ({"reference_ids": LABELS}, "query_ids must be given with reference_ids, got None"),
        ({"query_cameras": LABELS}, "reference_cameras must be given with query_cameras, got None"),
        ({"reference_cameras": LABELS}, "query_cameras must be given with reference_cameras, got None"),
        ({"query_ids": LABELS[:5], "reference_ids": LABELS}, r"query_ids must have shape \(6,\), got \(5,\)"),
        (
            {"query_cameras": LABELS, "reference_cameras": LABELS[:, None]},
            r"reference_cameras must have shape \(6,\), got \(6, 1\)",
        ),
        (
            {"ref_includes_query": True, "query_ids": LABELS, "reference_ids": LABELS},
            "ref_includes_query must be False where query_ids tell which items are the same",
        ),
        (
            {"ref_includes_query": True, "reference": EMBEDDINGS[:4], "reference_labels": LABELS[:4]},
            "reference must hold every query with ref_includes_query=True, got 4 rows for 6 queries",
        ),
        (
            {"ref_includes_query": True, "reference_labels": LABELS.flip(0)},
            "reference_labels must begin with query_labels .* pass query_ids and reference_ids",
        ),
        (
            {"reference": None},
            "reference must be given with reference_labels, reference_ids or reference_cameras",
        ),
        (
            {"reference": None, "reference_labels": None, "reference_ids": LABELS},
            "reference must be given with reference_labels, reference_ids or reference_cameras",
        ),
        (
            {"reference": None, "reference_labels": None, "reference_cameras": LABELS},
            "reference must be given with reference_labels, reference_ids or reference_cameras",
        ),
    ],
)
def test_unusable_arguments_are_named(change, message):
    arguments = {"query": EMBEDDINGS, "query_labels": LABELS, "reference": EMBEDDINGS, "reference_labels": LABELS}
    with pytest.raises(ValueError, match=message):
        calculator().get_accuracy(**arguments | change)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k must be an integer greater than 0, or None, or 'max_bin_count'"),
        ({"k": "all"}, "k must be an integer greater than 0, or None, or 'max_bin_count'"),
        ({"avg_of_avgs": True, "return_per_class": True}, "avg_of_avgs and return_per_class are mutually exclusive"),
        ({"include": ("recall",)}, "Primary metrics must be one or more of: .*'cmc_top_10'"),
    ],
)
def test_unusable_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CrossModelAccuracyCalculator(device="cpu", **kwargs)


# Per query


@pytest.mark.parametrize("k", [None, 3, "max_bin_count"])
def test_per_query_values_average_to_the_accuracy(k):
    query, query_labels, reference, reference_labels = sample(0)
    one = calculator(k=k)
    values = one.get_per_query_accuracy(query, query_labels, reference, reference_labels)
    expected = one.get_accuracy(query, query_labels, reference, reference_labels)
    assert set(values) == set(expected)
    for name, value in values.items():
        assert value.shape == (len(query),) and value.dtype == torch.float64
        assert value.isnan().tolist() == (~np.isin(query_labels, reference_labels)).tolist()
        assert float(value.nanmean()) == pytest.approx(expected[name], abs=1e-12)


def test_per_query_takes_include_and_the_same_items():
    labels = np.array([0, 0, 1, 1])
    found = calculator().get_per_query_accuracy(
        torch.eye(4), labels, torch.eye(4)[[1, 0, 2, 3]], labels, ref_includes_query=True, include=("precision_at_1",)
    )
    assert list(found) == ["precision_at_1"] and found["precision_at_1"][:2].tolist() == [1.0, 1.0]
