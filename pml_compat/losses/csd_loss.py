"""Contextual similarity distillation: a new embedding is as near to the old one's neighbours as the old one is."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_integer, check_number
from .._rows import unit_rows
from ._label_free import LabelFreeLoss
from ._reduction import per_sample
from .old_neighbours import as_gallery, check_rows_of_gallery, cosines_with_rows, nearest_old_rows


class CSDLoss(LabelFreeLoss):
    r"""Keep each item's similarities to the old embeddings around its own, without labels.

    .. math:: \ell_i = \operatorname{KL}\left(\operatorname{softmax}_k \frac{o_i \cdot g_{ik}}{T_{old}} \,\middle\|\,
        \operatorname{softmax}_k \frac{n_i \cdot g_{ik}}{T}\right), \quad k = 1, \dots, K

    :math:`n_i, o_i` are the unit rows of item i by the new and the old model; :math:`g_{i1} = o_i`, and the others are
    the old rows nearest to it, of a stored gallery or of the batch. What a new query finds in the old gallery is
    ordered by just these similarities. What lies farther off is not asked for, so that K should not be small.

    Args:
        gallery: ``(M, D_old)`` stored old embeddings, any number of them, such as a sample of the gallery: tensor,
            array or FrozenEmbeddings. They become a buffer of unit rows in their dtype, which is not in ``state_dict``.
            An item that is among them is also its own neighbour. None: the other rows of the batch.
        top_k: ``K``, with the item itself, 2 or more; where there are fewer rows, all of them.
        temperature: ``T``, above 0.
        old_temperature: :math:`T_{old}`, above 0; None: the same, which makes ``n_i = o_i`` the minimum.
        **kwargs: ``reducer`` (one loss a row, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better, 0 or more; 0 for one item alone without a gallery
        - memory: :math:`O(N K D_{old})`, and :math:`N` times 16,384 similarities while neighbours are looked for
        - time: :math:`O(N M D_{old})` a call to find the neighbours
    Raises:
        ValueError: ``gallery`` not 2-dimensional, empty, NaN or infinite; ``top_k`` < 2; a temperature that is not
            above 0; ``ref_emb`` missing, of another length or not as wide as the gallery; empty, NaN or infinite;
            another device; an ``indices_tuple``.
    Example:
        >>> new, old = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> CSDLoss(temperature=1.0)(new, ref_emb=old)  # of the first row e / (e + 1) = 0.73 against 0.27
        tensor(0.2311)

    Reference:
        Wu et al., "Contextual Similarity Distillation for Asymmetric Image Retrieval", CVPR 2022. Differs from public
        code in: one temperature for both (there ``temperature=1.0, old_temperature=0.01``, whose minimum is not where
        the new embedding is the old one); the item itself is always among its neighbours. Rows of length 0 have no
        direction and receive no gradient.
    """

    tells_by_its_value = True

    old_gallery: torch.Tensor | None

    def __init__(
        self,
        gallery: Any = None,
        top_k: int = 96,
        temperature: float = 0.1,
        old_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.register_buffer("old_gallery", as_gallery(gallery), persistent=False)
        self.top_k = check_integer(top_k, "top_k", minimum=2)
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        if old_temperature is None:
            old_temperature = self.temperature
        self.old_temperature = check_number(old_temperature, "old_temperature", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["temperature", "old_temperature"], is_stat=False)

    def check_rows(self, embeddings: torch.Tensor, ref_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows as wide as the gallery, and where it is."""
        return check_rows_of_gallery(embeddings, ref_emb, self.old_gallery)

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row."""
        new, old = (unit_rows(rows, dtype) for rows in (new_emb, old_emb))
        context = torch.cat([old[:, None], nearest_old_rows(old, self.old_gallery, self.top_k - 1)], dim=1)
        targets = cosines_with_rows(old, context) / self.old_temperature
        answers = cosines_with_rows(new, context) / self.temperature
        return {"loss": per_sample(divergences(targets, answers))}


def divergences(targets: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return ``KL(softmax(targets) || softmax(answers))`` over the last dimension."""
    log_p, log_q = torch.log_softmax(targets, dim=-1), torch.log_softmax(answers, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
