"""Losses on the rows of all ranks: every rank gets the value of one process, and DDP its gradient."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

from pml_compat.losses import CompatibleLoss, FastFillLoss, FCTLoss, FocalDistillationLoss, GatheredLoss
from tests.cases import ALIGNED, LOSSES, PAIRED, WIDTH, batch, build, references
from tests.processes import run_ranks

ROWS = 16
# Row counts of the ranks: a last batch that does not divide, and one that leaves a rank without any.
SIZES = {2: [9, 7], 3: [6, 0, 10]}
every_world = pytest.mark.parametrize("world_size", SIZES)


def of_registry(name):
    return lambda: (build(name), references(name))


def paired(make, **kwargs):
    """A loss called with old embeddings, whose labels are the very object given as labels."""
    return lambda: (make(), {**references("fct"), "ref_labels": "labels", **kwargs})


def several_old_models():
    torch.manual_seed(0)
    terms = {"a": FCTLoss(), "b": losses.ContrastiveLoss()}
    loss = CompatibleLoss(losses.NormalizedSoftmaxLoss(5, WIDTH), terms, {"a": 1.0, "b": 0.5})
    return loss, {"ref_emb": {"b": references("fct", seed=2)["ref_emb"], "a": references("fct")["ref_emb"]}}


def with_keywords():
    torch.manual_seed(0)
    return FastFillLoss(), {**references("fct"), "log_var": torch.randn(ROWS).double()}


def with_a_mask():
    torch.manual_seed(0)
    return FocalDistillationLoss(), {**references("fct"), "old_correct": torch.rand(ROWS) > 0.5}


def with_miner():
    return losses.TripletMarginLoss(), {"miner": miners.TripletMarginMiner(margin=0.3)}


CASES = {
    **{name: of_registry(name) for name in [*LOSSES, *ALIGNED, *PAIRED]},
    "pml_pairs": lambda: (losses.ContrastiveLoss(neg_margin=3), {}),
    "pml_pairs_of_old_and_new": paired(lambda: losses.ContrastiveLoss(neg_margin=3)),
    "pml_pairs_of_more_old_rows": lambda: (
        losses.ContrastiveLoss(neg_margin=3),
        {"ref_emb": references("fct", 2 * ROWS)["ref_emb"], "ref_labels": labels_of(2 * ROWS)},
    ),
    "pml_multiple": lambda: (losses.MultipleLosses([losses.NTXentLoss(), losses.TripletMarginLoss()]), {}),
    "compatible_same_labels_object": paired(lambda: build("compatible")),
    "several_old_models": several_old_models,
    "miner": with_miner,
    "keywords": with_keywords,
    "mask": with_a_mask,
}
WRAPPED = ["bct", "lce", "compatible", "bct_default", "lce_default"]  # also with the loss itself in DDP


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, WIDTH)).double()


def make_batch():
    torch.manual_seed(2)
    return torch.randn(ROWS, 4, dtype=torch.float64), batch(ROWS)[1]


def doubled(value, part):
    """Old embeddings in float64, one rank's rows of them."""
    if isinstance(value, dict):
        return {key: doubled(one, part) for key, one in value.items()}
    return value[part].double()


def step(name, part=slice(None), gather=lambda loss, miner: loss, wrap=lambda model: model):
    """Return the loss and every gradient of two calls on the rows ``part``; the second shows what a state does."""
    loss, options = CASES[name]()
    options = dict(options)
    miner = options.pop("miner", None)
    loss_func, model = gather(loss.double(), miner), make_model()
    wrapped = wrap(model)
    inputs, labels = make_batch()
    labels = labels[part]
    ref_labels = options.pop("ref_labels", None)
    old_part = part
    if isinstance(ref_labels, torch.Tensor):  # two old rows for each new one
        old_part = slice(*(edge and 2 * edge for edge in (part.start, part.stop)))
        options["ref_labels"] = ref_labels[old_part]
    elif ref_labels == "labels":
        options["ref_labels"] = labels
    if "ref_emb" in options:
        options["ref_emb"] = doubled(options["ref_emb"], old_part)
    options |= {name: value[part] for name, value in options.items() if not name.startswith("ref_")}
    for _ in range(2):
        embeddings = wrapped(inputs[part])
        if miner and loss_func is loss:
            options["indices_tuple"] = miner(embeddings, labels)
        value = loss_func(embeddings, labels, **options)
        value.backward()
    parameters = [*model.named_parameters(), *loss.named_parameters()]
    return value.item(), {name: p.grad.numpy() for name, p in parameters if p.grad is not None}


class RandomWeights(losses.BaseMetricLossFunction):
    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        weights = torch.rand(len(embeddings), dtype=embeddings.dtype)
        return {
            "loss": {"losses": weights * embeddings.sum(1), "indices": labels, "reduction_type": "element"},
        }


def rows(n, width=WIDTH, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def labels_of(n):
    return torch.arange(n) % 3


def bad_calls(rank, last):
    """What only the last rank does wrong, or otherwise: (loss, arguments, keyword arguments)."""
    pairs, fct = losses.ContrastiveLoss(), FCTLoss()
    n = 4 + rank
    emb, old, labels = rows(n), rows(n, seed=1).detach(), labels_of(n)
    spoilt = emb.detach().clone()
    spoilt[2, 0] = torch.nan
    triplet = (torch.zeros(1, dtype=torch.long),) * 3
    torch.manual_seed(rank)
    own = losses.NormalizedSoftmaxLoss(5, WIDTH)
    return {
        "nan": (fct, (spoilt.requires_grad_() if last else emb,), {"ref_emb": old}),
        "labels missing": (pairs, (emb, None if last else labels), {}),
        "labels short": (pairs, (emb, labels[:2] if last else labels), {}),
        "indices": (pairs, (emb, labels, triplet if last else None), {}),
        "width": (pairs, (rows(n, WIDTH + last), labels), {}),
        "no gradient": (pairs, (emb.detach() if last else emb, labels), {}),
        "old missing": (fct, (emb, labels), {} if last else {"ref_emb": old}),
        "old rows": (fct, (emb, labels), {"ref_emb": {"a": old, "b": old[1:] if last else old}}),
        "labels alone": (pairs, (emb, labels), {"ref_labels": labels} if last else {}),
        "keyword short": (
            FastFillLoss(),
            (emb,),
            {"ref_emb": old, "log_var": torch.zeros(2 if last else n)},
        ),
        "keyword missing": (FastFillLoss(), (emb,), {"ref_emb": old, **({} if last else {"log_var": torch.zeros(n)})}),
        "dtype": (fct, ((emb.detach().long() if last else emb.detach()),), {"ref_emb": old}),
        "list": (pairs, (emb.tolist() if last else emb, labels), {}),
        "other copy": (pairs, (emb, labels), {"ref_emb": old, "ref_labels": labels.clone() if last else labels}),
        "no rows": (pairs, (rows(0), labels_of(0)), {}),
        "other loss": (own, (emb, labels), {}),
        "other shape": (losses.NormalizedSoftmaxLoss(3 + rank, WIDTH), (emb, labels), {}),
    }


def run_world(rank, world_size, group):
    """Everything that the ranks of one group have to find."""
    first = sum(SIZES[world_size][:rank])
    part = slice(first, first + SIZES[world_size][rank])

    def gathered(loss, miner):
        return GatheredLoss(loss, miner, group)

    def in_ddp(loss, miner):
        return DistributedDataParallel(gathered(loss, miner), process_group=group)

    def ddp(model):
        return DistributedDataParallel(model, process_group=group)

    found = {name: step(name, part, gathered, ddp) for name in CASES}
    found |= {f"{name} in DDP": step(name, part, in_ddp, ddp) for name in WRAPPED}
    for name, (loss, arguments, options) in bad_calls(rank, rank == world_size - 1).items():
        try:
            GatheredLoss(loss, group=group)(*arguments, **options)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)

    torch.manual_seed(rank)  # ranks whose random numbers differ
    loss_func = GatheredLoss(RandomWeights(), group=group)
    found["random"] = [loss_func(rows(3, seed=rank), labels_of(3)).item() for _ in range(2)]
    found["next random number"] = torch.rand(()).item()

    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), WIDTH, memory_size=64)
    GatheredLoss(memory, group=group)(rows(3 + rank, seed=rank), labels_of(3 + rank))
    found["queue"] = memory.embedding_memory[: memory.queue_idx].numpy()
    with torch.no_grad():
        found["no_grad"] = GatheredLoss(losses.NTXentLoss(), group=group)(rows(3, seed=rank), labels_of(3)).item()
    low = rows(4, seed=rank).detach().bfloat16().requires_grad_()
    loss = GatheredLoss(FCTLoss(), group=group)(low, ref_emb=rows(4, seed=9).detach())
    loss.backward()
    found["bfloat16"] = str(loss.dtype), low.grad.float().numpy()
    return found


def run_rank(rank, world_size, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    two = dist.new_group([0, 1])  # by all ranks
    if rank < 2:
        results[2, rank] = run_world(rank, 2, two)
    results[3, rank] = run_world(rank, 3, None)
    dist.barrier()  # torch 2.4 hangs where one process tears down while another still works
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One start of three processes, for all tests; two of them are a group of their own as well."""
    return run_ranks(run_rank, 3, tmp_path_factory.mktemp("gathered"))


@pytest.fixture
def ranks(results, world_size):
    return [results[world_size, rank] for rank in range(world_size)]


def same(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert set(got[1]) == set(expected[1])
    for name, grad in expected[1].items():
        torch.testing.assert_close(torch.from_numpy(got[1][name]), torch.from_numpy(grad), rtol=1e-10, atol=1e-13)


@every_world
@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_what_one_process_gets(name, ranks):
    expected = step(name)
    assert any(abs(grad).max() > 1e-4 for grad in expected[1].values())
    for found in ranks:
        same(found[name], expected)


@every_world
@pytest.mark.parametrize("name", WRAPPED)
def test_a_loss_in_ddp(name, ranks):
    for found in ranks:
        same(found[f"{name} in DDP"], step(name))


@pytest.mark.parametrize("name", CASES)
def test_one_process_needs_no_group(name):
    same(step(name, gather=GatheredLoss), step(name))


def test_pmls_losses_that_are_called_otherwise():
    embeddings, labels = batch()
    view = references("fct")["ref_emb"]
    two_views = losses.SelfSupervisedLoss(losses.NTXentLoss())
    assert GatheredLoss(two_views)(embeddings, ref_emb=view) == two_views(embeddings, view)
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), WIDTH, memory_size=64)
    expected, mask = copy.deepcopy(memory), torch.arange(ROWS) < 6
    for _ in range(2):
        found = GatheredLoss(memory)(embeddings, labels, enqueue_mask=mask)
        assert found == expected(embeddings, labels, enqueue_mask=mask)
    assert memory.queue_idx == expected.queue_idx == 12


ERRORS = {
    "nan": r"embeddings must be finite, row \d+ has a NaN or an infinity; .*; in the batch of all ranks, \[4, 5",
    "labels short": r"^rank {last}: labels must have one entry a row: expected {rows}, got 2$",
    "labels missing": r"^every rank must be called alike, got on rank 0: embeddings \(N, 8\) torch.float32 on cpu, "
    r"with gradient; labels \(N,\) torch.int64 on cpu and .*on rank {last}: embeddings [^;]*gradient$",
    "indices": r"^rank {last}: indices_tuple must be None: .*; give the miner to GatheredLoss\(loss, miner=...\)",
    "width": r"called alike, got on rank 0: embeddings \(N, 8\) .* on rank {last}: embeddings \(N, 9\)",
    "no gradient": r"called alike, .* on rank {last}: embeddings \(N, 8\) torch.float32 on cpu; labels",
    "old missing": r"called alike, .* on rank {last}: embeddings \(N, 8\) [^;]*; labels [^;]*$",
    "old rows": r"^rank {last}: ref_emb must have the same number of rows under every name, got .*'b'\]\": {fewer}",
    "labels alone": r"^rank {last}: ref_emb must be given with ref_labels, got none$",
    "keyword short": r"^rank {last}: log_var must have one entry for each of {rows} embeddings, got \(2,\)$",
    "keyword missing": r"called alike, got on rank 0: .*keyword log_var \(N,\) torch.float32 on cpu and",
    "list": r"^rank {last}: embeddings must be a torch.Tensor, got list$",
    "dtype": r"^rank {last}: embeddings must be floating point, \(N, D\), got torch.int64 of shape \({rows}, 8\)$",
    "other copy": r"called alike, got on rank 0: .*ref_labels is labels and .* ref_labels \(N,\) torch.int64",
    "no rows": r"^embeddings must have rows on at least one rank, got 0 on each$",
    "other loss": r"^the loss must be the same on every rank, W on rank 1 is not that of rank 0: wrap it as Dist",
    "other shape": r"W on rank 1 is not that of rank 0: .* got \(shape, device, sum\) \(\(8, 3\), .* and \(\(8, 4\), ",
}


@every_world
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_on_one_rank_is_raised_on_all(name, ranks):
    """One ValueError and the same: the ranks go on together, none waits for another."""
    last = len(ranks) - 1
    pattern = (
        ERRORS[name].replace("{last}", str(last)).replace("{rows}", str(4 + last)).replace("{fewer}", str(3 + last))
    )
    for found in ranks:
        assert re.search(pattern, found[name]), found[name]
        assert found[name] == ranks[0][name]


@every_world
def test_random_losses_draw_the_same_on_every_rank(ranks):
    assert all(found["random"] == ranks[0]["random"] for found in ranks)
    first, second = ranks[0]["random"]
    assert first != second  # other numbers at each call
    assert len({found["next random number"] for found in ranks}) == len(ranks)  # outside the loss each has its own
    torch.manual_seed(1)
    for _ in range(2):  # one draw a call, of the seed
        torch.empty((), dtype=torch.int64).random_()
    assert torch.rand(()).item() == ranks[1]["next random number"]


@every_world
def test_queue_holds_the_rows_of_all_ranks_in_their_order(ranks):
    expected = torch.cat([rows(3 + rank, seed=rank) for rank in range(len(ranks))]).detach()
    for found in ranks:
        torch.testing.assert_close(torch.from_numpy(found["queue"]), expected)


@every_world
def test_value_without_a_gradient(ranks):
    world_size = len(ranks)
    whole = torch.cat([rows(3, seed=rank) for rank in range(world_size)]).detach()
    expected = losses.NTXentLoss()(whole, labels_of(3).repeat(world_size)).item()
    assert [found["no_grad"] for found in ranks] == pytest.approx([expected] * world_size)


@every_world
def test_low_precision(ranks):
    """The ranks' gradients, added up: R times the whole batch's."""
    world_size = len(ranks)
    whole = torch.cat([rows(4, seed=rank) for rank in range(world_size)]).detach().bfloat16().requires_grad_()
    FCTLoss()(whole, ref_emb=rows(4, seed=9).detach().repeat(world_size, 1)).backward()
    for found, grad in zip(ranks, whole.grad.split(4), strict=True):
        assert found["bfloat16"][0] == "torch.float32"
        torch.testing.assert_close(torch.from_numpy(found["bfloat16"][1]), world_size * grad.float(), rtol=0.02, atol=0)


def test_state_dict_and_copies():
    loss_func = GatheredLoss(build("bct"), miners.MultiSimilarityMiner())
    embeddings, labels = batch()
    expected = loss_func(embeddings, labels)
    for other in (copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert other(embeddings, labels) == expected
    assert set(loss_func.state_dict()) == {f"loss.{key}" for key in build("bct").state_dict()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatheredLoss("bct"), r"loss must be a loss object, got 'bct'"),
        (lambda: GatheredLoss(GatheredLoss(FCTLoss())), r"loss must not gather by itself, got GatheredLoss; give the"),
        (
            lambda: GatheredLoss(DistributedLossWrapper(FCTLoss())),
            r"must not gather by itself, got DistributedLossWrap",
        ),
        (lambda: GatheredLoss(FCTLoss(), miner=3), r"miner must be a PML miner, got 3"),
        (
            lambda: GatheredLoss(losses.ContrastiveLoss())(*batch(), (torch.zeros(1).long(),) * 3),
            r"indices_tuple must be None: its indices are of one rank's rows, the loss is of all; give the miner",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
