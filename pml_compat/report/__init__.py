"""Tables, pictures and pages of an upgrade, and of several side by side."""

from .._moved import moved
from .comparison_plot import RetrievalExample, plot_comparison
from .comparison_table import comparison_table, cost_table
from .comparison_words import method_in_words
from .evaluation_table import to_markdown, to_rich
from .html_page import html_page

__all__ = [
    "RetrievalExample",
    "comparison_table",
    "cost_table",
    "html_page",
    "method_in_words",
    "plot_comparison",
    "to_markdown",
    "to_rich",
]

_RESULTS = ("Results", "markdown_table", "plot_compatibility", "rich_cost_table", "rich_table", "title", "verdict")
__getattr__ = moved(
    __name__,
    {
        **dict.fromkeys(("Backfill", "Evaluation", "UpgradeVerdict", "upgrade_verdict"), "pml_compat.upgrade"),
        **dict.fromkeys(_RESULTS, "pml_compat.report.results"),
    },
)
