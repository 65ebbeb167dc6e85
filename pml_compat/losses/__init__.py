"""Losses for compatible training, each a PML ``BaseMetricLossFunction``; one paper a file."""

from .bct_loss import BCTLoss

__all__ = ["BCTLoss"]
