"""Every loss in every place that PML and this package have for one, in every dtype: pairwise, not the full product."""

import copy
import warnings

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import distributed as pml_distributed

from pml_compat.frozen import ClassCenters
from pml_compat.losses import (
    BCAlignerLoss,
    BCTLoss,
    CompatibleLoss,
    GatheredLoss,
    LCELoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    UniBCTLoss,
)
from pml_compat.losses._task import TaskAndTermsLoss
from pml_compat.transformations import LinearTransformation
from tests.cases import ALIGNED, CLASSES, LOSSES, PAIRED, WIDTH, batch, build, old_classifier, references

NAMES = [*LOSSES, *ALIGNED, *PAIRED]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def precise(dtype):
    return torch.promote_types(dtype, torch.float32)


def in_the_wrapper(loss_func):
    """As the task loss, where it has one of its own; else beside one."""
    if not loss_func.needs_ref_emb:
        return BCTLoss(loss_func, old_classifier(), 0.0, class_weight_length=None)
    if isinstance(loss_func, TaskAndTermsLoss):
        return CompatibleLoss(loss_func, PointAlignmentLoss(), 0.0, class_weight_length=None)
    return CompatibleLoss(pml_losses.ContrastiveLoss(pos_margin=9, neg_margin=-9), loss_func, 1.0)


def in_multiple_losses(loss_func):
    """PML's passes no ``ref_emb`` on."""
    both = pml_losses.MultipleLosses([loss_func], weights=[1.0])
    return loss_func if loss_func.needs_ref_emb else both


def in_the_distributed_wrapper(loss_func):
    wrapped = pml_distributed.DistributedLossWrapper(loss_func)

    def call(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DistributedLossWrapper is being used in a non-distributed")
            return wrapped(*args, **kwargs)

    return call


PLACES = {
    "bare": lambda loss_func: loss_func,
    "copied": copy.deepcopy,
    "wrapper": in_the_wrapper,
    "multiple": in_multiple_losses,
    "distributed": in_the_distributed_wrapper,
    "gathered": GatheredLoss,
}
# Each loss in each place, in one dtype there, and in each dtype in some place.
COMBINATIONS = [
    (name, place, DTYPES[(i + j) % len(DTYPES)]) for i, name in enumerate(NAMES) for j, place in enumerate(PLACES)
]


def called(loss_func, name, dtype, of=torch.float32):
    """Return value and gradient for embeddings that ``dtype`` holds, given as ``of``."""
    embeddings, labels = batch()
    embeddings = embeddings.detach().to(dtype).to(of).requires_grad_()
    given = {key: rows.to(dtype).to(of) for key, rows in references(name).items()}
    loss = loss_func(embeddings, labels, **given)
    loss.backward()
    return loss, embeddings.grad


@pytest.mark.parametrize(("name", "place", "dtype"), COMBINATIONS)
def test_every_place_and_dtype(name, place, dtype):
    """The same loss, and the gradient in the embeddings' dtype, as of the loss alone in float32 or better."""
    own = build(name).double() if dtype == torch.float64 else build(name)
    expected, gradient = called(copy.deepcopy(own), name, dtype, precise(dtype))
    loss, found = called(PLACES[place](own), name, dtype, dtype)
    assert loss.dtype == precise(dtype) and found.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(found.to(gradient.dtype), gradient, rtol=rounding, atol=rounding * gradient.abs().max())


def centers(width=WIDTH):
    torch.manual_seed(3)
    return ClassCenters(torch.randn(CLASSES, width), torch.arange(CLASSES), torch.full((CLASSES,), 0.8))


# Losses around a task loss, and what they are called with besides embeddings and labels.
AROUND = {
    "bct": (lambda task: BCTLoss(task, old_classifier(), 0.5), ()),
    "lce": (lambda task: LCELoss(task, centers(), 0.0, 1.0), ()),
    "unibct": (lambda task: UniBCTLoss(task, centers(6), 0.5), ()),
    "compatible": (lambda task: CompatibleLoss(task, PointAlignmentLoss(), 0.5), ("ref_emb",)),
    "nccl": (lambda task: NCCLLoss(task, 40, embedding_size=WIDTH, feature_weight=1.0), ("ref_emb",)),
    "bc_aligner": (lambda task: BCAlignerLoss(task, LinearTransformation(WIDTH, WIDTH), 0.5), ("ref_emb",)),
    "mixbct": (lambda task: MixBCTLoss(task, share=0.0, draw_weight=0.5), ("ref_emb",)),
}
TASKS = {
    "memory": lambda: pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(), WIDTH, 64),
    "multiple": lambda: pml_losses.MultipleLosses([pml_losses.TripletMarginLoss(), pml_losses.NTXentLoss()]),
    "self_supervised": lambda: pml_losses.SelfSupervisedLoss(pml_losses.NTXentLoss()),
}


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("task", TASKS)
def test_every_wrapper_takes_pmls_own_wrappers_for_task_loss(kind, task):
    make, needs = AROUND[kind]
    embeddings, labels = batch()
    other = references("fct")["ref_emb"]
    if task == "self_supervised":  # of two views: the second is the task loss's
        if needs:
            pytest.skip("ref_emb is of the old model here")
        torch.manual_seed(0)
        loss_func, expected = make(TASKS[task]()), TASKS[task]()(embeddings, ref_emb=other)
        loss = loss_func(embeddings, labels, ref_emb=other)
    else:
        torch.manual_seed(0)
        loss_func, alone = make(TASKS[task]()), TASKS[task]()
        given = {"ref_emb": other} if needs else {}
        for _ in range(2):  # a memory's second batch meets its first
            expected, loss = alone(embeddings, labels), loss_func(embeddings, labels, **given)
    torch.testing.assert_close(loss_func.terms["task_loss"], expected.detach())
    loss.backward()
    assert torch.isfinite(embeddings.grad).all()
    torch.testing.assert_close(sum(loss_func.terms.values()), loss.detach())
