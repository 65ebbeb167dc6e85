"""The old system, held still: its network, its classifier, its embeddings and what it knows of each class."""

from .class_centers import ClassCenters
from .class_weights import class_weights
from .classifier import FrozenClassifier
from .embeddings import FrozenEmbeddings
from .fingerprint import model_fingerprint
from .model import FrozenModel
from .old_embedding_dataset import OldEmbeddingDataset, data_and_label

__all__ = [
    "ClassCenters",
    "FrozenClassifier",
    "FrozenEmbeddings",
    "FrozenModel",
    "OldEmbeddingDataset",
    "class_weights",
    "data_and_label",
    "model_fingerprint",
]
