"""Tables, pictures and verdicts of an upgrade."""

from .plot import RetrievalExample, plot_compatibility
from .results import Results
from .table import markdown_table, rich_table, title
from .verdict import verdict

__all__ = [
    "Results",
    "RetrievalExample",
    "markdown_table",
    "plot_compatibility",
    "rich_table",
    "title",
    "verdict",
]
