"""Retrieval measured across models, and what an upgrade gained."""

from .calculator import CrossModelAccuracyCalculator
from .compatibility import compatibility_matrix, is_compatible, update_gain

__all__ = ["CrossModelAccuracyCalculator", "compatibility_matrix", "is_compatible", "update_gain"]
