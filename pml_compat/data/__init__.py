"""Data: the splits an upgrade is measured on, embeddings of a whole data set, and how stored ones are read."""

from .._moved import moved
from .embed import embed
from .splits import check_no_leakage, extended_classes, extended_data, open_classes

__all__ = [
    "check_no_leakage",
    "embed",
    "extended_classes",
    "extended_data",
    "open_classes",
]

__getattr__ = moved(__name__, {"UpgradeSplit": "pml_compat.data.splits", "moved_to": "pml_compat.data.nest"})
