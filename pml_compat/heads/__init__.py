"""Last layers of a model that make its embedding fit an old one."""

from .basis_transformation import BasisTransformation
from .compatible_head import CompatibleHead

__all__ = ["BasisTransformation", "CompatibleHead"]
