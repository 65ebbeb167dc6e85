"""Retrieval measured across models: rankings, and the splits that they are measured on."""

from ..moved import moved
from .calculator import CrossModelAccuracyCalculator
from .served_index import ServedIndex
from .upgrade_split import UpgradeSplit, check_no_leakage, extended_classes, extended_data, open_classes

__all__ = [
    "CrossModelAccuracyCalculator",
    "ServedIndex",
    "UpgradeSplit",
    "check_no_leakage",
    "extended_classes",
    "extended_data",
    "open_classes",
]

_UPGRADE = (
    "BackfillCurve",
    "BootstrapInterval",
    "ClassFlips",
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
)
_VERIFICATION = (
    "OperatingPoint",
    "VerificationResult",
    "carry_thresholds",
    "tar_at_far",
    "tpir_at_fpir",
    "verification",
)

__getattr__ = moved(
    __name__,
    {**dict.fromkeys(_UPGRADE, "pml_compat.upgrade"), **dict.fromkeys(_VERIFICATION, "pml_compat.verification")},
)
