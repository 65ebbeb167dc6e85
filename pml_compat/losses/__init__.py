"""Losses for compatible training, each a PML ``BaseMetricLossFunction``; one paper a file."""

from .advbct_loss import AdvBCTLoss
from .bct_loss import BCTLoss
from .compatible_loss import CompatibleLoss
from .cross_model_loss import CrossModelLoss
from .fct_loss import FCTLoss
from .focal_distillation_loss import FocalDistillationLoss
from .gathered_loss import GatheredLoss
from .lce_loss import LCELoss
from .lce_transformation_loss import LCETransformationLoss
from .lwf_loss import LwFLoss
from .mixbct_loss import MixBCTLoss
from .nccl_loss import NCCLLoss
from .point_alignment_loss import PointAlignmentLoss
from .ract_loss import RACTLoss
from .unibct_loss import UniBCTLoss

__all__ = [
    "AdvBCTLoss",
    "BCTLoss",
    "CompatibleLoss",
    "CrossModelLoss",
    "FCTLoss",
    "FocalDistillationLoss",
    "GatheredLoss",
    "LCELoss",
    "LCETransformationLoss",
    "LwFLoss",
    "MixBCTLoss",
    "NCCLLoss",
    "PointAlignmentLoss",
    "RACTLoss",
    "UniBCTLoss",
]
