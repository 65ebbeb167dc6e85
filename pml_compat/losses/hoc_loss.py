"""A classifier that never moves, and each new embedding onto its old one, away from other classes' new ones."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_labels, check_number
from .._rows import no_autocast, unit_rows
from ..frozen.old_references import check_row_labels
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss
from .cores_loss import CoReSLoss
from .old_rows import check_old_rows


class HOCLoss(TaskAndTermsLoss):
    r"""Train by a fixed simplex, as :class:`CoReSLoss` does, and hold each new embedding to its old one.

    .. math:: L = \lambda \, L_{CoReS}(f_n, y) + (1 - \lambda) \operatorname{mean}_i \ell_i, \qquad
        \ell_i = -\mu \, o_i \cdot a_i + \log \sum_{j: y_j \ne y_i} e^{\mu \, o_i \cdot a_j}

    with unit rows :math:`a_i` (new) and :math:`o_i` (old). The simplex fixes where classes lie; the second term, how
    embeddings lie within and between them, which a model that is fine-tuned on other data would lose. For a chain that
    began with :class:`CoReSLoss`, on the same classes.

    Args:
        num_classes: C, of all classes there will ever be, 2 or more; that of the old model.
        task_share: :math:`\lambda`, in [0, 1]. Nothing is measured here, as the task loss is always the same.
        scale: :math:`\mu`, above 0; the larger, the more the nearest of the other classes count.
        **kwargs: ``reducer`` (of the second term, one loss a sample; default ``MeanReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, C - 1)``, as the network gives them, carries the gradient; labels ``(N,)`` from 0 to C - 1;
          indices_tuple: see :class:`CoReSLoss`
        - ref_emb ``(N, C - 1)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better, and below 0 where embeddings lie well; ``terms``: ``task_loss``,
          ``feature_loss``
    Raises:
        ValueError: ``num_classes`` < 2, ``task_share`` outside [0, 1], ``scale`` not above 0; embeddings or ``ref_emb``
            of another width; ``ref_emb`` missing or of another length; ``ref_labels`` that are not ``labels``;
            embeddings empty, NaN or infinite; labels missing or out of range.
    Example:
        >>> loss_func = HOCLoss(num_classes=3, task_share=0.0, scale=1.0)
        >>> loss_func(torch.eye(2), torch.tensor([0, 2]), ref_emb=torch.eye(2))
        tensor(-1.)

    Reference:
        Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
        Model Replacements", CVPR 2024; the share 0.1 and the scale 10 are those of its code. Differs from it in:
        same-class similarities are left out of the sum, where a product with 0 leaves 1 of each in it; a sample without
        negatives has a second term of 0.
    """

    def __init__(self, num_classes: int, task_share: float = 0.1, scale: float = 10.0, **kwargs: Any) -> None:
        super().__init__(CoReSLoss(num_classes), class_weight_length=None, **kwargs)
        self.task_share = check_number(task_share, "task_share", minimum=0)
        if task_share > 1:
            raise ValueError(f"task_share must be in [0, 1], got {task_share!r}")
        self.scale = check_number(scale, "scale", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["task_share", "scale"], is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "feature_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that they are classes, and those of both rows."""
        super().look_at_labels(labels, ref_labels)
        check_row_labels(check_labels(labels), ref_labels)

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return none."""
        return None, None

    def task(self, seen: torch.Tensor, given: Given, indices_tuple: Any, **task_arguments: Any) -> torch.Tensor:
        """Return the loss on the simplex, times its share."""
        return self.task_share * super().task(seen, given, indices_tuple, **task_arguments)

    def compute_terms(self, given: Given, rest: torch.Tensor) -> dict[str, Any]:
        """Return one loss a sample."""
        new_emb, old_emb = check_old_rows(rest, given.ref_emb, width=rest.shape[1])
        with no_autocast(rest):
            new_emb, old_emb = (unit_rows(rows, given.dtype) for rows in (new_emb, old_emb))
            losses = (1 - self.task_share) * feature_losses(new_emb, old_emb, given.labels, self.scale)
        return {"feature_loss": per_sample(losses)}


def feature_losses(new_emb: torch.Tensor, old_emb: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``(N,)``: how much nearer each old row is to other classes' new rows than to its own new row."""
    scores = scale * (old_emb @ new_emb.t())
    others = labels[:, None] != labels
    some = others.any(1)
    # A row without negatives keeps all its scores: the logarithm of an empty sum has no slope, not even one times 0.
    negatives = torch.where(others | ~some[:, None], scores, -torch.inf)
    return torch.where(some, negatives.logsumexp(1) - scores.diagonal(), 0.0)
