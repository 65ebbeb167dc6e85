import itertools

import pytest
import torch
from pytorch_metric_learning import losses, trainers
from torch.utils.data import DataLoader, TensorDataset

from pml_compat.trainers import IndexedDataset, ResumableSampler


def epoch_of(sampler):
    """Return the batches of an epoch, each said to be trained."""
    batches = []
    for batch in sampler:
        batches.append(batch)
        sampler.advance()
    return batches


@pytest.mark.parametrize(
    ("length", "drop_last", "count", "last"), [(10, False, 4, 1), (10, True, 3, 3), (9, True, 3, 3)]
)
def test_every_sample_comes_once_an_epoch(length, drop_last, count, last):
    sampler = ResumableSampler(length, 3, drop_last=drop_last)
    for epoch in range(3):
        assert (sampler.epoch, sampler.position) == (epoch, 0)
        batches = epoch_of(sampler)
        assert len(batches) == len(sampler) == count and len(batches[-1]) == last
        drawn = sorted(itertools.chain(*batches))
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(length))
        assert drop_last or drawn == list(range(length))


def test_orders_differ_between_epochs_and_seeds():
    orders = []
    for seed in range(4):
        sampler = ResumableSampler(20, 5, seed=seed)
        orders += [tuple(itertools.chain(*epoch_of(sampler))) for _ in range(4)]
    assert len(set(orders)) == 16
    assert epoch_of(ResumableSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("stop", range(9))
def test_it_goes_on_from_any_batch(stop):
    whole = ResumableSampler(10, 4, seed=2)
    expected = [batch for _ in range(3) for batch in epoch_of(whole)]
    first = ResumableSampler(10, 4, seed=2)
    for _ in range(stop):
        first.advance()
    again = ResumableSampler(10, 4, seed=2)
    again.load_state_dict(first.state_dict())
    found = []
    while again.epoch < 3:
        found += epoch_of(again)
    assert found == expected[stop:]


def test_batches_drawn_ahead_are_not_counted():
    sampler = ResumableSampler(12, 2)
    ahead = iter(sampler)
    drawn = [next(ahead) for _ in range(4)]
    sampler.advance()
    assert sampler.state_dict()["position"] == 1 and next(iter(sampler)) == drawn[1]


def test_it_draws_from_no_global_generator():
    before = torch.get_rng_state()
    epoch_of(ResumableSampler(12, 2))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    dataset = IndexedDataset(TensorDataset(torch.arange(10.0), torch.arange(10)))
    sampler = ResumableSampler(10, 3, seed=1)
    expected = epoch_of(ResumableSampler(10, 3, seed=1))
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    found = []
    for data, _, index in itertools.islice(loader, 2):
        assert data.equal(index.float())
        found.append(index.tolist())
        sampler.advance()
    for _, _, index in loader:  # iterated anew, from where the training is
        found.append(index.tolist())
        sampler.advance()
    assert found == expected and sampler.epoch == 1


def test_in_pmls_own_trainer():
    sampler, seen = ResumableSampler(12, 4), []
    trunk = torch.nn.Linear(3, 3)
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        batch_size=99,
        loss_funcs={"metric_loss": losses.ContrastiveLoss()},
        dataset=IndexedDataset(TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)),
        sampler=sampler,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        data_and_label_getter=lambda batch: seen.append(batch[2].tolist()) or batch[:2],
        end_of_iteration_hook=lambda trainer: sampler.advance(),
    )
    trainer.train(num_epochs=2)
    expected = ResumableSampler(12, 4)
    assert seen == epoch_of(expected) + epoch_of(expected)


def test_a_loop_that_never_advances_is_stopped():
    sampler = ResumableSampler(4, 2)
    assert len(list(sampler)) == 2
    with pytest.raises(RuntimeError, match=r"epoch 0 was drawn to its end, but position is still 0; call advance\(\)"):
        list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "length must be an integer of at least 1, got 0"),
        ((4, 0), "batch_size must be an integer of at least 1, got 0"),
        ((4, 2, -1), "seed must be an integer of at least 0, got -1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumableSampler(*arguments)


def test_too_few_samples_for_a_batch():
    with pytest.raises(ValueError, match="batch_size must be at most length, 3, with drop_last, got 4"):
        ResumableSampler(3, 4, drop_last=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 9}, r"the state must be of a sampler with \{'length': 8.*, got one with \{'length': 9"),
        ({"seed": 1}, "the state must be of a sampler with"),
        ({"shuffle": False}, "the state must be of a sampler with"),
        ({"position": 4}, "position must be below the 4 batches of an epoch, got 4"),
        ({"position": None}, "position must be an integer of at least 0, got None"),
        ({"epoch": -1}, "epoch must be an integer of at least 0, got -1"),
    ],
)
def test_states_that_do_not_fit(change, message):
    sampler = ResumableSampler(8, 2)
    sampler.advance()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert sampler.position == 1
