"""Stored galleries: opened where they are kept, carried over into a new store, and the order to embed them anew in."""

from ..moved import moved
from .backfill import backfill
from .backfill_order import backfill_scores
from .migrate import Plan, migrate, rollback
from .stores import open_store

__all__ = ["Plan", "backfill", "backfill_scores", "migrate", "open_store", "rollback"]

__getattr__ = moved(__name__, {"MixedGallery": "pml_compat.serving"})
