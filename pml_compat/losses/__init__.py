"""Losses for compatible training, each a PML ``BaseMetricLossFunction``; one paper a file."""

from .advbct_loss import AdvBCTLoss
from .bc_aligner_loss import BCAlignerLoss
from .bct_loss import BCTLoss
from .bt2_loss import BT2Loss
from .class_weight_length import shorten_class_weights
from .compatible_head_loss import CompatibleHeadLoss
from .compatible_loss import CompatibleLoss
from .cores_loss import CoReSLoss
from .cross_model_loss import CrossModelLoss
from .csd_loss import CSDLoss
from .d3still_loss import D3StillLoss
from .fastfill_loss import FastFillLoss
from .fct_loss import FCTLoss
from .focal_distillation_loss import FocalDistillationLoss
from .gathered_loss import GatheredLoss
from .hoc_loss import HOCLoss
from .lce_loss import LCELoss
from .lce_transformation_loss import LCETransformationLoss
from .lwf_loss import LwFLoss
from .matryoshka_loss import MatryoshkaLoss
from .mixbct_loss import MixBCTLoss
from .nccl_loss import NCCLLoss
from .point_alignment_loss import PointAlignmentLoss
from .ract_loss import RACTLoss
from .raml_loss import RAMLLoss
from .ssp_loss import SSPLoss
from .unibct_loss import UniBCTLoss

__all__ = [
    "AdvBCTLoss",
    "BCAlignerLoss",
    "BCTLoss",
    "BT2Loss",
    "CSDLoss",
    "CoReSLoss",
    "CompatibleHeadLoss",
    "CompatibleLoss",
    "CrossModelLoss",
    "D3StillLoss",
    "FCTLoss",
    "FastFillLoss",
    "FocalDistillationLoss",
    "GatheredLoss",
    "HOCLoss",
    "LCELoss",
    "LCETransformationLoss",
    "LwFLoss",
    "MatryoshkaLoss",
    "MixBCTLoss",
    "NCCLLoss",
    "PointAlignmentLoss",
    "RACTLoss",
    "RAMLLoss",
    "SSPLoss",
    "UniBCTLoss",
    "shorten_class_weights",
]
