"""The old system, held still: its network, its classifier and what it knows of each class."""

from .class_centers import ClassCenters
from .class_weights import class_weights
from .classifier import FrozenClassifier
from .model import FrozenModel

__all__ = ["ClassCenters", "FrozenClassifier", "FrozenModel", "class_weights"]
