"""Stored galleries, while their old embeddings are replaced by new ones."""

from ..moved import moved
from .backfill_order import backfill_scores

__all__ = ["backfill_scores"]

__getattr__ = moved(__name__, {"MixedGallery": "pml_compat.serving"})
