"""Batch normalisation that takes a batch of one, and folds into the layer before it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn.utils.fusion import fuse_linear_bn_eval

Module = TypeVar("Module", bound=torch.nn.Module)


class BatchNorm(torch.nn.BatchNorm1d):
    """torch's ``BatchNorm1d``; in training a batch of one row, which has no variance, gets the running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C)``."""
        if self.training and len(input) == 1:
            return torch.nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


def is_untrained(module: torch.nn.Module) -> bool:
    """Whether no batch normalisation in ``module`` has seen a batch."""
    norms = (part for part in module.modules() if isinstance(part, torch.nn.BatchNorm1d))
    return not any(int(norm.num_batches_tracked or 0) for norm in norms)


def fold_batch_norm(module: Module) -> Module:
    """Replace, in place, every linear layer and the batch normalisation after it by one linear layer; eval mode."""
    for sequential in module.modules():
        if not isinstance(sequential, torch.nn.Sequential):
            continue
        layers: list[torch.nn.Module] = []
        for layer in sequential:
            before = layers[-1] if layers else None
            if isinstance(before, torch.nn.Linear) and isinstance(layer, torch.nn.BatchNorm1d) and _is_affine(layer):
                layers[-1] = fuse_linear_bn_eval(before, layer)
            else:
                layers.append(layer)
        sequential._modules = {str(number): layer for number, layer in enumerate(layers)}
    return module


def _is_affine(norm: torch.nn.BatchNorm1d) -> bool:
    return norm.affine and norm.track_running_stats
