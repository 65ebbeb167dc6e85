"""Retrieval measured across models, and what an upgrade gained."""

from .backfill import BackfillCurve, backfill_curve
from .bootstrap import BootstrapInterval, bootstrap_update_gain, paired_bootstrap
from .calculator import CrossModelAccuracyCalculator
from .compatibility import compatibility_matrix, is_compatible, update_gain
from .compatibility_scores import compatibility_scores
from .criterion import PairCriterion, pair_criterion
from .identification import tpir_at_fpir
from .negative_flips import ClassFlips, NegativeFlips, negative_flip_rate, negative_flips
from .served_index import ServedIndex
from .upgrade_chain import average_compatibility, average_multimodel_accuracy
from .verification import OperatingPoint, VerificationResult, carry_thresholds, tar_at_far, verification

__all__ = [
    "BackfillCurve",
    "BootstrapInterval",
    "ClassFlips",
    "CrossModelAccuracyCalculator",
    "NegativeFlips",
    "OperatingPoint",
    "PairCriterion",
    "ServedIndex",
    "VerificationResult",
    "average_compatibility",
    "average_multimodel_accuracy",
    "backfill_curve",
    "bootstrap_update_gain",
    "carry_thresholds",
    "compatibility_matrix",
    "compatibility_scores",
    "is_compatible",
    "negative_flip_rate",
    "negative_flips",
    "pair_criterion",
    "paired_bootstrap",
    "tar_at_far",
    "tpir_at_fpir",
    "update_gain",
    "verification",
]
