"""Maps between embedding spaces, each an ``nn.Module`` with ``save``; ``load_transformation`` reads any of them."""

from .base import Transformation, load_transformation
from .chain import TransformationChain
from .linear import LinearTransformation
from .orthogonal import OrthogonalTransformation
from .residual_bottleneck import ResidualBottleneckTransformation

__all__ = [
    "LinearTransformation",
    "OrthogonalTransformation",
    "ResidualBottleneckTransformation",
    "Transformation",
    "TransformationChain",
    "load_transformation",
]
