"""Data on its way through a model: batches of any form, and embeddings of a whole data set."""

from .embed import embed
from .nest import moved_to

__all__ = ["embed", "moved_to"]
