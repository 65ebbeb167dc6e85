"""Which gallery items belong to each query: its positives, or what is left out of its ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Matches:
    """Gallery items of each query, as lists of gallery rows; subclasses give :meth:`lists`.

    No more is ever held than the lists of the queries asked for.
    """

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(q, P)`` gallery rows of the ``(q,)`` queries, ascending, and which entries are no padding."""
        raise NotImplementedError

    def runs(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the same as runs of one list: the list, where each query's begins, and its length."""
        index, valid = self.lists(queries)
        length = valid.sum(1)
        return index[valid], length.cumsum(0) - length, length

    def neighbours(self, n_query: int) -> torch.Tensor:
        """Return the numbers of all queries, those with the same items one after the other if that is known."""
        return torch.arange(n_query)

    def most(self) -> torch.Tensor:
        """Return the number of items that a query has at most; 0 where that would have to be counted."""
        return torch.zeros(1, dtype=torch.long)

    def pairs(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as pairs: the place in ``queries``, and the gallery row."""
        index, valid = self.lists(queries)
        return valid.nonzero()[:, 0], index[valid]


class EqualCodes(Matches):
    """Items whose code, a label or an id, is the query's."""

    def __init__(self, query_codes: torch.Tensor, reference_codes: torch.Tensor) -> None:
        ordered, self.order = torch.sort(reference_codes, stable=True)
        self.start = torch.searchsorted(ordered, query_codes.contiguous())
        self.count = torch.searchsorted(ordered, query_codes.contiguous(), right=True) - self.start

    def most(self) -> torch.Tensor:
        """Return the number of items that a query has at most."""
        return self.count.max()

    def runs(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the items with each query's code; queries share the list."""
        return self.order, self.start[queries], self.count[queries]

    def neighbours(self, n_query: int) -> torch.Tensor:
        """Return the numbers of all queries, those with the same code one after the other."""
        return torch.argsort(self.start, stable=True)

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the items with each query's code."""
        count = self.count[queries]
        place = torch.arange(int(count.max()), device=count.device)
        index = self.order[(self.start[queries, None] + place).clamp_max_(len(self.order) - 1)]
        return index, place < count[:, None]


class SamePosition(Matches):
    """Row i of the gallery for query i."""

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each query's own number."""
        return queries[:, None], torch.ones_like(queries[:, None], dtype=torch.bool)


class Compared(Matches):
    """Items that a function of the user's own says match; its ``(q, N)`` answers are turned into lists."""

    def __init__(self, match: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.match = match

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the items that match each query."""
        row, item = self.match(queries).nonzero(as_tuple=True)
        return padded(row, item, len(queries))


def padded(row: torch.Tensor, value: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values, given in the order of their rows, as a ``(rows, P)`` matrix, and which entries are no padding."""
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    width = int(count.max())
    matrix = value.new_zeros(rows, width)
    matrix[row, place] = value
    return matrix, torch.arange(width, device=row.device) < count[:, None]


def mask(matches: list[Matches], queries: torch.Tensor, n_reference: int) -> torch.Tensor:
    """Return ``(q, N)`` bool: whether any of ``matches`` has the item."""
    out = torch.zeros(len(queries), n_reference, dtype=torch.bool, device=queries.device)
    for one in matches:
        out[one.pairs(queries)] = True
    return out


def joined_runs(
    matches: Sequence[Matches], queries: torch.Tensor, n_reference: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the items that any of ``matches`` has, as runs of one list."""
    if len(matches) == 1:
        return matches[0].runs(queries)
    pairs = [one.pairs(queries) for one in matches]
    keys = torch.cat([row * n_reference + item for row, item in pairs] or [queries[:0]]).unique()
    length = torch.bincount(keys // n_reference, minlength=len(queries))
    return keys % n_reference, length.cumsum(0) - length, length
