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
from .upgrade_split import UpgradeSplit, check_no_leakage, extended_classes, extended_data, open_classes
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
    "UpgradeSplit",
    "VerificationResult",
    "average_compatibility",
    "average_multimodel_accuracy",
    "backfill_curve",
    "bootstrap_update_gain",
    "carry_thresholds",
    "check_no_leakage",
    "compatibility_matrix",
    "compatibility_scores",
    "extended_classes",
    "extended_data",
    "is_compatible",
    "negative_flip_rate",
    "negative_flips",
    "open_classes",
    "pair_criterion",
    "paired_bootstrap",
    "tar_at_far",
    "tpir_at_fpir",
    "update_gain",
    "verification",
]
