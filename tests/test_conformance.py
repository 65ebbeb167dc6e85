"""Every loss of the library does what PML's own do, in PML's own machinery."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners, reducers, regularizers, trainers
from pytorch_metric_learning.utils import distributed as pml_distributed

from pml_compat.losses import AdvBCTLoss, BCTLoss, UniBCTLoss
from pml_compat.trainers import CompatibleMetricLossOnly, IndexedDataset
from tests.cases import ALIGNED, BALANCED, CLASSES, LOSSES, PAIRED, RANDOM, WIDTH, batch, build, references
from tests.processes import run_ranks
from tests.reads import Reads

every_loss = pytest.mark.parametrize("name", [*LOSSES, *ALIGNED, *PAIRED])
every_loss_without_a_draw = pytest.mark.parametrize("name", sorted({*LOSSES, *ALIGNED, *PAIRED} - RANDOM))
every_paired_loss = pytest.mark.parametrize("name", PAIRED)
every_loss_of_labels = pytest.mark.parametrize("name", LOSSES)

REDUCERS = {
    "default": lambda: None,
    "divisor": reducers.DivisorReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0),
    "class_weighted": lambda: reducers.ClassWeightedReducer(torch.ones(CLASSES)),
    "multiple": lambda: reducers.MultipleReducers({"task_loss": reducers.MeanReducer()}, reducers.SumReducer()),
}

ALIKE = [reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer]  # of the losses alone

# What a user changes of a loss as training goes on.
SCHEDULES = {
    AdvBCTLoss: lambda loss: loss.set_progress(0.8),
    BCTLoss: lambda loss: setattr(loss, "influence_weight", 2.5),
    UniBCTLoss: lambda loss: setattr(loss, "influence_weight", None if loss.influence_weight else 2.5),
}


def step(loss_func, *arguments, **kwargs):
    embeddings, labels = batch()
    loss = loss_func(embeddings, labels, *arguments, **kwargs)
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all() and embeddings.grad.abs().sum() > 0
    return loss.detach()


@every_loss
@pytest.mark.parametrize("reducer", REDUCERS)
def test_reducers(name, reducer):
    step(build(name, reducer=REDUCERS[reducer]()), **references(name))


@pytest.mark.parametrize(("name", "reducer"), list(zip([*LOSSES, *ALIGNED, *PAIRED], itertools.cycle(ALIKE))))
def test_reducers_that_ask_for_the_same(name, reducer):
    step(build(name, reducer=reducer()), **references(name))


@every_loss
def test_do_nothing_reducer_returns_the_named_terms(name):
    loss_func = build(name, reducer=reducers.DoNothingReducer())
    loss_dict = loss_func(*batch(), **references(name))
    assert list(loss_dict) == loss_func.sub_loss_names()
    assert all({"losses", "indices", "reduction_type"} <= set(term) for term in loss_dict.values())


@every_loss
def test_per_anchor_reducer(name):
    embeddings, labels = batch()
    loss_func = build(name, reducer=reducers.PerAnchorReducer())
    loss_func(embeddings, labels, **references(name)).backward()
    assert torch.isfinite(embeddings.grad).all()


@every_loss_of_labels
def test_terms_add_up_to_the_loss(name):
    loss_func = build(name)
    assert loss_func.terms == {}
    loss = step(loss_func)
    assert set(loss_func.terms) == set(loss_func.sub_loss_names())
    torch.testing.assert_close(sum(loss_func.terms.values()), loss)


@every_loss
def test_embedding_regularizer(name):
    plain = step(build(name), **references(name))
    loss_func = build(name, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3)
    expected = plain + 0.3 * regularizers.LpRegularizer()(batch()[0])
    torch.testing.assert_close(step(loss_func, **references(name)), expected.detach())


@every_loss
def test_collect_stats_changes_nothing(name):
    assert step(build(name, collect_stats=True), **references(name)) == step(build(name), **references(name))


@every_loss_of_labels
@pytest.mark.parametrize("miner", [miners.BatchHardMiner(), miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
def test_miner_tuples(name, miner):
    step(build(name), miner(*batch()))


@every_loss
def test_state_dict_round_trip(name):
    source, target = build(name, seed=0), build(name, seed=1)
    has_state = bool(source.state_dict())
    assert (step(source, **references(name)) != step(target, **references(name))) == has_state
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert step(source, **references(name)) == step(target, **references(name))


@every_loss
def test_a_training_that_is_resumed_goes_on_as_it_would_have(name):
    """Whatever calls and users change of a loss, in training, is in its state."""
    source, target = build(name, seed=0), build(name, seed=1)
    for _ in range(3):
        step(source, **references(name))
    SCHEDULES.get(type(source), lambda loss: None)(source)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for _ in range(2):
        assert step(source, **references(name)) == step(target, **references(name))


@pytest.mark.parametrize("name", ["bct", "unibct", "bct_default"])
def test_states_without_a_weight_are_still_loaded(name):
    source, target = build(name, seed=0), build(name, seed=0)
    source.influence_weight = 3.0
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    target.load_state_dict(state)
    assert target.influence_weight == build(name).influence_weight


@every_loss
def test_pmls_records_find_nothing_that_they_cannot_name(name):
    """They go into every dict of a module, and take a hook that holds its module for a thing to record."""
    assert not any(module._load_state_dict_pre_hooks for module in build(name).modules())


@every_paired_loss
def test_labels_of_the_old_embeddings_may_be_any_copy_or_left_out(name):
    """PML drops the pairs of a sample with itself where both labels are one object: here they are the positives."""
    labels = batch()[1]
    expected = step(build(name), **references(name))
    for ref_labels in (labels, labels.clone(), labels.int()):
        embeddings, labels = batch()
        loss = build(name)(embeddings, labels, ref_labels=ref_labels, **references(name))
        torch.testing.assert_close(loss.detach(), expected)
    embeddings, labels = batch()
    torch.testing.assert_close(build(name)(embeddings, labels, ref_labels=labels, **references(name)), loss)


@every_paired_loss
def test_old_embeddings_get_no_gradient_and_must_be_given(name):
    embeddings, labels = batch()
    old = references(name)["ref_emb"].requires_grad_()
    build(name)(embeddings, labels, ref_emb=old).backward()
    assert old.grad is None
    with pytest.raises(ValueError, match="ref_emb must be given"):
        build(name)(embeddings, labels)


@every_loss
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(name, duplicate):
    """Of a loss as it was made, and of one that was called."""
    loss_func = build(name)
    for _ in range(2):
        twin = duplicate(loss_func)
        assert step(twin, **references(name)) == step(loss_func, **references(name))


@every_loss_without_a_draw
def test_train_and_eval_mode_give_the_same(name):
    assert step(build(name).train(), **references(name)) == step(build(name).eval(), **references(name))


@every_loss_of_labels
def test_old_tensors_are_buffers_and_follow_to(name):
    loss_func = build(name)
    frozen = {key for key, _ in loss_func.named_buffers()}
    assert any(is_fixed(key) for key in frozen)
    assert not any(is_fixed(key) for key, _ in loss_func.named_parameters())
    loss_func.to("meta")
    everything = {**loss_func.state_dict(), **dict(loss_func.named_buffers())}
    tensors = {key: tensor for key, tensor in everything.items() if not key.endswith("_extra_state")}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def is_fixed(key):
    """Tell whether a tensor is the old system's, in the loss or in one that it holds, or fixed from the start."""
    return any(part.startswith(("old_", "simplex")) for part in key.split("."))


@every_loss
def test_inputs_are_not_changed(name):
    embeddings, labels = batch()
    before = embeddings.detach().clone(), labels.clone()
    others = references(name)
    build(name)(embeddings, labels, **others).backward()
    assert embeddings.equal(before[0]) and labels.equal(before[1])
    assert all(tensor.equal(references(name)[key]) for key, tensor in others.items())


@every_loss_without_a_draw
def test_permuted_batch(name):
    embeddings, labels = batch()
    order, others = torch.randperm(len(labels)), references(name)
    permuted = build(name)(embeddings[order], labels[order], **{key: other[order] for key, other in others.items()})
    torch.testing.assert_close(permuted, build(name)(embeddings, labels, **others))


@every_loss
def test_one_sample_and_one_class(name):
    for n in (1, 4):
        embeddings, _ = batch(n)
        loss = build(name)(embeddings, torch.zeros(n, dtype=torch.long), **references(name, n))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(embeddings.grad).all()


@every_loss
def test_autocast(name):
    embeddings, labels = batch()
    loss_func, expected = build(name), build(name)(embeddings, labels, **references(name))
    before = {key: tensor.dtype for key, tensor in loss_func.state_dict().items()}
    low = embeddings.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_func(low, labels, **{key: other.bfloat16() for key, other in references(name).items()})
    loss.backward()
    assert torch.isfinite(low.grad).all() and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.1)
    assert {key: tensor.dtype for key, tensor in loss_func.state_dict().items()} == before


@every_loss_of_labels
def test_in_multiple_losses(name):
    embeddings, labels = batch()
    both = pml_losses.MultipleLosses([build(name), pml_losses.TripletMarginLoss()], weights=[0.5, 1.0])
    expected = 0.5 * build(name)(embeddings, labels) + pml_losses.TripletMarginLoss()(embeddings, labels)
    torch.testing.assert_close(both(embeddings, labels), expected)


@every_loss
def test_one_value_at_most_is_read_back_from_the_device_in_a_step(name):
    loss_func, (embeddings, labels) = build(name), batch()
    with Reads() as reads:
        loss_func(embeddings, labels, **references(name)).backward()
    assert reads.ours.total() <= 1, reads.ours


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % CLASSES


@every_loss_of_labels
def test_one_step_of_a_pml_trainer(name):
    torch.manual_seed(0)
    model, loss_func = torch.nn.Linear(4, WIDTH), build(name)
    models = {"trunk": model}
    optimizers = {"trunk_optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    before = copy.deepcopy((model.state_dict(), loss_func.state_dict()))
    if list(loss_func.parameters()):
        optimizers["metric_loss_optimizer"] = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    trainer = trainers.MetricLossOnly(
        models,
        optimizers,
        10,
        {"metric_loss": loss_func},
        Samples(),
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        dataloader_num_workers=0,
        iterations_per_epoch=1,
    )
    trainer.train()
    assert not model.weight.equal(before[0]["weight"])
    for key, tensor in loss_func.state_dict().items():
        stays = name not in BALANCED if "balance." in key else is_fixed(key) or key.endswith("_extra_state")
        assert stays == tensor.equal(before[1][key])


class CountingTrainer(CompatibleMetricLossOnly):
    def calculate_loss(self, curr_batch):
        with Reads() as self.reads:
            super().calculate_loss(curr_batch)


@every_loss
@pytest.mark.parametrize("stored", [False, True])
def test_one_value_at_most_is_read_back_in_a_step_of_our_trainer(name, stored):
    torch.manual_seed(0)
    model, old_model, loss_func = torch.nn.Linear(4, WIDTH), torch.nn.Linear(4, WIDTH), build(name)
    old = {"old_embeddings": torch.randn(20, WIDTH)} if stored else {"old_model": old_model}
    trainer = CountingTrainer(
        {"trunk": model},
        {"trunk_optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
        10,
        {"metric_loss": loss_func},
        IndexedDataset(Samples()),
        dataloader_num_workers=0,
        iterations_per_epoch=1,
        **old,
    )
    trainer.train()
    assert trainer.reads.ours.total() <= 1, trainer.reads.ours


def run_rank(rank, world_size, rendezvous, results):
    """Every loss, wrapped for distributed training, on this rank's share of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for name in [*LOSSES, *ALIGNED, *PAIRED]:
        embeddings, labels = batch()
        own = embeddings.detach().chunk(world_size)[rank].requires_grad_()
        others = {key: other.chunk(world_size)[rank] for key, other in references(name).items()}
        loss = pml_distributed.DistributedLossWrapper(build(name))(own, labels.chunk(world_size)[rank], **others)
        loss.backward()
        results[name, rank] = loss.item(), own.grad.numpy()
    torch.distributed.barrier()  # torch 2.4 hangs where one process tears down while another still works
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    if request.param == 1:
        threads, results = torch.get_num_threads(), {}
        run_rank(0, 1, f"file://{folder / 'rendezvous'}", results)
        torch.set_num_threads(threads)
        return 1, results
    return request.param, run_ranks(run_rank, request.param, folder)


@every_loss_without_a_draw
def test_distributed_loss_wrapper(name, ranks):
    """PML multiplies the loss by the world size; only the own rows carry a gradient."""
    world_size, results = ranks
    embeddings, labels = batch()
    expected = build(name)(embeddings, labels, **references(name))
    expected.backward()
    for rank, grad in enumerate(embeddings.grad.chunk(world_size)):
        loss, own_grad = results[name, rank]
        assert loss == pytest.approx(world_size * expected.item(), rel=1e-5)
        torch.testing.assert_close(torch.from_numpy(own_grad), world_size * grad, rtol=1e-4, atol=1e-6)
