"""Which share of the new query a blend should have, judged by what each finds among items."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from .rotation import coefficients, procrustes

_SHARES = tuple(step / 10 for step in range(11))
_FOLDS = 4
_NEIGHBORS = 10  # of both models together, which are right where there are no labels
_BLOCK = 512  # rows of scores at once
_RELATED = 0.6  # share of items that a rotated query of a related model puts below its own; of another model's a half


class ShareJudge:
    """What shares find among items that neither the rotation nor, with labels, any of its classes was seen in."""

    def __init__(
        self, u: torch.Tensor, v: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        self.u, self.v, self.labels = u, v, labels
        self.above = torch.zeros(
            len(u), device=u.device
        )  # share of all items that the rotated query puts below its own
        if labels is None:
            self.right = _found_by_both(u, v)
            groups = torch.arange(len(u))
        else:
            classes, groups = torch.unique(labels, return_inverse=True)
            counts = torch.bincount(groups)
            if len(classes) < 2 or int(counts.max()) < 2:
                got = f"{len(classes)} classes of at most {int(counts.max())} items"
                raise ValueError(f"labels must have two classes or more and two items of one, got {got}")
            groups = groups.cpu()
        fold = torch.arange(int(groups.max()) + 1) % min(_FOLDS, int(groups.max()) + 1)
        fold = fold[torch.randperm(len(fold), generator=generator)][groups].to(u.device)
        self.folds = [fold == number for number in range(int(fold.max()) + 1)]

    def best_share(self, turned: bool) -> tuple[float, float]:
        """Return the middle one of the shares up to the best and within a standard error of it, and the best's hits."""
        hits = torch.zeros(len(_SHARES), len(self.u), dtype=torch.float64)
        for queries in self.folds:
            rotation = torch.eye(self.v.shape[1], self.u.shape[1], device=self.u.device)
            if turned:
                rotation = procrustes(self.v[~queries], self.u[~queries])
            hits[:, queries.cpu()] = self._hits(queries.nonzero()[:, 0], rotation, _SHARES).cpu()
        if self.labels is None and float(self.above.mean()) < _RELATED:
            return 0.0, float(hits[0].sum())  # of two models that have nothing in common no one knows who is right
        totals = hits.sum(1)
        best = int(totals.argmax())
        differences = hits[best] - hits
        error = differences.var(1).mul(len(self.u)).sqrt()
        near = (differences.sum(1) <= error)[: best + 1].nonzero()[:, 0]
        return _SHARES[int(near[len(near) // 2])], float(totals[best])

    def hits(self, rotation: torch.Tensor, share: float) -> int:
        """Return how many of all queries find something right first."""
        return int(self._hits(torch.arange(len(self.u), device=self.u.device), rotation, (share,)).sum())

    def _hits(self, queries: torch.Tensor, rotation: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
        found = []
        for numbers in queries.split(_BLOCK):
            u, v = self.u[numbers], normalize(self.v[numbers] @ rotation, dim=1)
            old, new, cosine = u @ self.u.t(), v @ self.u.t(), (u * v).sum(1, keepdim=True)
            own = torch.arange(len(numbers), device=u.device), numbers
            self.above[numbers] = (new < new[own][:, None]).float().mean(1)
            old[own] = new[own] = -torch.inf
            first = []
            for share in shares:
                a, b = coefficients(cosine, share)
                scores = new if share == 1 else old if share == 0 else a * old + b * new
                first.append(scores.argmax(1))
            found.append(self._is_right(numbers, torch.stack(first)))
        return torch.cat(found, dim=1)

    def _is_right(self, numbers: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        if self.labels is not None:
            return (self.labels[first] == self.labels[numbers]).double()
        return (self.right[numbers] == first[:, :, None]).any(2).double()


def _found_by_both(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the ``(N, 10)`` items that the two models' cosines, each as z-scores of its query, put first together."""
    found = []
    for start in range(0, len(u), _BLOCK):
        total = torch.zeros(())
        for rows in (u, v):
            cosines = rows[start : start + _BLOCK] @ rows.t()
            total = (cosines - cosines.mean(1, keepdim=True)) / cosines.std(1, keepdim=True).clamp(min=1e-12) + total
        total.diagonal(start).fill_(-torch.inf)
        found.append(total.topk(min(_NEIGHBORS, max(1, len(u) // 16)), dim=1).indices)  # fewer of few rows
    return torch.cat(found)
