"""Tables, pictures and verdicts of an upgrade."""

from .evaluation import Backfill, Evaluation
from .html_page import html_page
from .plot import RetrievalExample, plot_compatibility
from .results import Results
from .table import markdown_table, rich_cost_table, rich_table, title
from .upgrade_verdict import UpgradeVerdict, upgrade_verdict
from .verdict import verdict

__all__ = [
    "Backfill",
    "Evaluation",
    "Results",
    "RetrievalExample",
    "UpgradeVerdict",
    "html_page",
    "markdown_table",
    "plot_compatibility",
    "rich_cost_table",
    "rich_table",
    "title",
    "upgrade_verdict",
    "verdict",
]
