"""All that we take from pytorch-metric-learning (PML), the host: where it moves something, this file changes.

Its trainers and testers alone are imported where ours extend them, in ``trainers/`` and ``testers/``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytorch_metric_learning import losses as losses
from pytorch_metric_learning.distances import BaseDistance as BaseDistance
from pytorch_metric_learning.distances import CosineSimilarity as CosineSimilarity
from pytorch_metric_learning.distances import DotProductSimilarity as DotProductSimilarity
from pytorch_metric_learning.distances import LpDistance as LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss as ArcFaceLoss
from pytorch_metric_learning.losses import BaseMetricLossFunction as BaseMetricLossFunction
from pytorch_metric_learning.losses import CrossBatchMemory as CrossBatchMemory
from pytorch_metric_learning.losses import NTXentLoss as NTXentLoss
from pytorch_metric_learning.losses import SelfSupervisedLoss as SelfSupervisedLoss
from pytorch_metric_learning.losses import SupConLoss as SupConLoss
from pytorch_metric_learning.miners import BaseMiner as BaseMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer as AvgNonZeroReducer
from pytorch_metric_learning.reducers import DoNothingReducer as DoNothingReducer
from pytorch_metric_learning.reducers import MeanReducer as MeanReducer
from pytorch_metric_learning.reducers import MultipleReducers as MultipleReducers
from pytorch_metric_learning.utils import common_functions as common_functions
from pytorch_metric_learning.utils.common_functions import indices_tuple_not_supported as indices_tuple_not_supported
from pytorch_metric_learning.utils.common_functions import to_device as to_device
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper as DistributedLossWrapper
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights as convert_to_weights

if TYPE_CHECKING:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as AccuracyCalculator
    from pytorch_metric_learning.utils.accuracy_calculator import get_label_match_counts as get_label_match_counts
    from pytorch_metric_learning.utils.accuracy_calculator import get_unique_labels as get_unique_labels
    from pytorch_metric_learning.utils.inference import FaissKMeans as FaissKMeans
else:
    # Their files load scikit-learn and faiss, a second that who trains need not wait.
    _LATE = {
        "AccuracyCalculator": "accuracy_calculator",
        "get_label_match_counts": "accuracy_calculator",
        "get_unique_labels": "accuracy_calculator",
        "FaissKMeans": "inference",
    }

    def __getattr__(name: str) -> Any:
        """Import what is asked for late."""
        if name in _LATE:
            return getattr(importlib.import_module(f"pytorch_metric_learning.utils.{_LATE[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
