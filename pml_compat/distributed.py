"""The gather over the processes of a ``torch.distributed`` group, with and without a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ._rows import precise_dtype


def gathered(value: Any, group: Any) -> list[Any]:
    """Return ``value`` of every process of the group, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gathered_parts(part: torch.Tensor, sizes: list[int], group: Any, dim: int = 0) -> list[torch.Tensor]:
    """Return the part of every process, in the order of the ranks; along ``dim`` each has the size that ``sizes`` says.

    Its other sizes, its dtype and its device are the same in every process.
    """
    padded = part.new_zeros(*part.shape[:dim], max(sizes), *part.shape[dim + 1 :])
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [one.narrow(dim, 0, size) for one, size in zip(parts, sizes, strict=True)]


class GatherWithGradient(torch.autograd.Function):
    """Rows of all ranks, one rank after the other; backward, a rank's rows receive the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
        """Return the ``(sum(sizes), ...)`` rows of all ranks."""
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, rows.dtype
        return torch.cat(gathered_parts(rows, sizes, group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the sum over the ranks of the gradients of this rank's rows."""
        # float32: numbers of many ranks, each like the other, add up badly in less.
        dtype = precise_dtype(ctx.dtype)
        total = grad.to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)].to(ctx.dtype), None, None


@contextmanager
def agreeing(group: Any, name: str) -> Iterator[None]:
    """Raise a ValueError in every process of the group ``name`` where the block raises one in any of them."""
    problem = None
    try:
        yield
    except ValueError as error:
        if group is None:
            raise
        problem = str(error)
    if group is not None:
        for rank, found in enumerate(gathered(problem, group)):
            if found is not None:
                raise ValueError(f"rank {rank} of {name}: {found}")
