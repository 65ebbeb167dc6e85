"""What an upgrade is worth: measured, compared with today's system, and judged."""

from .._moved import moved
from .audit import audit
from .backfill import backfill_curve
from .bootstrap import bootstrap_update_gain, paired_bootstrap
from .chain import average_multimodel_accuracy
from .comparison import Comparison
from .compatibility import compatibility_matrix, is_compatible, update_gain
from .compatibility_scores import compatibility_scores
from .criterion import pair_criterion
from .evaluate import evaluate
from .evaluation import Evaluation
from .negative_flips import negative_flips

__all__ = [
    "Comparison",
    "Evaluation",
    "audit",
    "average_multimodel_accuracy",
    "backfill_curve",
    "bootstrap_update_gain",
    "compatibility_matrix",
    "compatibility_scores",
    "evaluate",
    "is_compatible",
    "negative_flips",
    "pair_criterion",
    "paired_bootstrap",
    "update_gain",
]

__getattr__ = moved(
    __name__,
    {
        "Backfill": "pml_compat.upgrade.evaluation",
        "BackfillCurve": "pml_compat.upgrade.backfill",
        "BootstrapInterval": "pml_compat.upgrade.bootstrap",
        "ClassFlips": "pml_compat.upgrade.negative_flips",
        "NegativeFlips": "pml_compat.upgrade.negative_flips",
        "PairCriterion": "pml_compat.upgrade.criterion",
        "UpgradeVerdict": "pml_compat.upgrade.verdict",
        "average_compatibility": "pml_compat.upgrade.chain",
        "negative_flip_rate": "pml_compat.upgrade.negative_flips",
        "upgrade_verdict": "pml_compat.upgrade.verdict",
    },
)
