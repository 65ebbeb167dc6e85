"""Tables, pictures and pages of an upgrade."""

from ..moved import moved
from .html_page import html_page
from .plot import RetrievalExample, plot_compatibility
from .results import Results
from .table import markdown_table, rich_cost_table, rich_table, title
from .verdict import verdict

__all__ = [
    "Results",
    "RetrievalExample",
    "html_page",
    "markdown_table",
    "plot_compatibility",
    "rich_cost_table",
    "rich_table",
    "title",
    "verdict",
]

__getattr__ = moved(
    __name__, dict.fromkeys(("Backfill", "Evaluation", "UpgradeVerdict", "upgrade_verdict"), "pml_compat.upgrade")
)
