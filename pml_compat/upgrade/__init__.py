"""What an upgrade is worth: measured, compared with today's system, and judged."""

from .backfill import BackfillCurve, backfill_curve
from .bootstrap import BootstrapInterval, bootstrap_update_gain, paired_bootstrap
from .chain import average_compatibility, average_multimodel_accuracy
from .comparison import Comparison
from .compatibility import compatibility_matrix, is_compatible, update_gain
from .compatibility_scores import compatibility_scores
from .criterion import PairCriterion, pair_criterion
from .evaluate import evaluate
from .evaluation import Backfill, Evaluation
from .negative_flips import ClassFlips, NegativeFlips, negative_flip_rate, negative_flips
from .verdict import UpgradeVerdict, upgrade_verdict

__all__ = [
    "Backfill",
    "BackfillCurve",
    "BootstrapInterval",
    "ClassFlips",
    "Comparison",
    "Evaluation",
    "NegativeFlips",
    "PairCriterion",
    "UpgradeVerdict",
    "average_compatibility",
    "average_multimodel_accuracy",
    "backfill_curve",
    "bootstrap_update_gain",
    "compatibility_matrix",
    "compatibility_scores",
    "evaluate",
    "is_compatible",
    "negative_flip_rate",
    "negative_flips",
    "pair_criterion",
    "paired_bootstrap",
    "update_gain",
    "upgrade_verdict",
]
