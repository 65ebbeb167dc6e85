"""Maps between embedding spaces, each an ``nn.Module`` with ``save``; ``load_transformation`` reads any of them."""

from .base import Transformation, load_transformation
from .chain import TransformationChain
from .fct import FCTTransformation
from .fit import fit_transformation
from .linear import LinearTransformation
from .orthogonal import OrthogonalTransformation
from .residual_bottleneck import ResidualBottleneckTransformation

__all__ = [
    "FCTTransformation",
    "LinearTransformation",
    "OrthogonalTransformation",
    "ResidualBottleneckTransformation",
    "Transformation",
    "TransformationChain",
    "fit_transformation",
    "load_transformation",
]
