"""What losses without labels share: each row of the batch is compared with the old model's of the same item."""

from __future__ import annotations

from typing import Any

import torch

from .._host import indices_tuple_not_supported
from .._rows import no_autocast
from ._base import NamedTermsLoss
from .old_rows import check_old_rows


class LabelFreeLoss(NamedTermsLoss):
    """Base of the losses that need old embeddings, row i of the same item, and nothing else."""

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Never."""
        return False

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: torch.Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """Return the terms, of rows that are checked."""
        indices_tuple_not_supported(indices_tuple)
        new_emb, old_emb = self.check_rows(embeddings, ref_emb)
        with no_autocast(embeddings):
            return self.compare(new_emb, old_emb, embeddings.dtype)

    def check_rows(self, embeddings: torch.Tensor, ref_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both embeddings as :func:`check_old_rows` does; a loss with old tensors of its own asks for more."""
        return check_old_rows(embeddings, ref_emb)

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return the terms as PML's ``compute_loss`` does; ``dtype`` is the embeddings' before they were cast."""
        raise NotImplementedError
