"""Rankings, measured across models."""

from .._moved import moved
from .calculator import CrossModelAccuracyCalculator
from .served_index import ServedIndex

__all__ = ["CrossModelAccuracyCalculator", "ServedIndex"]

_SPLITS = ("UpgradeSplit", "check_no_leakage", "extended_classes", "extended_data", "open_classes")
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
    {
        **dict.fromkeys(_SPLITS, "pml_compat.data"),
        **dict.fromkeys(_UPGRADE, "pml_compat.upgrade"),
        **dict.fromkeys(_VERIFICATION, "pml_compat.verification"),
    },
)
