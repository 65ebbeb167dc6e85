"""Regression-alleviating compatible training: each image against its own old embedding."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .._checks import check_integer, check_labels, check_number
from .._host import indices_tuple_not_supported
from .._rows import no_autocast, unit_rows
from ..frozen.old_references import check_row_labels
from ._base import NamedTermsLoss
from ._reduction import per_sample
from .old_rows import check_old_rows


class RACTLoss(NamedTermsLoss):
    r"""Bring each new embedding to the old embedding of its own image, away from old and new ones of other labels.

    With unit rows :math:`a_i` (new) and :math:`o_i` (old), and the negatives :math:`N_i = \{j: y_j \ne y_i\}`,

    .. math:: \ell_i = -\log \frac{e^{a_i \cdot o_i / \tau}}{e^{a_i \cdot o_i / \tau}
        + \sum_{j \in N_i} e^{a_i \cdot o_j / \tau} + \sum_{j \in N_i} e^{a_i \cdot a_j / \tau}}

    or, with ``form="triplet"``,

    .. math:: \ell_i = \operatorname{mean}_{j \in N_i} [m + \lVert a_i - o_i \rVert - \lVert a_i - o_j \rVert]_+
        + \operatorname{mean}_{j \in N_i} [m + \lVert a_i - o_i \rVert - \lVert a_i - a_j \rVert]_+

    The last sum of either is the regression term: while a gallery is re-embedded item by item, new queries meet new
    embeddings of other classes in it too. Other images of the same label are neither positives nor negatives. A
    sample without negatives has a loss of 0.

    Args:
        temperature: :math:`\tau`, above 0, of the contrastive form.
        top_k: the number of negatives that count, the nearest to the sample, chosen among the old and among the new
            ones separately; None: all. Where a sample has fewer, all of them count.
        regression: whether new embeddings are negatives too. Without them it is the plain contrastive (triplet) loss
            between models.
        form: ``"contrastive"`` or ``"triplet"``.
        margin: :math:`m`, 0 or more, of the triplet form; distances of unit rows are in [0, 2].
        **kwargs: ``reducer`` (one loss a sample, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, as a sample and as a negative
          of others, fitted to the old width (:func:`pml_compat.fit_width`); labels ``(N,)``
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better
    Raises:
        ValueError: a hyper-parameter out of its range; labels missing; ``ref_emb`` missing, or of another length;
            ``ref_labels`` that are not ``labels``; embeddings empty, NaN, infinite or on another device; an
            ``indices_tuple``.
    Example:
        >>> RACTLoss(temperature=1.0)(torch.eye(2), torch.tensor([0, 1]), ref_emb=torch.eye(2))
        tensor(0.5514)

    Reference:
        Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image
        Retrieval", ICLR 2022. The temperature 0.01, the margin 0.8 and the triplet form are those of the public code
        (which offers ``top_k=10``). Differs from it in: what is no negative is masked out exactly, where it
        subtracts a large number. Rows of length 0 have no direction, and receive a gradient of 0.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        top_k: int | None = None,
        regression: bool = True,
        form: Literal["contrastive", "triplet"] = "contrastive",
        margin: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if form not in ("contrastive", "triplet"):
            raise ValueError(f"form must be 'contrastive' or 'triplet', got {form!r}")
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        self.top_k = None if top_k is None else check_integer(top_k, "top_k", minimum=1)
        self.regression = regression
        self.form = form
        self.margin = check_number(margin, "margin", minimum=0)
        used = "temperature" if form == "contrastive" else "margin"
        self.add_to_recordable_attributes(list_of_names=[used], is_stat=False)

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item."""
        check_row_labels(check_labels(labels), ref_labels)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: Any,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Return one loss a sample."""
        indices_tuple_not_supported(indices_tuple)
        new_emb, old_emb = check_old_rows(embeddings, ref_emb)
        labels = check_labels(labels, length=len(embeddings))
        with no_autocast(embeddings):
            new_emb, old_emb = (unit_rows(rows, embeddings.dtype) for rows in (new_emb, old_emb))
            others = [old_emb, new_emb] if self.regression else [old_emb]
            same = labels[:, None] == labels
            if self.form == "contrastive":
                losses = contrastive_losses(new_emb, old_emb, others, same, self.top_k, self.temperature)
            else:
                losses = triplet_losses(new_emb, old_emb, others, same, self.top_k, self.margin)
        return {"loss": per_sample(losses)}


def contrastive_losses(
    new_emb: torch.Tensor,
    old_emb: torch.Tensor,
    others: list[torch.Tensor],
    same: torch.Tensor,
    top_k: int | None,
    temperature: float,
) -> torch.Tensor:
    """Return ``(B,)`` cross-entropies of the positive among the positive and the negatives in ``others``."""
    scaled = new_emb / temperature
    positive = (scaled * old_emb).sum(1, keepdim=True)
    logits = torch.cat([positive, *(_nearest(scaled @ rows.t(), same, top_k) for rows in others)], dim=1)
    first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return torch.nn.functional.cross_entropy(logits, first, reduction="none")


def triplet_losses(
    new_emb: torch.Tensor,
    old_emb: torch.Tensor,
    others: list[torch.Tensor],
    same: torch.Tensor,
    top_k: int | None,
    margin: float,
) -> torch.Tensor:
    """Return ``(B,)`` sums, over ``others``, of the mean hinge over the negatives in it."""
    within = margin + torch.linalg.vector_norm(new_emb - old_emb, dim=1, keepdim=True)
    edge = torch.finfo(new_emb.dtype).eps  # the rounding of a cosine near 1, where the root has no finite slope
    total = new_emb.new_zeros(len(new_emb))
    for rows in others:
        cosines = _nearest(new_emb @ rows.t(), same, top_k)
        distances = (2 - 2 * cosines).clamp_min(edge).sqrt()  # infinite at what is no negative
        total = total + torch.relu(within - distances).sum(1)
    return total / (~same).sum(1).clamp(1, top_k)


def _nearest(similarities: torch.Tensor, same: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """The similarities to negatives, or each row's ``top_k`` largest; minus infinity at what is no negative."""
    negatives = similarities.masked_fill_(same, -torch.inf)
    return negatives if top_k is None else negatives.topk(min(top_k, len(same)), dim=1, sorted=False).values
