"""Retrieval measured across models, and what an upgrade gained."""

from .backfill import BackfillCurve, backfill_curve
from .bootstrap import BootstrapInterval, bootstrap_update_gain, paired_bootstrap
from .calculator import CrossModelAccuracyCalculator
from .compatibility import compatibility_matrix, is_compatible, update_gain
from .compatibility_scores import compatibility_scores
from .criterion import PairCriterion, pair_criterion
from .negative_flips import ClassFlips, NegativeFlips, negative_flip_rate, negative_flips
from .upgrade_chain import average_compatibility, average_multimodel_accuracy

__all__ = [
    "BackfillCurve",
    "BootstrapInterval",
    "ClassFlips",
    "CrossModelAccuracyCalculator",
    "NegativeFlips",
    "PairCriterion",
    "average_compatibility",
    "average_multimodel_accuracy",
    "backfill_curve",
    "bootstrap_update_gain",
    "compatibility_matrix",
    "compatibility_scores",
    "is_compatible",
    "negative_flip_rate",
    "negative_flips",
    "pair_criterion",
    "paired_bootstrap",
    "update_gain",
]
