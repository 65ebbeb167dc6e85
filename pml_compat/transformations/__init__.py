"""Maps between embedding spaces, each an ``nn.Module`` with ``save``; ``load_transformation`` reads any of them."""

from .._moved import moved
from .base import Transformation, load_transformation
from .best import fit_best
from .chain import TransformationChain
from .fastfill import FastFillTransformation
from .fct import FCTTransformation
from .fit import fit_transformation
from .linear import LinearTransformation
from .low_rank import LowRankTransformation
from .numpy_form import NumpyTransformation
from .orthogonal import OrthogonalTransformation
from .residual_bottleneck import ResidualBottleneckTransformation
from .scaled_orthogonal import ScaledOrthogonalTransformation

__all__ = [
    "FCTTransformation",
    "FastFillTransformation",
    "LinearTransformation",
    "LowRankTransformation",
    "NumpyTransformation",
    "OrthogonalTransformation",
    "ResidualBottleneckTransformation",
    "ScaledOrthogonalTransformation",
    "Transformation",
    "TransformationChain",
    "fit_best",
    "fit_transformation",
    "load_transformation",
]

__getattr__ = moved(
    __name__,
    {"export_transformation": "pml_compat.transformations.serving", "save_numpy": "pml_compat.transformations.serving"},
)
