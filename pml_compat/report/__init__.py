"""Tables, pictures and pages of an upgrade, and of several side by side."""

from .._moved import moved
from .comparison_plot import plot_comparison
from .comparison_table import comparison_table
from .evaluation_table import to_markdown

__all__ = [
    "comparison_table",
    "plot_comparison",
    "to_markdown",
]

_RESULTS = ("Results", "markdown_table", "plot_compatibility", "rich_cost_table", "rich_table", "title", "verdict")
__getattr__ = moved(
    __name__,
    {
        "RetrievalExample": "pml_compat.report.comparison_plot",
        "cost_table": "pml_compat.report.comparison_table",
        "html_page": "pml_compat.report.page",
        "method_in_words": "pml_compat.report.comparison_words",
        "to_rich": "pml_compat.report.evaluation_table",
        "Backfill": "pml_compat.upgrade.evaluation",
        "Evaluation": "pml_compat.upgrade",
        **dict.fromkeys(("UpgradeVerdict", "upgrade_verdict"), "pml_compat.upgrade.verdict"),
        **dict.fromkeys(_RESULTS, "pml_compat.report.results"),
    },
)
