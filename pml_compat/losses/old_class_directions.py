"""Where queries of each class should stand among old embeddings that come batch by batch."""

from __future__ import annotations

from typing import Any

import torch

from .._rows import at_least_float32, fit_width, unit_rows, whitening

_POWER = 0.5  # of the second moments: whitening as it is mostly meant


class OldClassDirections(torch.nn.Module):
    r"""Directions of classes, from the sums of old embeddings seen so far.

    .. math:: t_y = n(C^{-1/2} m_y)

    :math:`m_y` is the mean of class y's unit rows, :math:`C` are the second moments of all of them. Whitened, a class's
    mean has less of what all classes have in common and more of what tells it from others. :math:`C^{-1/2}` is taken
    anew at the first call, the second, the fourth and so on, as it changes less and less. All of it is in
    ``state_dict``.

    Args:
        rows: ``(C, D)``, whose shape, device and dtype, float32 at least, the sums have.
    """

    sums: torch.Tensor
    moments: torch.Tensor
    whitening: torch.Tensor
    calls: torch.Tensor

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(at_least_float32(rows.detach()))
        self.register_buffer("sums", zeros)
        self.register_buffer("moments", zeros.new_zeros(zeros.shape[1], zeros.shape[1]))
        self.register_buffer("whitening", torch.eye(zeros.shape[1]).to(zeros))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long, device=zeros.device))
        self._calls = 0  # the same number: to read the buffer would be to wait for the device
        self.register_load_state_dict_post_hook(_count_calls)

    @torch.compiler.disable  # the number of calls would be compiled in
    @torch.no_grad()
    def forward(self, old: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take account of old rows; return the direction of each one's class.

        Args:
            old: ``(N, D_old)`` unit rows, no wider than these directions.
            labels: ``(N,)``, the row of ``sums`` of each.
        Shape:
            - output: ``(N, D_old)`` unit rows in the dtype of ``old``
        """
        rows = fit_width(old, self.sums.shape[1]).to(self.sums)
        self.sums.index_add_(0, labels, rows)
        self.moments += rows.t() @ rows
        self.calls += 1
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            values, axes = torch.linalg.eigh(self.moments)
            self.whitening.copy_(whitening((values, axes), _POWER))
        return unit_rows(self.sums[labels] @ self.whitening)[:, : old.shape[1]].to(old.dtype)


def _count_calls(directions: OldClassDirections, _: Any) -> None:
    directions._calls = int(directions.calls)
