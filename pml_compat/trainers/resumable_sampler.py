"""The order of a training, such that it can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._checks import check_integer


class ResumableSampler(torch.utils.data.BatchSampler):
    """Batches in an order that depends on the seed and the epoch alone, begun where the last run stopped.

    It is a DataLoader's ``batch_sampler``. After each training step say so by :meth:`advance`; the DataLoader may have
    drawn batches ahead, so that only the loop knows where the training is. Iterating gives the rest of the current
    epoch, which :meth:`advance` ends after its last batch.

    Args:
        length: the number of samples, ``len(dataset)``.
        batch_size: samples a batch.
        seed: of the order; each epoch has its own.
        shuffle: False for the order of the data set.
        drop_last: leave out the samples at the end of an epoch that fill no batch.
    Raises:
        ValueError: ``length`` or ``batch_size`` below 1, too few samples for one batch, a negative seed; in
            :meth:`load_state_dict`, a state of other arguments or out of range.
        RuntimeError: an epoch was drawn to its end and :meth:`advance` never called.
    Example:
        >>> sampler = ResumableSampler(length=5, batch_size=2, shuffle=False)
        >>> next(iter(sampler)), sampler.advance(), list(sampler)
        ([0, 1], None, [[2, 3], [4]])
        >>> sampler.state_dict()
        {'epoch': 0, 'position': 1, 'length': 5, 'batch_size': 2, 'seed': 0, 'shuffle': False, 'drop_last': False}
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, *, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        self.length = check_integer(length, "length", minimum=1)
        self.batch_size = check_integer(batch_size, "batch_size", minimum=1)
        self.seed = check_integer(seed, "seed", minimum=0)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        if len(self) == 0:
            raise ValueError(f"batch_size must be at most length, {length}, with drop_last, got {batch_size}")
        self.epoch = self.position = 0
        self._drawn_whole: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        here = (self.epoch, self.position)
        if self._drawn_whole == here:
            raise RuntimeError(
                f"ResumableSampler: epoch {self.epoch} was drawn to its end, but position is still {self.position}; "
                "call advance() after each training step"
            )
        batches = self._order().split(self.batch_size)[: len(self)]
        for batch in batches[self.position :]:
            yield batch.tolist()
        self._drawn_whole = here

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        # Not seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed)
        own_seed = int(torch.randint(2**62, (1,), generator=generator)) + self.epoch
        return torch.randperm(self.length, generator=generator.manual_seed(own_seed))

    def advance(self) -> None:
        """Count one batch as trained."""
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches of it that are trained, and the arguments."""
        return {"epoch": self.epoch, "position": self.position, **self._arguments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a sampler with the same arguments."""
        given = {name: state.get(name) for name in self._arguments()}
        if given != self._arguments():
            raise ValueError(f"the state must be of a sampler with {self._arguments()}, got one with {given}")
        epoch = check_integer(state.get("epoch"), "epoch", minimum=0)
        position = check_integer(state.get("position"), "position", minimum=0)
        if position >= len(self):
            raise ValueError(f"position must be below the {len(self)} batches of an epoch, got {position}")
        self.epoch, self.position, self._drawn_whole = epoch, position, None

    def _arguments(self) -> dict[str, Any]:
        names = ("length", "batch_size", "seed", "shuffle", "drop_last")
        return {name: getattr(self, name) for name in names}
