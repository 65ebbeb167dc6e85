"""Data: the splits an upgrade is measured on, embeddings of a whole data set, and how stored ones are read."""

from .embed import embed
from .nest import moved_to
from .splits import UpgradeSplit, check_no_leakage, extended_classes, extended_data, open_classes

__all__ = [
    "UpgradeSplit",
    "check_no_leakage",
    "embed",
    "extended_classes",
    "extended_data",
    "moved_to",
    "open_classes",
]
