"""Which share of the new query a blend should have, judged by what each finds among items."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from .rotation import coefficients, procrustes, whitened

_SHARES = tuple(step / 10 for step in range(11))
_FOLDS = 4
_NEIGHBORS = 10  # of both models together, which are right where there are no labels
_BLOCK = 512  # rows of scores at once
_RELATED = 0.6  # share of items that a rotated query of a related model puts below its own; of another model's a half


Map = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # fitted to new and old rows


def as_they_are(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the map to the first coordinates."""
    return torch.eye(new.shape[1], old.shape[1], device=new.device)


def then_whitened(fit: Map) -> Map:
    """Return the map followed by a whitening by the old rows."""
    return lambda new, old: whitened(fit(new, old), old)


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

    def choose(self) -> tuple[Map, float]:
        """Return how new queries are to be mapped, and the share.

        A new model that fits the old one as it is, and by itself finds more, is what the blend is measured by: it is
        left alone unless a blend of the two adds more than it does. Such a model was trained to fit, mostly on the very
        items given here, and no other map is taken for it that does not find significantly more.
        """
        plain, fits = self._hits_by_share(as_they_are)
        turned, related = self._hits_by_share(procrustes)
        if self.labels is None and not related:
            return procrustes, 0.0  # of two models that have nothing in common no one knows who is right
        straight: Map = as_they_are
        if fits:
            straight, plain = self._whitened_or_not(straight, plain)
            gain = plain[-1] - plain[0]
            most, added = float(plain.sum(1).max() - plain[-1].sum()), float(gain.sum())
            if added > _error(gain) and added >= most:
                return straight, 1.0
        fit, hits = self._whitened_or_not(procrustes, turned)
        if fits and not _adds(hits, plain):
            fit, hits = straight, plain
        return fit, self._cautious(hits)

    def _whitened_or_not(self, fit: Map, hits: torch.Tensor) -> tuple[Map, torch.Tensor]:
        """Return the map, whitened where that finds significantly more, and what is found by it."""
        flat = then_whitened(fit)
        more, _ = self._hits_by_share(flat)
        return (flat, more) if _adds(more, hits) else (fit, hits)

    def _hits_by_share(self, fit: Map) -> tuple[torch.Tensor, bool]:
        """Return ``(shares, N)``, which queries find something right first, and whether the models, so mapped, have to
        do with each other."""
        hits = torch.zeros(len(_SHARES), len(self.u), dtype=torch.float64)
        for queries in self.folds:
            mapped = fit(self.v[~queries], self.u[~queries])
            hits[:, queries.cpu()] = self._hits(queries.nonzero()[:, 0], mapped, _SHARES).cpu()
        return hits, float(self.above.mean()) >= _RELATED

    @staticmethod
    def _cautious(hits: torch.Tensor) -> float:
        """Return the share a third of the way among those up to the best that are within a standard error of it."""
        best = int(hits.sum(1).argmax())
        near = [
            place
            for place in range(best + 1)
            if float((hits[best] - hits[place]).sum()) <= _error(hits[best] - hits[place])
        ]
        return _SHARES[near[len(near) // 3]]

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


def _adds(hits: torch.Tensor, less: torch.Tensor) -> bool:
    """Tell whether the best share of ``hits`` finds more than that of ``less``, by more than two standard errors."""
    more = hits[hits.sum(1).argmax()] - less[less.sum(1).argmax()]
    return float(more.sum()) > 2 * _error(more)


def _error(differences: torch.Tensor) -> float:
    """Return the standard error of the sum of the queries' differences."""
    return float(differences.var().mul(len(differences)).sqrt())


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
