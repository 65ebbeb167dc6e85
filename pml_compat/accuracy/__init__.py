"""Rankings, measured across models."""

from .._moved import moved
from .calculator import CrossModelAccuracyCalculator
from .served_index import ServedIndex

__all__ = ["CrossModelAccuracyCalculator", "ServedIndex"]

_MOVED = {
    "data": ("check_no_leakage", "extended_classes", "extended_data", "open_classes"),
    "data.splits": ("UpgradeSplit",),
    "upgrade": (
        "average_multimodel_accuracy",
        "backfill_curve",
        "bootstrap_update_gain",
        "compatibility_matrix",
        "compatibility_scores",
        "is_compatible",
        "negative_flips",
        "pair_criterion",
        "paired_bootstrap",
        "update_gain",
    ),
    "upgrade.backfill": ("BackfillCurve",),
    "upgrade.bootstrap": ("BootstrapInterval",),
    "upgrade.chain": ("average_compatibility",),
    "upgrade.criterion": ("PairCriterion",),
    "upgrade.negative_flips": ("ClassFlips", "NegativeFlips", "negative_flip_rate"),
    "verification": ("carry_thresholds", "tar_at_far", "tpir_at_fpir", "verification"),
    "verification.verification": ("OperatingPoint", "VerificationResult"),
}
__getattr__ = moved(__name__, {name: f"pml_compat.{place}" for place, names in _MOVED.items() for name in names})
