"""Multipliers that keep a term's gradient as strong as the task loss's, whatever the scale of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRST_CALLS, _EVERY = 10, 16


class GradientBalance(torch.nn.Module):
    r"""Measure by how much each term has to be multiplied to draw as strongly as the task loss does.

    .. math:: \lambda_m = \frac{\sum_t \sum_i \lVert \partial L_{task} / \partial f_i \rVert}
        {\sum_t \sum_i \lVert \partial L_m / \partial f_i \rVert}, \quad i \text{ with } \partial L_m / \partial f_i
        \neq 0

    The sums go over all calls that measure, the first ten and every sixteenth after them: the task loss's gradient
    fades as it is learned, and a term that followed it would fade along. A measurement costs a second way back from
    both losses to the embeddings, and reads nothing back from the device. Until there is one, and where the task loss
    has no gradient, the multiplier is 1. What a term alone trains, a map or a discriminator, gets the gradient of the
    term without the multiplier. Sums and calls are in ``state_dict``.

    Args:
        names: of the terms that are balanced.
    """

    task_lengths: torch.Tensor
    term_lengths: torch.Tensor
    calls: torch.Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.register_buffer("task_lengths", torch.zeros(len(self.names)))
        self.register_buffer("term_lengths", torch.zeros(len(self.names)))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self._calls = 0  # the same number: to read the buffer would be to wait for the device
        self.register_load_state_dict_post_hook(_count_calls)

    @property
    def is_new(self) -> bool:
        """Whether nothing has been measured."""
        return self._calls == 0

    def weight(self, name: str) -> torch.Tensor:
        """Return the multiplier of a term, 0-dimensional, without a gradient."""
        return self.weights([name])[0]

    def weights(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Return the multipliers of several terms."""
        task, term = self.task_lengths, self.term_lengths
        found = torch.where((task > 0) & (term > 0), task / term, 1.0).unbind()
        return [found[self.names.index(name)] for name in names]

    @torch.compiler.disable
    def measure(self, task_loss: torch.Tensor, terms: dict[str, tuple[torch.Tensor, torch.Tensor, int]]) -> None:
        """Take a measurement, where one is due.

        Args:
            task_loss: reduced.
            terms: of each name its losses, whose mean counts, the tensor whose gradient counts by rows, and its
                dimension of rows.
        """
        due = self._calls < _FIRST_CALLS or self._calls % _EVERY == 0
        self._calls += 1
        self.calls.add_(1)
        if not due or not task_loss.requires_grad:
            return
        task_gradients: dict[int, Any] = {}
        for name, (losses, rows, dim) in terms.items():
            if not losses.requires_grad or not rows.requires_grad:
                continue
            own = _row_lengths(losses.mean(), rows, dim)
            if id(rows) not in task_gradients:
                task_gradients[id(rows)] = _row_lengths(task_loss, rows, dim)
            task = task_gradients[id(rows)]
            if own is None or task is None:
                continue
            found = torch.stack([(task * (own > 0)).sum(), own.sum()]).to(self.task_lengths)
            found = torch.where(torch.isfinite(found).all(), found, 0.0)  # an overflow in half precision
            index = self.names.index(name)
            self.task_lengths[index] += found[0]
            self.term_lengths[index] += found[1]


def _row_lengths(loss: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor | None:
    (gradient,) = torch.autograd.grad(loss, rows, retain_graph=True, allow_unused=True)
    return None if gradient is None else torch.linalg.vector_norm(gradient.float().movedim(dim, 0).flatten(1), dim=1)


def _count_calls(balance: GradientBalance, _: Any) -> None:
    balance._calls = int(balance.calls)
