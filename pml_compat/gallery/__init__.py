"""Stored galleries: opened where they are kept, carried over into a new store, and the order to embed them anew in."""

from .._moved import moved
from .backfill import backfill
from .backfill_order import backfill_scores
from .migrate import migrate, rollback
from .ray_migrate import migrate_with_ray
from .stores import open_store

__all__ = ["backfill", "backfill_scores", "migrate", "migrate_with_ray", "open_store", "rollback"]

__getattr__ = moved(__name__, {"MixedGallery": "pml_compat.serving", "Plan": "pml_compat.gallery.plan"})
