"""Where losses meet each other, PML's wrappers, state and devices."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning import losses
from torch.nn.parallel import DistributedDataParallel

from pml_compat.frozen import ClassCenters, FrozenClassifier, FrozenEmbeddings
from pml_compat.heads import BasisTransformation
from pml_compat.losses import (
    AdvBCTLoss,
    BCTLoss,
    BT2Loss,
    CompatibleLoss,
    CrossModelLoss,
    FCTLoss,
    FocalDistillationLoss,
    GatheredLoss,
    LCELoss,
    LwFLoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    RACTLoss,
    UniBCTLoss,
)
from tests.cases import ALIGNED, LOSSES, PAIRED, batch, build, references
from tests.processes import run_ranks

N, WIDTH, OLD_WIDTH, CLASSES = 16, 8, 5, 16


def rows(width=WIDTH, seed=0):
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def task(width=WIDTH):
    torch.manual_seed(0)
    return losses.NormalizedSoftmaxLoss(CLASSES, width)


def classifier(width=WIDTH):
    return FrozenClassifier(rows(width, seed=5), kind="cosine")


LABELS = torch.arange(N)


# --- PML's pair losses beside a task loss
def test_a_plain_pair_loss_keeps_the_own_old_embedding_as_a_positive():
    new, old = rows(), rows(seed=1)
    found = [
        CompatibleLoss(task(), pair, 1.0)(new, LABELS, ref_emb=old, ref_labels=ref_labels)
        for pair in (losses.ContrastiveLoss(), CrossModelLoss(losses.ContrastiveLoss()))
        for ref_labels in (None, LABELS, LABELS.clone())
    ]
    assert all(torch.equal(found[0], other) for other in found)
    expected = task()(new, LABELS) + losses.ContrastiveLoss()(new, LABELS, ref_emb=old, ref_labels=LABELS.clone())
    torch.testing.assert_close(found[0], expected)


def test_a_plain_pair_loss_gets_old_rows_without_a_gradient_finite_and_in_float32():
    loss_func, new = CompatibleLoss(task(), losses.ContrastiveLoss(), 1.0), rows().requires_grad_()
    old = rows(seed=1).requires_grad_()
    loss_func(new, LABELS, ref_emb=old).backward()
    assert old.grad is None and new.grad is not None
    with pytest.raises(ValueError, match="ref_emb must be finite, row 0"):
        loss_func(new, LABELS, ref_emb=old.detach() * torch.nan)
    low = loss_func(new.detach().half(), LABELS, ref_emb=old.detach())
    torch.testing.assert_close(low, loss_func(new, LABELS, ref_emb=old).detach(), rtol=1e-2, atol=0)


# --- one gradient for every parameter
def test_a_batch_without_a_known_class_gives_every_parameter_a_gradient():
    loss_func = AdvBCTLoss(torch.randn(3, WIDTH) / 8, torch.rand(3), [2, 0, 4])
    loss_func(rows().requires_grad_(), LABELS + 9, ref_emb=rows(seed=1)).backward()
    assert all(parameter.grad is not None for parameter in loss_func.parameters())


@pytest.mark.parametrize("name", [*LOSSES, *ALIGNED, *PAIRED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_row_has_a_small_gradient(name, dtype):
    embeddings, labels = batch()
    embeddings = embeddings.detach().clone()
    embeddings[1] = 0
    embeddings = embeddings.to(dtype).requires_grad_()
    build(name)(embeddings, labels, **references(name)).backward()
    assert torch.isfinite(embeddings.grad).all() and embeddings.grad.abs().max() < 1e4


@pytest.mark.parametrize("name", [*LOSSES, *ALIGNED, *PAIRED])
def test_the_loss_is_float32_and_no_less_precise_than_its_terms(name):
    embeddings, labels = batch()
    loss_func = build(name)
    loss = loss_func(embeddings.detach().bfloat16().requires_grad_(), labels, **references(name))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(sum(loss_func.terms.values()), loss.detach())


def test_a_grad_scaler_takes_float16_steps():
    embeddings = rows().half().requires_grad_()
    (PointAlignmentLoss()(embeddings, ref_emb=rows(seed=1)) * 2**16).backward()
    assert torch.isfinite(embeddings.grad).all()


def train_in_ddp(rank, world_size, rendezvous, results):
    """Three steps of AdvBCT on two ranks, the second without a known class on either."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    known = [2, 0, 4]
    loss_func = AdvBCTLoss(torch.randn(3, WIDTH) / 8, torch.rand(3), known)
    loss_func.set_progress(0.5)
    model = DistributedDataParallel(torch.nn.Linear(4, WIDTH))
    wrapped = DistributedDataParallel(GatheredLoss(loss_func))
    optimizer = torch.optim.SGD([*model.parameters(), *wrapped.parameters()], lr=0.1)
    moved = []
    for labels in (LABELS % 5, LABELS + 9, LABELS % 5):
        before = [parameter.detach().clone() for parameter in loss_func.parameters()]
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(rank)
        wrapped(
            model(torch.randn(N, 4, generator=generator)), labels, ref_emb=torch.randn(N, WIDTH, generator=generator)
        ).backward()
        optimizer.step()
        moved.append(any(not one.equal(two) for one, two in zip(before, loss_func.parameters(), strict=True)))
    results[rank] = moved, [parameter.detach().numpy() for parameter in loss_func.parameters()]
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_batch_without_a_known_class_trains_on_in_ddp(tmp_path):
    """Where a parameter gets no gradient DDP waits for it, and fails at the next step."""
    results = run_ranks(train_in_ddp, 2, tmp_path)
    (moved, first), (_, second) = results[0], results[1]
    assert moved == [True, True, True]
    assert all((one == two).all() for one, two in zip(first, second, strict=True))


# --- names and nesting
def test_old_models_may_be_named_as_people_name_them():
    loss_func = CompatibleLoss(task(), {"v1.0": FCTLoss(), "v1.1": PointAlignmentLoss()}, {"v1.0": 0.5, "v1.1": None})
    loss_func(rows().requires_grad_(), LABELS, ref_emb={"v1.0": rows(seed=1), "v1.1": rows(seed=2)}).backward()
    assert set(loss_func.terms) == {"task_loss", "v1.0", "v1.1"}
    CompatibleLoss(task(), {"v1.0": FCTLoss()}).load_state_dict(
        CompatibleLoss(task(), {"v1.0": FCTLoss()}).state_dict()
    )
    for name in ("loss", "reducer", "keys", "", 3):
        with pytest.raises(ValueError, match="old_losses must have names"):
            CompatibleLoss(task(), {name: FCTLoss()})


def test_a_wrapper_among_the_old_losses_is_refused_and_as_the_task_loss_right():
    inner = BCTLoss(task(), classifier(), 1.0)
    with pytest.raises(ValueError, match=r"which would count twice, got BCTLoss .* CompatibleLoss\(BCTLoss"):
        CompatibleLoss(task(), inner)
    new, old = rows(), rows(seed=1)
    nccl = NCCLLoss(task(), 32, embedding_size=WIDTH, feature_weight=1.0)
    for loss_func, given in ((inner, {}), (nccl, {"ref_emb": old})):
        expected = copy.deepcopy(loss_func)(new, LABELS, **given) + 0.5 * FCTLoss()(new, ref_emb=old)
        torch.testing.assert_close(CompatibleLoss(loss_func, FCTLoss(), 0.5)(new, LABELS, ref_emb=old), expected)


def test_a_copy_of_the_model_alone_is_no_longer_the_losss():
    basis = BasisTransformation(6, OLD_WIDTH, 2)
    model, centers = torch.nn.Sequential(torch.nn.Linear(4, 11), basis), ClassCenters(rows(OLD_WIDTH), LABELS)
    loss_func = BT2Loss(task(6), basis, centers, match_weight=0.0)
    inputs, old = torch.randn(N, 4), rows(OLD_WIDTH, seed=1)
    loss_func(model(inputs), LABELS, ref_emb=old).backward()
    for lose in (lambda z: z, torch.Tensor.double, lambda z: z.half().clone()):
        with pytest.raises(ValueError, match=r"must come from the basis that the loss was made with.*deepcopy"):
            loss_func(lose(copy.deepcopy(model)(inputs)), LABELS, ref_emb=old)
    both = copy.deepcopy((model, loss_func))
    both[1](both[0](inputs), LABELS, ref_emb=old).backward()


# --- states
FEW = 4


def few_rows(known, seed, width=WIDTH):
    """One row a label, in the order of ``known``."""
    return rows(width, seed)[:FEW][known]


def few_task(width=WIDTH):
    return losses.ArcFaceLoss(FEW, width)


def few_centers(known, seed, width=WIDTH):
    return ClassCenters(few_rows(known, seed, width), torch.tensor(known), torch.full((len(known),), 0.3))


def few_classifier(known, seed):
    return FrozenClassifier(few_rows(known, seed), labels=known, kind="cosine")


def few_balls(known, seed):
    radii = torch.tensor([0.1, 0.2, 0.3, 0.4])[known]
    loss_func = AdvBCTLoss(few_rows(known, seed) / 8, radii, known, adversarial_weight=0.0)
    torch.nn.init.zeros_(loss_func.elasticity)  # else drawn, row by row
    return loss_func


LABELLED = {
    "bct": lambda known, seed: BCTLoss(few_task(), few_classifier(known, seed), 1.0),
    "bct_default": lambda known, seed: BCTLoss(few_task(), few_classifier(known, seed)),
    "unibct": lambda known, seed: UniBCTLoss(few_task(), few_centers(known, seed), 1.0),
    "lce": lambda known, seed: LCELoss(few_task(), few_centers(known, seed), 100.0, 1.0),
    "lce_default": lambda known, seed: LCELoss(few_task(), few_centers(known, seed)),
    "adv": few_balls,
    "lwf": lambda known, seed: LwFLoss(few_classifier(known, seed)),
    "focal": lambda known, seed: FocalDistillationLoss(few_centers(known, seed)),
    "focal_logits": lambda known, seed: FocalDistillationLoss(few_classifier(known, seed), kind="logits"),
}


@pytest.mark.filterwarnings("ignore:LCELoss leaves out")
@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(("saved", "made"), [([2, 0, 3, 1], [0, 1, 2, 3]), ([3, 1], [0, 1])])
def test_a_state_brings_its_own_labels(name, saved, made):
    """What follows from the order of the classes, or from which there are, follows from what was loaded."""
    new, old, labels = rows(), rows(seed=1), LABELS % FEW
    torch.manual_seed(0)
    source = LABELLED[name](saved, 5)
    torch.manual_seed(1)
    target = LABELLED[name](made, 6)
    given = {"ref_emb": old} if source.needs_ref_emb else {}
    state = copy.deepcopy(source.state_dict())
    expected = source(new, labels, **given)
    assert not torch.isclose(target(new, labels, **given), expected)
    target.load_state_dict(state)
    torch.testing.assert_close(target(new, labels, **given), expected)
    torch.manual_seed(0)
    in_order = LABELLED[name](sorted(saved), 5)
    torch.testing.assert_close(in_order(new, labels, **given), expected)


# --- what the old embeddings come in, and how wide
def test_old_embeddings_may_be_arrays_and_stores_but_no_lists():
    new, old = rows(), rows(seed=1)
    for loss_func in (PointAlignmentLoss(), RACTLoss(), CrossModelLoss(losses.ContrastiveLoss())):
        expected = loss_func(new, LABELS, ref_emb=old)
        for given in (old.numpy(), FrozenEmbeddings.from_array(old)):
            torch.testing.assert_close(loss_func(new, LABELS, ref_emb=given), expected)
            both = CompatibleLoss(task(), loss_func, 1.0)(new, LABELS, ref_emb=given)
            torch.testing.assert_close(both, task()(new, LABELS) + expected)
        with pytest.raises(ValueError, match=r"ref_emb must be a torch\.Tensor.*got list"):
            loss_func(new, LABELS, ref_emb=old.tolist())


FITTED = {
    "ract": RACTLoss,
    "point_alignment": PointAlignmentLoss,
    "cross_model": lambda: CrossModelLoss(losses.ContrastiveLoss(), symmetric=True),
    "focal": FocalDistillationLoss,
    "lwf": lambda: LwFLoss(classifier(OLD_WIDTH)),
    "adv": lambda: AdvBCTLoss(torch.randn(CLASSES, OLD_WIDTH) / 8, torch.rand(CLASSES)),
}


@pytest.mark.parametrize("name", FITTED)
def test_new_embeddings_are_fitted_to_the_old_width(name):
    new, old = rows(), rows(OLD_WIDTH, seed=1)
    torch.manual_seed(0)
    loss_func = FITTED[name]()
    found = loss_func(new, LABELS, ref_emb=old)
    torch.testing.assert_close(found, loss_func(new[:, :OLD_WIDTH], LABELS, ref_emb=old))
    torch.testing.assert_close(
        found, CompatibleLoss(task(), loss_func, 1.0)(new, LABELS, ref_emb=old) - task()(new, LABELS)
    )


@pytest.mark.parametrize("old_width", [OLD_WIDTH, WIDTH + 3])
def test_mixbct_of_two_widths(old_width):
    new, old = rows().requires_grad_(), rows(old_width, seed=1)
    MixBCTLoss(task(), share=0.5)(new, LABELS, ref_emb=old).backward()
    assert torch.isfinite(new.grad).all() and (new.grad != 0).any(1).all()


# --- what the task loss takes
def wrapped(loss):
    yield BCTLoss(loss, classifier(), 0.0), {}
    yield LCELoss(loss, ClassCenters(rows(), LABELS), 0.0, 0.0), {}
    yield CompatibleLoss(loss, FCTLoss(), 0.0), {"ref_emb": rows(seed=1)}
    yield CompatibleLoss(loss, PointAlignmentLoss(), 0.0), {"ref_emb": rows(seed=1)}


def test_losses_without_labels_are_wrapped_where_no_term_needs_them():
    new, other = rows(), rows(seed=3)
    pairs = (LABELS, LABELS.roll(1), LABELS, LABELS.roll(2))
    for loss_func, given in wrapped(losses.ContrastiveLoss()):
        torch.testing.assert_close(loss_func(new, None, pairs, **given), losses.ContrastiveLoss()(new, None, pairs))
    for inner in (losses.VICRegLoss(), losses.SelfSupervisedLoss(losses.NTXentLoss()), losses.DynamicSoftMarginLoss()):
        loss_func, expected = BCTLoss(inner, classifier(), 0.0), copy.deepcopy(inner)(new, ref_emb=other)
        torch.testing.assert_close(loss_func(new, ref_emb=other), expected)
    with pytest.raises(ValueError, match="labels must be given"):
        BCTLoss(losses.ContrastiveLoss(), classifier())(new, None, pairs)
    torch.testing.assert_close(
        CompatibleLoss(losses.ContrastiveLoss(), PointAlignmentLoss(), 1.0)(new, None, pairs, other),
        losses.ContrastiveLoss()(new, None, pairs) + PointAlignmentLoss()(new, ref_emb=other),
    )


def test_cross_batch_memory():
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), WIDTH, 32)
    expected = copy.deepcopy(memory)
    mask = torch.arange(N) < 6
    loss = BCTLoss(memory, classifier(), 0.0)(rows(), LABELS, enqueue_mask=mask)
    torch.testing.assert_close(loss, expected(rows(), LABELS, enqueue_mask=mask))
    with pytest.raises(ValueError, match=r"CrossBatchMemory fills its queue .* a bank of any size"):
        CrossModelLoss(memory)


def test_every_loss_has_terms_and_says_what_it_needs():
    for name in [*LOSSES, *ALIGNED, *PAIRED]:
        loss_func = build(name)
        assert loss_func.terms == {}
        loss_func(*batch(), **references(name))
        assert set(loss_func.terms) == set(loss_func.sub_loss_names())
        assert loss_func.needs_ref_emb == (name not in LOSSES), name
    assert not PointAlignmentLoss().needs_labels and RACTLoss().needs_labels
    assert BCTLoss(task(), classifier()).needs_labels and not BCTLoss(task(), classifier(), 0.0).needs_labels


def test_values_that_are_read_once_are_still_checked():
    new, old = rows(), rows(seed=1)
    loss_func = CompatibleLoss(task(), {"a": RACTLoss(), "b": PointAlignmentLoss()}, 1.0)
    broken = old.clone()
    broken[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"ref_emb\['b'\] must be finite, row 3"):
        loss_func(new, LABELS, ref_emb={"a": old, "b": broken})
    with pytest.raises(ValueError, match=r"labels must be in \[0, 15\], the task loss's classes, got 16"):
        loss_func(new, LABELS + 1, ref_emb=old)
    with pytest.raises(ValueError, match="ref_labels must equal labels"):
        loss_func(new, LABELS, ref_emb=old, ref_labels=LABELS.roll(1))
    nccl = NCCLLoss(task(), 32, embedding_size=WIDTH)
    with pytest.raises(ValueError, match="ref_emb must be finite"):
        nccl(new, LABELS, ref_emb=broken)
    assert int(nccl.old_queue_count) == 0  # nothing is kept of what is refused
    assert np.isfinite(GatheredLoss(loss_func)(new, LABELS, ref_emb=old).item())
