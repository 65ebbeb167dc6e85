"""What happens at query time, while an old gallery is still served."""

from .._moved import moved
from .._rows import fit_width
from .mixed_gallery import MixedGallery
from .numpy_query_blend import NumpyQueryBlend
from .query_blend import QueryBlend
from .rotation import alignability
from .two_stage import depth_for_gain, two_stage_accuracy
from .two_stage_search import TwoStageSearch

__all__ = [
    "MixedGallery",
    "NumpyQueryBlend",
    "QueryBlend",
    "TwoStageSearch",
    "alignability",
    "depth_for_gain",
    "fit_width",
    "two_stage_accuracy",
]

__getattr__ = moved(__name__, {"VectorCache": "pml_compat.serving.vector_cache"})
