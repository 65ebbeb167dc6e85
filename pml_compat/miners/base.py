"""What every cross-model miner shares: inputs that are checked once."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import one_read, values_known
from .._host import BaseDistance, BaseMiner
from ..frozen.old_references import check_references, check_row_labels


class CrossModelMiner(BaseMiner):
    """Base of our miners: ``miner(new, labels, old, ref_labels)`` checks, and :meth:`mine` gets what can be relied on.

    In :meth:`mine` embeddings are float32 or better, without a gradient and outside autocast, the new ones fitted to
    the old width (:func:`pml_compat.fit_width`); ``ref_labels`` is never None and never ``labels`` itself.
    ``ref_labels=None`` in the call means: the labels of the same rows. An item's own old embedding is a reference like
    any other.

    Args:
        **kwargs: ``distance`` (default ``LpDistance(p=2)``, unit rows), ``collect_stats``.
    Raises:
        ValueError: in a call: ``ref_emb`` missing or on another device; embeddings empty, NaN or
            infinite; labels missing or not one a row.
    """

    distance: BaseDistance

    # Whether anchors have to be new and references old, so that CrossModelLoss does not call it the other way round.
    new_anchors_only = False
    # Whether row i of the references has to be the item of row i of the anchors.
    row_aligned = False

    @torch.compiler.disable  # how many tuples there are is a value of the batch
    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: Any = None, ref_labels: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """Return (anchors, positives, negatives) or (anchors, positives, anchors, negatives)."""
        with torch.no_grad():
            with one_read():
                new, labels, old, ref_labels = check_references(embeddings, labels, ref_emb, ref_labels)
                if self.row_aligned and len(new) == len(old):
                    check_row_labels(labels, ref_labels)
            with torch.autocast(new.device.type, enabled=False), values_known():
                return super().forward(new, labels, old, ref_labels)

    def distances(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return the ``(N, M)`` distances, larger is farther: a similarity comes back negated."""
        found = self.distance(one, other)
        return -found if self.distance.is_inverted else found
