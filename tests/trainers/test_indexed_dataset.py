import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from pml_compat.frozen import FrozenEmbeddings, OldEmbeddingDataset
from pml_compat.trainers import IndexedDataset


def whole():
    return IndexedDataset(TensorDataset(torch.arange(6.0), torch.arange(6) + 10))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_has_its_index(workers):
    assert len(whole()) == 6 and [item[2] for item in map(whole().__getitem__, range(6))] == list(range(6))
    for data, labels, index in DataLoader(Subset(whole(), [4, 1, 5]), batch_size=2, num_workers=workers):
        assert data.equal(index.float()) and labels.equal(index + 10)


def test_an_index_from_the_end():
    assert whole()[-1][2] == 5 and [item[2] for item in whole().__getitems__([-2, 0])] == [4, 0]


def test_lists_and_data_sets_that_fetch_batches():
    assert IndexedDataset([("a", 3), ["b", 4]])[1] == ("b", 4, 1)
    old = FrozenEmbeddings.from_array(torch.eye(2))
    nested = IndexedDataset(OldEmbeddingDataset([("a", 3), ("b", 4)], old))
    (data, label, rows, index), _ = nested.__getitems__([1, 0])
    assert (data, label, rows.tolist(), index) == ("b", 4, [0.0, 1.0], 1)


def test_items_that_are_no_tuples():
    with pytest.raises(ValueError, match=r"dataset must give \(data, label\) tuples, got dict"):
        IndexedDataset([{"image": 1}])[0]
