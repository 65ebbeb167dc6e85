"""Batch normalisation that takes a batch of one."""

from __future__ import annotations

import torch


class BatchNorm(torch.nn.BatchNorm1d):
    """torch's ``BatchNorm1d``; in training a batch of one row, which has no variance, gets the running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C)``."""
        if self.training and len(input) == 1:
            return torch.nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)
