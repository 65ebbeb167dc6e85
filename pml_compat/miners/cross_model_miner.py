"""The hardest old references of every new embedding."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .._checks import check_integer
from .base import CrossModelMiner


class HardestCrossModelMiner(CrossModelMiner):
    r"""Take, for every new embedding, its ``k`` farthest old positives and its ``k`` nearest old negatives.

    .. math:: P_i = \operatorname{top-}k_{j: y_j = y_i} d(f_{n,i}, f_{o,j}),\quad
        N_i = \operatorname{top-}k_{j: y_j \ne y_i} -d(f_{n,i}, f_{o,j})

    PML's miners drop an item's own old embedding where both labels are one object; here it is a positive like any
    other, and the only one of an item that is alone in its class.

    Args:
        k: how many of each, fewer where a class has fewer; 1 or more. None takes all.
        output: ``"pairs"``, (anchors, positives, anchors, negatives); or ``"triplets"``, every positive of an anchor
            with every negative of it, so up to ``k * k`` for an anchor, and none for an anchor that has only one sort.
        **kwargs: ``distance`` (default ``LpDistance(p=2)``: unit rows; a similarity counts as inverted),
            ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``; labels ``(N,)``; ref_emb ``(M, D)``, old; ref_labels ``(M,)``, or None for labels
        - output: 4 or 3 tensors of indices; anchors into ``embeddings``, the others into ``ref_emb``; by anchor
    Raises:
        ValueError: ``k`` < 1; another ``output``; in a call, see :class:`CrossModelMiner`.
    Example:
        >>> new, old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
        >>> miner = HardestCrossModelMiner(output="triplets")
        >>> miner(new, torch.tensor([0, 1]), old, torch.tensor([0, 1, 0]))
        (tensor([0, 1]), tensor([2, 1]), tensor([1, 0]))
    """

    def __init__(self, k: int | None = 1, output: Literal["pairs", "triplets"] = "pairs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if output not in ("pairs", "triplets"):
            raise ValueError(f"output must be 'pairs' or 'triplets', got {output!r}")
        self.k = None if k is None else check_integer(k, "k", minimum=1)
        self.output = output

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor, ref_labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return pairs or triplets."""
        distances = self.distances(embeddings, ref_emb)
        same = labels[:, None] == ref_labels
        pairs = (*farthest(distances, same, self.k), *farthest(-distances, ~same, self.k))
        return pairs if self.output == "pairs" else triplets_of(*pairs, len(labels))


def farthest(distances: torch.Tensor, allowed: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and the column of the ``k`` largest allowed entries of each row; all of them for None."""
    if k is None or k >= distances.shape[1]:
        rows, columns = allowed.nonzero(as_tuple=True)
        return rows, columns
    columns = distances.masked_fill(~allowed, -torch.inf).topk(k, dim=1).indices
    rows, place = allowed.gather(1, columns).nonzero(as_tuple=True)
    return rows, columns[rows, place]


def triplets_of(
    a1: torch.Tensor, p: torch.Tensor, a2: torch.Tensor, n: torch.Tensor, num_anchors: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every positive pair with every negative of its anchor; ``a2`` is sorted. Nothing larger is made."""
    counts = a2.new_zeros(num_anchors).index_add_(0, a2, torch.ones_like(a2))
    starts = counts.cumsum(0) - counts
    repeats = counts[a1]
    pair = torch.repeat_interleave(repeats)
    place = torch.arange(len(pair), device=a1.device) - (repeats.cumsum(0) - repeats)[pair]
    return a1[pair], p[pair], n[starts[a1[pair]] + place]
