"""Old references that are too noisy to learn from, kept out of what a miner finds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import normalize as unit

from .._checks import check_matrix, check_same_device
from .._host import BaseMiner
from .._rows import at_least_float32
from ..frozen.class_means import class_means
from ..frozen.credible import Rule, check_rule, kept
from ..frozen.label_map import LabelMap
from .base import CrossModelMiner

_ROUNDING = 1e-6  # relative: a sample on its class's radius stays in, whatever the batch it comes in


class CredibleSampleFilter(CrossModelMiner):
    r"""Mine among the credible old references alone: by the rules of :func:`~pml_compat.frozen.credible_mask`.

    ``"nearest"`` takes an old embedding for credible that is as near to the mean of its class as the nearest
    :math:`\lceil share \cdot n_c \rceil` stored ones; ``"entropy"``, one whose assignment to a class is settled:

    .. math:: H(p_i) \le max\_entropy \cdot \ln C, \quad p_{ic} \propto \exp(-\lVert \hat f_{o,i} - m_c \rVert^2 / v_c)

    Means :math:`m_c` and variances :math:`v_c` are measured once, on the stored embeddings; a batch then needs nothing
    but its old embeddings. Entropy does not see labels: an embedding deep inside a wrong class is credible to it. To
    leave samples out of a data set, of class centres or of a gallery, take ``credible_mask`` itself.

    Args:
        embeddings: ``(Q, D)`` stored old embeddings: tensor, array, memory map or ``FrozenEmbeddings``; read in pieces.
        labels: ``(Q,)``, 0 or more.
        miner: a PML miner. It is given the credible references alone, so that its hardest ones are not the noise; of
            a miner that needs all rows (``RegressionMiner``) the tuples are filtered. None: all pairs.
        rule: ``"nearest"`` or ``"entropy"``.
        share: of each class that ``"nearest"`` takes for credible; in (0, 1].
        max_entropy: of ``"entropy"``, as a share of the highest entropy, ln C; in [0, 1].
        normalize: measure unit rows; False measures the embeddings as they are.
        **kwargs: ``collect_stats``: then the share of the batch's references that is credible is recorded as
            ``credible_fraction``.
    Shape:
        - embeddings ``(N, D)``; labels ``(N,)``; ref_emb ``(M, D)``, old; ref_labels ``(M,)``, or None for labels. A
          label that was not measured has no mean: no such reference is near
        - output: that of ``miner``, as indices into ``embeddings`` and ``ref_emb``; 4 tensors where nothing is credible
    Raises:
        ValueError: another ``rule``; ``share`` or ``max_entropy`` outside its range; ``miner`` no PML miner; stored
            embeddings empty, NaN or infinite, labels not one a row; in a call: ``ref_emb`` of another width or device
            than the stored ones; see also :class:`CrossModelMiner`.
    Example:
        >>> old = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [0.1, 0.9], [0.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> CredibleSampleFilter(old, labels, share=0.6).credible(old, labels)
        tensor([ True,  True, False,  True, False,  True])

    Reference:
        See ``credible_mask``. Of several stored embeddings at the same distance as the last credible one all are.
    """

    new_anchors_only = True

    old_means: torch.Tensor
    old_variances: torch.Tensor
    old_radii: torch.Tensor

    def __init__(
        self,
        embeddings: Any,
        labels: Any,
        miner: BaseMiner | None = None,
        *,
        rule: Rule = "nearest",
        share: float = 0.9,
        max_entropy: float = 0.5,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_rule(rule, share, max_entropy)
        if miner is not None and not isinstance(miner, BaseMiner):
            raise ValueError(f"miner must be a PML miner (BaseMiner), got {type(miner).__name__}")
        self.miner, self.rule, self.normalize = miner, rule, normalize
        self.share, self.max_entropy = float(share), float(max_entropy)
        self.add_to_recordable_attributes(list_of_names=["share", "max_entropy"], is_stat=False)
        self.add_to_recordable_attributes(name="credible_fraction", is_stat=True)
        self._measure(embeddings, labels)

    def _measure(self, embeddings: Any, labels: Any) -> None:
        classes = class_means(embeddings, labels, normalize=self.normalize)
        counts, rows, distances = classes.counts, classes.rows, classes.distances
        self.label_map = LabelMap(classes.labels)
        self.register_buffer("old_means", classes.means)
        variances = classes.variances().to(classes.means.dtype)
        self.register_buffer("old_variances", variances.clamp(min=torch.finfo(variances.dtype).tiny))
        order = torch.argsort(distances)
        order = order[torch.argsort(rows[order], stable=True)]
        radii = distances[order][counts.cumsum(0) - counts + kept(counts, self.share) - 1]
        radii = radii + _ROUNDING * (radii + torch.linalg.vector_norm(classes.means.double(), dim=1))
        self.register_buffer("old_radii", radii.to(classes.means.dtype))

    @torch.no_grad()
    def credible(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return which old embeddings ``(M, D)`` with ``labels (M,)`` are credible, as a boolean mask ``(M,)``."""
        check_same_device(embeddings, "embeddings", self.old_means, "the filter")
        check_matrix(embeddings, "embeddings", width=self.old_means.shape[1])
        rows = at_least_float32(embeddings)
        rows = unit(rows, dim=1) if self.normalize else rows
        means = self.old_means.to(rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            if self.rule == "nearest":
                own = self.label_map(labels)
                return (own >= 0) & (torch.linalg.vector_norm(rows - means[own], dim=1) <= self.old_radii[own])
            lengths = means.square().sum(1)
            apart = torch.addmm(lengths, rows, means.t(), alpha=-2).add_(rows.square().sum(1, keepdim=True))
            p = torch.softmax(-apart.clamp_(min=0) / self.old_variances.to(rows.dtype), dim=1)
            return torch.special.entr(p).sum(1) <= self.max_entropy * math.log(len(means))

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor, ref_labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the other miner's tuples among the credible references."""
        credible = self.credible(ref_emb, ref_labels)
        if self.collect_stats:
            self.credible_fraction = credible.float().mean().item()
        if self.miner is not None and getattr(self.miner, "row_aligned", False):
            return _without(self.miner(embeddings, labels, ref_emb, ref_labels), credible)
        rows = credible.nonzero()[:, 0]
        if len(rows) == 0:
            return (rows,) * 4
        if self.miner is None:
            same = labels[:, None] == ref_labels[rows]
            mined = (*same.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
        else:
            mined = self.miner(embeddings, labels, ref_emb[rows], ref_labels[rows])
        if len(mined) == 3:
            return mined[0], rows[mined[1]], rows[mined[2]]
        return mined[0], rows[mined[1]], mined[2], rows[mined[3]]


def _without(mined: tuple[torch.Tensor, ...], credible: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tuples whose old references are all credible."""
    if len(mined) == 3:
        kept = (credible[mined[1]] & credible[mined[2]]).nonzero()[:, 0]
        return mined[0][kept], mined[1][kept], mined[2][kept]
    positive, negative = (credible[mined[i]].nonzero()[:, 0] for i in (1, 3))
    return mined[0][positive], mined[1][positive], mined[2][negative], mined[3][negative]
