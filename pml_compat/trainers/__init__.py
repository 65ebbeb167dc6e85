"""PML trainers with the old system in the loop, and checkpoints from which a training goes on as if never stopped."""

from .._moved import moved
from .checkpoint import load_checkpoint, save_checkpoint
from .compatible_metric_loss_only import CompatibleMetricLossOnly
from .indexed_dataset import IndexedDataset
from .resumable_sampler import ResumableSampler

__all__ = [
    "CompatibleMetricLossOnly",
    "IndexedDataset",
    "ResumableSampler",
    "load_checkpoint",
    "save_checkpoint",
]

__getattr__ = moved(__name__, {"Progress": "pml_compat.trainers.checkpoint"})
