"""Any pair or triplet loss, between a new model and an old one."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_values
from .._host import BaseMiner, DoNothingReducer
from .._host import losses as pml_losses
from .._rows import no_autocast
from ..frozen import class_weights
from ..frozen.old_references import check_references
from ._base import NamedTermsLoss
from ._reduction import reduced
from ._task import steady_for
from .old_rows import check_row_values

Tuples = tuple[torch.Tensor, ...]

# PML's losses that compare no anchor with a reference of another set, by name, as not every version has all of them.
# Those with class weights are known by these.
_WITHOUT_REFERENCES = {
    "FastAPLoss",
    "HistogramLoss",
    "InstanceLoss",
    "ManifoldLoss",
    "NPairsLoss",
    "PNPLoss",
    "RankedListLoss",
    "SmoothAPLoss",
    "ThresholdConsistentMarginLoss",
    "VICRegLoss",
}


class CrossModelLoss(NamedTermsLoss):
    r"""Train new embeddings as queries of old ones, by any PML pair or triplet loss.

    .. math:: L = L_{pair}(f_n \to f_o),\qquad L_{symmetric} = \tfrac{1}{2} L_{pair}(f_n \to f_o) + \tfrac{1}{2}
        L_{pair}(f_o \to f_n)

    :math:`L_{pair}(a \to r)` takes anchors from a, positives and negatives from r. An item's own old embedding is a
    positive, always: PML on its own drops it where both labels are one object, and keeps it where one is a copy.

    Args:
        loss: any PML pair or triplet loss that takes ``ref_emb`` (``ContrastiveLoss``, ``TripletMarginLoss``,
            ``MultiSimilarityLoss``, ``NTXentLoss``, ``SupConLoss``, ``CircleLoss``, ...). It keeps its own distance
            and reducer, and its parameters are in ``parameters()``.
        miner: a PML miner, called ``miner(new, labels, old, ref_labels)``; the loss gets its tuples. None: all pairs,
            or the ``indices_tuple`` of the call.
        symmetric: add the term with old anchors and new references. The miner is then called the other way round too;
            tuples that were given, and those of a miner that needs new anchors (as ``RegressionMiner``), are turned
            round as pairs.
        **kwargs: ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``; ``loss`` has reduced each
            term when ``reducer`` gets it.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient, fitted to the old width
          (:func:`pml_compat.fit_width`); labels ``(N,)``, not needed with an indices_tuple; indices_tuple: anchors
          into ``embeddings``, the others into ``ref_emb``
        - ref_emb ``(M, D)``, old, receives no gradient; ref_labels ``(M,)``. Without ``ref_labels`` it has the rows of
          ``embeddings``; with them it may be of any items, such as a bank
        - output: scalar, float32 or better; ``terms["new_to_old_loss"]``, and ``terms["old_to_new_loss"]`` where
          it is symmetric, after the call, as they went into the sum
    Raises:
        ValueError: ``loss`` with class weights, without references, with ``swap`` or a ``DoNothingReducer``; ``miner``
            no PML miner; a ``distance``. In a call: ``ref_emb`` missing or on another device;
            ``ref_labels`` missing for other rows; embeddings empty, NaN or infinite; labels missing;
            an ``indices_tuple`` beside a miner, or one of ``DistributedLossWrapper(efficient=True)``, which drops the
            own old embedding: leave ``efficient`` off, or take ``GatheredLoss``.
    Example:
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> new, old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> loss_func = CrossModelLoss(ContrastiveLoss())
        >>> loss_func(new, torch.tensor([0, 1]), ref_emb=old)  # sqrt(2) from the first item's own, 0 from a negative
        tensor(2.4142)
        >>> loss_func.terms
        {'new_to_old_loss': tensor(2.4142)}
    """

    def __init__(
        self, loss: torch.nn.Module, miner: BaseMiner | None = None, *, symmetric: bool = False, **kwargs: Any
    ) -> None:
        self.symmetric = symmetric  # before PML's __init__, which asks for the names of the terms
        if "distance" in kwargs:
            raise ValueError("distance must be given to the pair loss: CrossModelLoss(ContrastiveLoss(distance=...))")
        super().__init__(**kwargs)
        _check_pair_loss(loss)
        if miner is not None and not isinstance(miner, BaseMiner):
            raise ValueError(
                f"miner must be a PML miner (BaseMiner), got {type(miner).__name__}; "
                "tuples of indices go into the call, as indices_tuple"
            )
        self.loss, self.miner = loss, miner

    def _sub_loss_names(self) -> list[str]:
        return ["new_to_old_loss", "old_to_new_loss"] if self.symmetric else ["new_to_old_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check the tuples that are given, too; without a miner they stand for labels."""
        if self._without_labels(labels, indices_tuple):
            return check_row_values(embeddings, ref_emb)
        super().check_given(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        if indices_tuple is not None:
            self._check_tuples(indices_tuple, labels, labels if ref_labels is None else ref_labels)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """Return each term; the pair loss has reduced it."""
        if self._without_labels(labels, indices_tuple) and ref_emb is not None:
            stand_ins = (torch.arange(len(rows), device=embeddings.device) for rows in (embeddings, ref_emb))
            new, _, old, _ = check_references(embeddings, next(stand_ins), ref_emb, next(stand_ins))
        else:
            new, labels, old, ref_labels = check_references(embeddings, labels, ref_emb, ref_labels)
        new = steady_for(self.loss, new, embeddings.dtype)
        with no_autocast(new):
            tuples = indices_tuple if self.miner is None else self.miner(new, labels, old, ref_labels)
            loss = self.loss(new, labels, tuples, old, ref_labels)
            if not self.symmetric:
                return {"new_to_old_loss": reduced(loss)}
            if self.miner is not None and not getattr(self.miner, "new_anchors_only", False):
                tuples = self.miner(old, ref_labels, new.detach(), labels)
            elif tuples is not None:
                tuples = _turned_round(tuples)
            other = self.loss(old, ref_labels, tuples, new, labels)
        return {"new_to_old_loss": reduced(loss / 2), "old_to_new_loss": reduced(other / 2)}

    def _without_labels(self, labels: Any, indices_tuple: Any) -> bool:
        return labels is None and indices_tuple is not None and self.miner is None

    def _check_tuples(self, indices_tuple: Tuples, labels: torch.Tensor, ref_labels: torch.Tensor) -> None:
        fix = "leave efficient off in DistributedLossWrapper, which makes tuples of its own, or take GatheredLoss"
        if self.miner is not None:
            raise ValueError(f"indices_tuple must be None where the loss has a miner, got tuples; give one or {fix}")
        if len(indices_tuple) != 4 or len(ref_labels) <= len(labels):
            return
        a1, p, a2, _ = indices_tuple

        def judge(others: float, own: float, same: float) -> None:
            negatives = len(labels) * len(ref_labels) - int(same)
            if not others and not own and len(a1) == int(same) - len(labels) and len(a2) == negatives:
                raise ValueError(
                    "indices_tuple must not leave out each item's own old embedding, got all pairs but these, as "
                    f"DistributedLossWrapper(efficient=True) makes them; {fix}"
                )

        differ = (labels != ref_labels[: len(labels)]).any()
        check_values([differ, (a1 == p).any(), (labels[:, None] == ref_labels).sum()], judge)


def _check_pair_loss(loss: Any) -> None:
    name = type(loss).__name__
    pairs = "take one of pairs or triplets, such as ContrastiveLoss, TripletMarginLoss or SupConLoss"
    if isinstance(loss, pml_losses.CrossBatchMemory):
        raise ValueError(
            "loss must take reference embeddings, CrossBatchMemory fills its queue with those of the new model itself; "
            "give the loss inside it, and stored old embeddings as ref_emb with their ref_labels: a bank of any size"
        )
    if not isinstance(loss, pml_losses.BaseMetricLossFunction):
        raise ValueError(f"loss must be a PML loss (BaseMetricLossFunction), got {name}; {pairs}, and wrap this loss")
    if _has_class_weights(loss):
        raise ValueError(
            f"loss must compare embeddings with each other, {name} compares them with its class weights; {pairs}, or "
            "hold a classification loss to an old model with BCTLoss or LCELoss"
        )
    if _WITHOUT_REFERENCES & {kind.__name__ for kind in type(loss).__mro__}:
        raise ValueError(f"loss must take reference embeddings and labels, {name} does not; {pairs}")
    if getattr(loss, "swap", False):
        raise ValueError("loss must not swap: PML would look for the positive's old embedding among the new ones")
    if isinstance(loss.reducer, DoNothingReducer):
        raise ValueError("loss must reduce to a number, got DoNothingReducer; leave its reducer out")


def _has_class_weights(loss: torch.nn.Module) -> bool:
    try:
        class_weights(loss)
    except ValueError:
        return isinstance(loss, pml_losses.WeightRegularizerMixin)
    return True


def _turned_round(tuples: Tuples) -> Tuples:
    """Return the pairs of tuples with references as anchors, each of them once."""
    a1, p, a2, n = tuples if len(tuples) == 4 else (tuples[0], tuples[1], tuples[0], tuples[2])
    positive = torch.stack([p, a1]).unique(dim=1)
    negative = torch.stack([n, a2]).unique(dim=1)
    return positive[0], positive[1], negative[0], negative[1]
