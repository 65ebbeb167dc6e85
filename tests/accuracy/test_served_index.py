import sys

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator, ServedIndex
from pml_compat.accuracy.calculator import RANK_METRICS

faiss = pytest.importorskip("faiss", reason="needs faiss")


def data(n=300, width=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (n,), generator=generator)
    rows = torch.randn(10, width, generator=generator)[labels] + torch.randn(n, width, generator=generator)
    return torch.nn.functional.normalize(rows), labels


def accuracy(k=None, **kwargs):
    rows, labels = data()
    calculator = CrossModelAccuracyCalculator(RANK_METRICS, device="cpu", k=k, **kwargs)
    return calculator.get_accuracy(rows[:40], labels[:40], rows, labels, ref_includes_query=True)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_flat_index_gives_the_exact_metrics(cosine):
    assert accuracy(knn_func=ServedIndex("Flat", cosine=cosine)) == pytest.approx(accuracy(), abs=1e-9)


def test_compression_costs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 16, generator=generator)
    twins, labels = rows + 0.3 * torch.randn(300, 16, generator=generator), torch.arange(300)
    exact, coarse = (
        CrossModelAccuracyCalculator(("precision_at_1",), device="cpu", knn_func=func).get_accuracy(
            twins, labels, rows, labels
        )["precision_at_1"]
        for func in (None, ServedIndex("PQ2x4"))
    )
    assert coarse < 0.5 < 0.9 < exact


def test_cells_that_are_not_looked_into_are_missed():
    one, all_cells = (accuracy(knn_func=ServedIndex("IVF16,Flat", nprobe=n)) for n in (1, 16))
    assert all_cells == pytest.approx(accuracy(), abs=1e-9)
    assert one["mean_average_precision"] < all_cells["mean_average_precision"]


def test_an_index_is_filled_once_a_gallery(monkeypatch):
    rows, labels = data()
    served, made = ServedIndex("Flat"), []
    factory = served.faiss.index_factory
    monkeypatch.setattr(served.faiss, "index_factory", lambda *a: made.append(a) or factory(*a))
    monkeypatch.setattr("pml_compat.accuracy.ranking._CHUNK_ELEMENTS", 16)
    calculator = CrossModelAccuracyCalculator(RANK_METRICS, device="cpu", knn_func=served)
    calculator.get_accuracy(rows, labels, ref_includes_query=True)
    assert len(made) == 1
    calculator.get_accuracy(rows, labels, rows[:200], labels[:200])
    assert len(made) == 2


def test_an_index_of_ones_own():
    rows, _ = data()
    index = faiss.IndexFlatL2(16)
    index.add(rows.numpy())
    assert accuracy(knn_func=ServedIndex(index)) == pytest.approx(accuracy(), abs=1e-9)
    index.add(rows[:1].numpy())
    with pytest.raises(ValueError, match=r"index must hold the gallery, \(300, 16\), got one of 301 rows, 16 wide"):
        accuracy(knn_func=ServedIndex(index))


def test_unusable_arguments():
    with pytest.raises(ValueError, match="index must be a faiss factory string or a faiss index, got int"):
        ServedIndex(3)
    with pytest.raises(ValueError, match="nprobe must be an integer of at least 1, got 0"):
        ServedIndex("IVF4,Flat", nprobe=0)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "pml-compat\[faiss-cpu\]"'):
        ServedIndex("Flat")


def test_an_index_is_trained_once_for_one_gallery(monkeypatch):
    rows, labels = data()
    served, made = ServedIndex("Flat"), []
    factory = served.faiss.index_factory
    monkeypatch.setattr(served.faiss, "index_factory", lambda *a: made.append(a) or factory(*a))
    calculator = CrossModelAccuracyCalculator(("precision_at_1",), device="cpu", knn_func=served)
    for _ in range(3):
        calculator.get_accuracy(rows[:40], labels[:40], rows, labels)
    calculator.get_accuracy(rows[:40], labels[:40], rows.clone(), labels)
    assert len(made) == 1
    rows[0] += 1
    calculator.get_accuracy(rows[:40], labels[:40], rows, labels)
    assert len(made) == 2


def test_an_id_map_in_a_factory_string():
    assert accuracy(knn_func=ServedIndex("IDMap,Flat")) == pytest.approx(accuracy(), abs=1e-9)


def test_ids_of_an_index_of_ones_own_are_asked_for():
    rows, _ = data()
    ids = np.random.default_rng(0).permutation(300) + 1000
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(16))
    index.add_with_ids(rows.numpy(), ids)
    with pytest.raises(ValueError, match="ids must be given for an index with ids of its own, as this IndexIDMap2"):
        ServedIndex(index)
    assert accuracy(knn_func=ServedIndex(index, ids=ids)) == pytest.approx(accuracy(), abs=1e-9)
    with pytest.raises(ValueError, match="ids must hold every id of the index"):
        accuracy(knn_func=ServedIndex(index, ids=ids + 1))
    with pytest.raises(ValueError, match="ids must have one entry a gallery row: expected 300, got 299"):
        accuracy(knn_func=ServedIndex(index, ids=ids[1:]))
    quantizer = faiss.IndexFlatL2(16)
    cells = faiss.IndexIVFFlat(quantizer, 16, 4)
    cells.train(rows.numpy())
    cells.add_with_ids(rows.numpy(), ids)
    with pytest.raises(
        ValueError, match="ids must be given for an index whose ids are not the gallery's rows 0 to 299"
    ):
        accuracy(knn_func=ServedIndex(cells, nprobe=4))
    assert accuracy(knn_func=ServedIndex(cells, nprobe=4, ids=ids)) == pytest.approx(accuracy(), abs=1e-9)


def test_what_faiss_does_not_know_is_named():
    with pytest.raises(ValueError, match="index must be a faiss factory string, got 'Flatt'"):
        accuracy(knn_func=ServedIndex("Flatt"))
    with pytest.raises(ValueError, match="nprobe must be None for an index without cells, got 4 for Flat"):
        accuracy(knn_func=ServedIndex("Flat", nprobe=4))
