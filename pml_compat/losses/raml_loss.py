"""Relations kept: new embeddings lie to the old ones, and to each other, as the old ones lie to each other."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_number
from .._rows import unit_rows
from ._label_free import LabelFreeLoss
from ._reduction import per_sample, reduced


class RAMLLoss(LabelFreeLoss):
    r"""Keep the old model's relations within a batch, without labels.

    .. math:: L = \operatorname{mean}_i (1 - n_i \cdot o_i)^2
        + \lambda_1 \operatorname{mean}_{i \ne j} (n_i \cdot o_j - o_i \cdot o_j)^2
        + \lambda_2 \operatorname{mean}_{i \ne j} (n_i \cdot n_j - o_i \cdot o_j)^2

    :math:`n_i, o_i` are the unit rows of item i by the new and the old model. The first term draws each new embedding
    to its old one; the second is what a search of the old gallery sees, the third what one of the new gallery does.
    Items of any class take part, also of classes that are in no training set.

    Args:
        cross_weight: :math:`\lambda_1`, 0 or more.
        self_weight: :math:`\lambda_2`, 0 or more.
        **kwargs: ``reducer`` (of the first term; the others are one number), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better; ``terms["point_loss"]``, ``["cross_loss"]`` and ``["self_loss"]``,
          multiplied by their weights; of one item the first alone
    Raises:
        ValueError: a weight < 0; ``ref_emb`` missing, or of another length; empty, NaN or infinite; another device; an
            ``indices_tuple``.
    Example:
        >>> new, old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
        >>> loss_func = RAMLLoss(cross_weight=1.0, self_weight=1.0)
        >>> float(loss_func(new, ref_emb=old)), float(loss_func.terms["point_loss"])
        (2.0, 0.5)

    Reference:
        Suma and Tolias, "Large-to-small Image Resolution Asymmetry in Deep Metric Learning", WACV 2023, whose weights
        are the defaults. Differs from it in: the old model is of any kind, and sees the same image; rows of length 0
        have no direction and receive no gradient.
    """

    tells_by_its_value = True

    def __init__(self, cross_weight: float = 0.7482, self_weight: float = 0.6778, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cross_weight = check_number(cross_weight, "cross_weight", minimum=0)
        self.self_weight = check_number(self_weight, "self_weight", minimum=0)
        self.add_to_recordable_attributes(list_of_names=["cross_weight", "self_weight"], is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["point_loss", "cross_loss", "self_loss"]

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row of the points, and one number of each kind of pairs."""
        new, old = (unit_rows(rows, dtype) for rows in (new_emb, old_emb))
        cross, old_pairs = new @ old.t(), old @ old.t()
        return {
            "point_loss": per_sample((1 - cross.diagonal()).square()),
            "cross_loss": reduced(self.cross_weight * of_pairs(cross, old_pairs)),
            "self_loss": reduced(self.self_weight * of_pairs(new @ new.t(), old_pairs)),
        }


def of_pairs(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference off the diagonal; 0 where there is nothing else."""
    difference = (ours - theirs).square()
    return (difference.sum() - difference.diagonal().sum()) / max(1, len(ours) * (len(ours) - 1))
