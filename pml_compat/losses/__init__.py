"""Losses for compatible training, each a PML ``BaseMetricLossFunction``; one paper a file."""

from .bct_loss import BCTLoss
from .compatible_loss import CompatibleLoss
from .fct_loss import FCTLoss
from .lce_loss import LCELoss
from .lce_transformation_loss import LCETransformationLoss

__all__ = ["BCTLoss", "CompatibleLoss", "FCTLoss", "LCELoss", "LCETransformationLoss"]
