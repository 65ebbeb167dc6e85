"""Maps between embedding spaces, each an ``nn.Module`` with ``save``; ``load_transformation`` reads any of them."""

from .base import Transformation, load_transformation
from .chain import TransformationChain
from .fastfill import FastFillTransformation
from .fct import FCTTransformation
from .fit import fit_transformation
from .linear import LinearTransformation
from .numpy_form import NumpyTransformation
from .orthogonal import OrthogonalTransformation
from .residual_bottleneck import ResidualBottleneckTransformation
from .serving import export_transformation, save_numpy

__all__ = [
    "FCTTransformation",
    "FastFillTransformation",
    "LinearTransformation",
    "NumpyTransformation",
    "OrthogonalTransformation",
    "ResidualBottleneckTransformation",
    "Transformation",
    "TransformationChain",
    "export_transformation",
    "fit_transformation",
    "load_transformation",
    "save_numpy",
]
