"""D3still: the order in which an old embedding finds its neighbours, kept by the new one."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_integer, check_number
from .._rows import unit_rows
from ._label_free import LabelFreeLoss
from ._reduction import per_sample
from .old_neighbours import as_gallery, check_rows_of_gallery, cosines_with_rows, nearest_old_rows

_SOFTENING = 0.1  # of the relative error


class D3StillLoss(LabelFreeLoss):
    r"""Keep how much nearer one old neighbour of an item is than another, and above all which of them, without labels.

    .. math:: \ell_i = \alpha (1 - n_i \cdot o_i) + \beta \, r_i(d'_{ijk} d_{ijk} < 0)
        + \gamma \, r_i(d'_{ijk} d_{ijk} \ge 0), \quad
        r_i(c) = \sqrt{\operatorname{mean}_{j,k} 1[c] \left(\frac{d'_{ijk} - d_{ijk}}{0.1 + |d_{ijk}|}\right)^2}

    :math:`n_i, o_i` are the unit rows of item i by the new and the old model, :math:`g_{ij}` the old rows nearest to
    :math:`o_i`, of a stored gallery or of the batch, :math:`d_{ijk} = o_i \cdot g_{ij} - o_i \cdot g_{ik}` how much
    nearer one is than the other to the old row, and :math:`d'_{ijk}` the same of the new row. The second term is of the
    pairs that the new query would find in another order, the third of all others.

    Args:
        gallery: ``(M, D_old)`` stored old embeddings, any number of them, such as a sample of the gallery: tensor,
            array or FrozenEmbeddings. They become a buffer of unit rows in their dtype, which is not in ``state_dict``.
            An item that is among them is also its own neighbour. None: the other rows of the batch.
        top_k: the nearest old rows that count, with the item itself, 3 or more; where there are fewer, all of them.
        point_weight: :math:`\alpha`, 0 or more.
        inconsistent_weight: :math:`\beta`, 0 or more, of the pairs whose order is turned.
        consistent_weight: :math:`\gamma`, 0 or more, of the other pairs.
        **kwargs: ``reducer`` (one loss a row and term, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better; ``terms["point_loss"]``, ``["inconsistent_loss"]`` and
          ``["consistent_loss"]``, multiplied by their weights; of one or two items alone, without a gallery, the first
        - memory: :math:`O(N K (K + D_{old}))`, and :math:`N` times 16,384 similarities while neighbours are looked for
        - time: :math:`O(N M D_{old})` a call to find the neighbours
    Raises:
        ValueError: ``gallery`` not 2-dimensional, empty, NaN or infinite; ``top_k`` < 3; a weight < 0; ``ref_emb``
            missing, of another length or not as wide as the gallery; empty, NaN or infinite; another device; an
            ``indices_tuple``.
    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> loss_func = D3StillLoss(gallery, point_weight=1.0)
        >>> loss = loss_func(torch.tensor([[0.6, 0.8]]), ref_emb=torch.tensor([[0.8, 0.6]]))
        >>> {name: round(float(term), 4) for name, term in loss_func.terms.items()}  # an error of 0.4 / 0.3, turned
        {'point_loss': 0.04, 'inconsistent_loss': 1.8856, 'consistent_loss': 0.0}

    Reference:
        Xie et al., "D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval", CVPR 2024, whose
        weights and number of neighbours are the defaults. Differs from public code in: the point term is a mean over
        the rows (there the norm over the batch, divided by its size, fades with the root of the batch size); pairs that
        are equally near count as they are (there a difference of 0 becomes 1); old rows outside the batch can be
        neighbours. Rows of length 0 have no direction and receive no gradient.
    """

    tells_by_its_value = True

    old_gallery: torch.Tensor | None

    def __init__(
        self,
        gallery: Any = None,
        top_k: int = 10,
        *,
        point_weight: float = 50.0,
        inconsistent_weight: float = 2.0,
        consistent_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.register_buffer("old_gallery", as_gallery(gallery), persistent=False)
        self.top_k = check_integer(top_k, "top_k", minimum=3)
        self.point_weight = check_number(point_weight, "point_weight", minimum=0)
        self.inconsistent_weight = check_number(inconsistent_weight, "inconsistent_weight", minimum=0)
        self.consistent_weight = check_number(consistent_weight, "consistent_weight", minimum=0)
        names = ["point_weight", "inconsistent_weight", "consistent_weight"]
        self.add_to_recordable_attributes(list_of_names=names, is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["point_loss", "inconsistent_loss", "consistent_loss"]

    def check_rows(self, embeddings: torch.Tensor, ref_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows as wide as the gallery, and where it is."""
        return check_rows_of_gallery(embeddings, ref_emb, self.old_gallery)

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row of each term."""
        new, old = (unit_rows(rows, dtype) for rows in (new_emb, old_emb))
        others = nearest_old_rows(old, self.old_gallery, self.top_k - 1)
        inconsistent, consistent = difference_errors(cosines_with_rows(new, others), cosines_with_rows(old, others))
        return {
            "point_loss": per_sample(self.point_weight * (1 - (new * old).sum(1))),
            "inconsistent_loss": per_sample(self.inconsistent_weight * inconsistent),
            "consistent_loss": per_sample(self.consistent_weight * consistent),
        }


def difference_errors(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(N,)`` roots of mean squared relative errors: of the pairs in another order, and of all others."""
    ours, theirs = (cosines[:, :, None] - cosines[:, None] for cosines in (ours, theirs))
    errors, turned = (ours - theirs) / (_SOFTENING + theirs.abs()), ours * theirs < 0
    count = max(1, errors.shape[1])
    of_turned, of_others = (torch.where(mask, errors, 0).flatten(1) for mask in (turned, ~turned))
    # Of a norm, not of a root: its gradient at 0 is 0.
    return torch.linalg.vector_norm(of_turned, dim=1) / count, torch.linalg.vector_norm(of_others, dim=1) / count
