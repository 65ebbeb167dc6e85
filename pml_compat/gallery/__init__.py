"""Stored galleries, while their old embeddings are replaced by new ones."""

from .backfill_order import backfill_scores
from .mixed_gallery import MixedGallery

__all__ = ["MixedGallery", "backfill_scores"]
