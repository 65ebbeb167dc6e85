"""Stored galleries, while their old embeddings are replaced by new ones."""

from .mixed_gallery import MixedGallery

__all__ = ["MixedGallery"]
