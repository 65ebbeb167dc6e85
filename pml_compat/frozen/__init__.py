"""The old system, held still: its network, its classifier, its embeddings and what it knows of each class."""

from .._moved import moved
from .class_centers import ClassCenters
from .class_weights import class_weights
from .classifier import FrozenClassifier
from .credible import credible_mask
from .embeddings import FrozenEmbeddings
from .fingerprint import model_fingerprint
from .fit_centers import fit_centers
from .model import FrozenModel
from .old_embedding_dataset import OldEmbeddingDataset, data_and_label
from .within_class_whitening import WithinClassWhitening

__all__ = [
    "ClassCenters",
    "FrozenClassifier",
    "FrozenEmbeddings",
    "FrozenModel",
    "OldEmbeddingDataset",
    "WithinClassWhitening",
    "class_weights",
    "credible_mask",
    "data_and_label",
    "fit_centers",
    "model_fingerprint",
]

__getattr__ = moved(__name__, {"refine_prototypes": "pml_compat.frozen.prototypes"})
