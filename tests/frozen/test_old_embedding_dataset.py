import pickle

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, testers, trainers
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import FrozenEmbeddings, OldEmbeddingDataset, data_and_label
from tests.processes import METHOD

N, D = 12, 3


class Samples(Dataset):
    """(data, label, name) samples, each read on its own."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return [torch.full((2,), float(index)), index % 3, f"sample {index}"]


class Counting(FrozenEmbeddings):
    lookups = 0

    def __getitem__(self, indices):
        self.lookups += 1
        return super().__getitem__(indices)


def samples():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)


def embeddings():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def test_the_old_embedding_is_the_last_item():
    dataset = OldEmbeddingDataset(samples(), FrozenEmbeddings.from_array(embeddings()))
    assert len(dataset) == N
    for index in range(-N, N):
        data, label, old = dataset[index]
        assert data.equal(samples()[index][0]) and label == samples()[index][1] and old.equal(embeddings()[index])
    *item, old = OldEmbeddingDataset(Samples(), FrozenEmbeddings.from_array(embeddings()))[7]
    assert item[1:] == [1, "sample 7"] and old.equal(embeddings()[7])
    assert len(list(dataset)) == N  # stops at the IndexError


@pytest.mark.parametrize("form", [torch.tensor, np.array, list])
@pytest.mark.parametrize("base", [samples, Samples, lambda: Subset(Samples(), range(N))])
def test_rows_are_found_by_id(form, base):
    ids = [100 - 7 * i for i in range(N)]
    order = torch.randperm(N + 5, generator=torch.Generator().manual_seed(2))  # the store has others too
    stored_ids, rows = torch.tensor([*ids, 1000, 1001, 1002, 1003, 1004]), torch.randn(N + 5, D)
    store = FrozenEmbeddings.from_array(rows[order], ids=stored_ids[order])
    dataset = OldEmbeddingDataset(base(), store, ids=form(ids))
    for index in range(N):
        assert dataset[index][-1].equal(rows[index])
    picked = [5, 0, 11, 5]
    for got, index in zip(dataset.__getitems__(picked), picked, strict=True):
        assert torch.as_tensor(got[0]).equal(torch.as_tensor(base()[index][0])) and got[-1].equal(rows[index])
    for got in (dataset.__getitems__(torch.tensor(picked)), dataset.__getitems__(np.array(picked))):
        assert torch.stack([item[-1] for item in got]).equal(rows[picked])


def test_positions_are_ids_where_the_store_has_ids():
    store = FrozenEmbeddings.from_array(embeddings().flip(0), ids=torch.arange(N).flip(0))
    assert OldEmbeddingDataset(samples(), store)[2][-1].equal(embeddings()[2])


def test_one_lookup_a_batch():
    store = Counting.from_array(embeddings())
    loader = DataLoader(OldEmbeddingDataset(samples(), store), batch_size=4)
    assert torch.cat([old for _, _, old in loader]).equal(embeddings())
    assert store.lookups == 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, from Python 3.12 on
@pytest.mark.parametrize(("start", "workers"), [("fork", 2), (METHOD, 1)])  # a spawned one imports torch
def test_dataloader_workers(start, workers, tmp_path):
    store = FrozenEmbeddings.write(tmp_path / "old", [(embeddings(), torch.arange(N) + 50)])
    dataset = OldEmbeddingDataset(samples(), store, ids=torch.arange(N) + 50)
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, multiprocessing_context=start)
    data, labels, old = map(torch.cat, zip(*loader, strict=True))
    assert data.equal(samples().tensors[0]) and labels.equal(samples().tensors[1]) and old.equal(embeddings())


def test_pickle_leaves_the_embeddings_on_disk(tmp_path):
    store = FrozenEmbeddings.write(tmp_path / "old", [torch.randn(1000, 50)])
    dataset = OldEmbeddingDataset(Subset(Samples(), [0] * 1000), store)
    text = pickle.dumps(dataset)
    assert len(text) < 1000 * 50
    assert pickle.loads(text)[3][-1].equal(store[3])


def test_a_pml_trainer_and_tester_read_it(tmp_path):
    seen = []

    def getter(batch):
        seen.append(batch[2])
        return data_and_label(batch)

    store = FrozenEmbeddings.write(tmp_path / "old", [embeddings()])
    dataset = OldEmbeddingDataset(samples(), store)
    model = torch.nn.Linear(4, D)
    before = model.weight.detach().clone()
    trainer = trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={"trunk_optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
        loss_funcs={"metric_loss": losses.ContrastiveLoss()},
        dataset=dataset,
        batch_size=6,
        dataloader_num_workers=0,
        data_and_label_getter=getter,
    )
    trainer.train(num_epochs=1)
    assert not model.weight.equal(before)
    assert torch.cat(seen).sort(0).values.equal(embeddings().sort(0).values)  # every one once, shuffled
    tester = testers.BaseTester(
        dataloader_num_workers=0,
        data_and_label_getter=data_and_label,
        accuracy_calculator=CrossModelAccuracyCalculator(),  # PML's own needs faiss
    )
    new, labels = tester.get_all_embeddings(dataset, model)
    assert new.shape == (N, D) and labels[:, 0].cpu().equal(samples().tensors[1])


def test_the_getter_pickles():
    assert pickle.loads(pickle.dumps(data_and_label)) is data_and_label
    assert data_and_label(["data", "labels", "old"]) == ("data", "labels")


@pytest.mark.parametrize(
    ("store", "ids", "message"),
    [
        (torch.eye(N), None, r"old_embeddings must be FrozenEmbeddings, got Tensor; FrozenEmbeddings.from_array takes"),
        (torch.eye(N + 1), None, r"old_embeddings must have one row a sample: expected 12, got 13; .* give ids"),
        (torch.eye(N), [0, 1], r"ids must have one entry a sample: expected 12, got 2"),
        (torch.eye(N), torch.arange(N) + 2, r"ids must all be in .*, 2 of 12 are not, the first is 12; embed these"),
        (torch.eye(N), torch.rand(N), r"ids must be integers"),
    ],
)
def test_bad_arguments(store, ids, message):
    if "got Tensor" not in message:
        store = FrozenEmbeddings.from_array(store)
    with pytest.raises(ValueError, match=message):
        OldEmbeddingDataset(samples(), store, ids)


@pytest.mark.parametrize(
    ("item", "got"), [(torch.ones(2), "Tensor"), ({"data": 1, "label": 2}, "dict"), ((1,), "tuple of 1")]
)
def test_items_without_a_label(item, got):
    dataset = OldEmbeddingDataset([item], FrozenEmbeddings.from_array(torch.ones(1, D)))
    for read in (lambda: dataset[0], lambda: dataset.__getitems__([0])):
        with pytest.raises(ValueError, match=rf"dataset must give \(data, label\) tuples, got a {got}; wrap it"):
            read()
