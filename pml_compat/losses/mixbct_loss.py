"""MixBCT: the task loss on a batch in which old embeddings stand in for some of the new ones."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .._checks import check_integer, check_number
from .._host import to_device
from .._rows import fit_width, no_autocast, unit_rows
from ..frozen import class_weights
from ..frozen.old_references import check_row_labels
from ._base import check_weight
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss
from .old_class_directions import OldClassDirections
from .old_rows import check_old_rows


class MixBCTLoss(TaskAndTermsLoss):
    r"""Train one classifier on new and old embeddings alike, which draws both into one space.

    .. math:: L = L_{task}(x, y) + \lambda \operatorname{mean}_i (1 - \cos(f_{n,i}, C^{-1/2} m_{y_i})), \quad
        x_i = \begin{cases} \hat f_{o,i} & i \in M \\ f_{n,i} & i \notin M \end{cases}

    :math:`M`, drawn anew at every call, is :math:`\lfloor share \cdot N \rfloor` of the rows whose old embedding is
    credible, or all of those where they are fewer. They train the class weights alone: for the task the new model's
    batch is smaller by ``share``. The second term, which the paper does not have, draws new embeddings to where their
    class stands in the old space: :math:`m` is the mean of the class's unit rows in the calls so far, :math:`C` are the
    second moments of all of them, which take off what all classes have in common. A pair loss, which has no classes, is
    drawn to each item's own old embedding. In eval mode nothing is replaced, there is no second term, and ``ref_emb``
    may be left out.

    Old rows come in at length 1, new ones as they are: the task loss has to judge directions alone, as PML's do by
    default (all but ``LargeMarginSoftmaxLoss`` and ``SphereFaceLoss``). The rows are drawn on the CPU by a generator
    that is in ``state_dict()``; under PML's ``DistributedLossWrapper`` every rank draws from the whole gathered batch.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        share: of the batch that is replaced, in [0, 1]; rounded down, so that a batch of 3 has none at 0.3.
        seed: of the draw, 0 or more.
        draw_weight: :math:`\lambda`, 0 or more, 0 is the paper's loss; None: as strong as the task loss
            (:class:`GradientBalance`).
        class_weight_length: above 0, see :func:`shorten_class_weights`; None leaves class weights as they are.
        **kwargs: ``embedding_regularizer`` (on the new embeddings, before any is replaced), ``embedding_reg_weight``,
            ``collect_stats``, which also records ``mixed_fraction``, the share that was replaced.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)`` of the new training set; indices_tuple: for
          the task loss
        - ref_emb ``(N, D)``: the old embeddings of the same rows, which receive no gradient; between widths that differ
          by :func:`pml_compat.fit_width`
        - ref_labels ``(N,)``: the same labels, or -1 at rows that are not credible, which PML's wrappers pass on too
        - credible ``(N,)`` bool: the rows that may be replaced; all by default
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``draw_loss``
    Raises:
        ValueError: ``draw_weight`` < 0; ``share`` outside [0, 1]; ``ref_emb`` missing in train mode, or of another
            length; ``credible`` not bool or of another length; ``ref_labels`` neither the labels nor -1; embeddings
            empty, NaN, infinite or on another device; labels missing, negative or past the task loss's classes.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> from pml_compat.frozen import credible_mask
        >>> old, labels = torch.randn(40, 16), torch.arange(40) % 10
        >>> mask = credible_mask(old, labels)  # once, over the training set
        >>> loss_func = MixBCTLoss(ArcFaceLoss(num_classes=10, embedding_size=16))
        >>> rows = torch.arange(8)  # of a batch
        >>> loss = loss_func(torch.randn(8, 16), labels[rows], ref_emb=old[rows], credible=mask[rows])

    Reference:
        Liang et al., "MixBCT: Towards Self-Adapting Backward-Compatible Training", 2023. Differs from the public code
        in: the second term; nothing is written in place; fewer credible rows than wanted are no error; the draw is
        seeded.
    """

    own_arguments = ("credible",)

    def __init__(
        self,
        loss: torch.nn.Module,
        *,
        share: float = 0.3,
        seed: int = 0,
        draw_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, balanced=("draw_loss",) if draw_weight is None else (), **kwargs)
        self.draw_weight = check_weight(draw_weight, "draw_weight")
        self.old_classes = None if self.num_classes is None else OldClassDirections(class_weights(loss))
        self.share = check_number(share, "share", minimum=0)
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {share!r}")
        self._generator = torch.Generator().manual_seed(check_integer(seed, "seed", minimum=0))
        self.add_to_recordable_attributes(list_of_names=["share"], is_stat=False)
        self.add_to_recordable_attributes(name="mixed_fraction", is_stat=True)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "draw_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """In training; else it is not read."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether new embeddings are drawn to where their class stands."""
        return self.draw_weight != 0

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item, where that is credible."""
        super().look_at_labels(labels, ref_labels)
        if self.training and ref_labels is not None and ref_labels.shape == labels.shape:
            check_row_labels(labels, torch.where(ref_labels == -1, labels, ref_labels))

    def parts(self, given: Given) -> tuple[torch.Tensor, Any]:
        """Return the mixed batch, and the old rows at length 1; in eval mode the new embeddings alone."""
        if not self.training:
            return given.embeddings, None
        new = given.embeddings
        _, old = check_old_rows(new, given.ref_emb)
        credible = _check_credible(given.own["credible"], len(new), given.ref_labels).to(new.device)
        chosen = self._draw(credible)
        if self.collect_stats:
            self.mixed_fraction = chosen.float().mean().item()
        old = unit_rows(fit_width(old, min(old.shape[1], new.shape[1])))
        return torch.where(chosen[:, None], fit_width(old, new.shape[1]), new), old

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return none: the old embeddings are in the mixed batch."""
        return None, None

    def task(self, seen: torch.Tensor, given: Given, indices_tuple: Any, **task_arguments: Any) -> torch.Tensor:
        """Return the task loss of the mixed batch, in which old embeddings keep their precision."""
        with no_autocast(seen) if self.training else nullcontext():
            return super().task(seen, given, indices_tuple, **task_arguments)

    def compute_terms(self, given: Given, rest: Any) -> dict[str, Any]:
        """Return how far the new embeddings are from where their class stands in the old space."""
        if rest is None or self.draw_weight == 0:
            return {"draw_loss": self.zero_loss()}
        with no_autocast(rest):
            new = unit_rows(given.embeddings[:, : rest.shape[1]], given.dtype)
            return {"draw_loss": self._drawn(new, rest, given.labels)}

    def _drawn(self, new: torch.Tensor, old: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return how far each new embedding is from where it is drawn, whatever is mixed."""
        aims = old if self.old_classes is None else self.old_classes(old, labels)
        losses = 1 - (new * aims).sum(1)
        if self.draw_weight is not None:
            losses = losses * self.draw_weight
        return per_sample(losses)

    def _draw(self, credible: torch.Tensor) -> torch.Tensor:
        """Return which rows are replaced, without asking the device how many are credible."""
        wanted = int(self.share * len(credible) + 1e-6)  # 0.29 * 100 is a little below 29 in floating point
        rank = to_device(torch.rand(len(credible), generator=self._generator), credible)
        order = torch.argsort(rank.masked_fill(~credible, 2.0))
        return torch.zeros_like(credible).index_fill_(0, order[:wanted], True) & credible

    def get_extra_state(self) -> torch.Tensor:
        """Return the generator's state, for ``state_dict()``."""
        return self._generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Go on drawing from ``state``."""
        self._generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])


def _check_credible(credible: Any, length: int, ref_labels: torch.Tensor | None) -> torch.Tensor:
    """Return which old embeddings may be used, ``(N,)`` bool."""
    is_mask = isinstance(credible, torch.Tensor) and credible.dtype == torch.bool and credible.shape == (length,)
    if credible is not None and not is_mask:
        got = f"{credible.dtype} {tuple(credible.shape)}" if isinstance(credible, torch.Tensor) else repr(credible)
        raise ValueError(f"credible must be a bool tensor with one entry a row, ({length},), got {got}")
    if ref_labels is None:
        return torch.ones(length, dtype=torch.bool) if credible is None else credible
    return ref_labels != -1 if credible is None else to_device(credible, ref_labels) & (ref_labels != -1)
