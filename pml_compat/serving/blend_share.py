"""Which share of the new query a blend should have, judged by what each finds among items."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch.nn.functional import normalize

from .rotation import QueryMap, as_they_are, coefficients, procrustes, sphered, stand_alike, whitened

_SHARES = tuple(step / 10 for step in range(11))
_FOLDS = 4
_NEIGHBORS = 10  # of both models together, which are right where there are no labels
_DEPTH = 10  # places by which maps are compared; a share is chosen by the first, as P@1 is what counts
_ERRORS = 2  # standard errors by which a map has to find more to be taken
_ERRORS_CLEAR = 5  # for a whitened map, or to find more alone: on items that a model learned a little more is nothing
_BLOCK = 512  # rows of scores at once
_RELATED = 0.6  # share of items that a rotated query of a related model puts below its own; of another model's a half


Fit = Callable[[torch.Tensor, torch.Tensor], QueryMap]  # of new and old rows


class ShareJudge:
    """What shares find among items that neither the rotation nor, with labels, any of its classes was seen in."""

    def __init__(
        self, u: torch.Tensor, v: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        self.u, self.v, self.labels = u, v, labels
        self.first_counts = labels is not None
        self.depth = min(_DEPTH, len(u) - 1)
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

    def choose(self) -> tuple[Fit, float]:
        """Return how new queries are to be mapped, and the share.

        Maps are compared by the first ten places, as one place tells little where many queries stand at one point. The
        share between two models that were not trained to fit is chosen by the first place: the new one knows the items
        given here better than others, and has the larger share the further down one looks. Where it knows their classes
        by heart, labels flatter it at the first place too, so it has no larger share than what both models together
        find bears out.

        A new model that fits the old one as it is, and by itself finds clearly more, is what the blend is measured by:
        with labels it is left alone unless a blend of the two adds more than it does. Such a model was trained to fit,
        mostly on the very items given here, which lie closer together than others do: no rotation is taken for it that
        does not find significantly more, and no whitening, which finds more among such items and less among others. Two
        models that fit by chance, as two trained from the same start may, are two like any others: a rotation turns
        the new rows appreciably, and a map brings them nearer to their own old ones. So are two of which the new one
        finds hardly more, but these may need no rotation.
        """
        (plain, near), (turned, turned_near), (level, level_near) = map(self._found, (as_they_are, procrustes, sphered))
        if self.labels is None and not _related(turned_near):
            return procrustes, 0.0  # of two models that have nothing in common no one knows who is right
        nearer = any(_is_more(other - near, _ERRORS) for other in (turned_near, level_near))
        fits = _related(near) and (stand_alike(self.v, self.u) or not nearer)
        precision = _precision(plain)
        most, added = float(precision.sum(1).max() - precision[-1].sum()), precision[-1] - precision[0]
        if fits and _is_more(added, _ERRORS_CLEAR):
            self.first_counts = self.labels is None  # further down a trained model agrees with itself
            if self.labels is not None and float(added.sum()) >= most:
                return as_they_are, 1.0
            fit: Fit = procrustes if _adds(turned, plain) else as_they_are
            return fit, self._cautious(self._counted(turned if fit is procrustes else plain))
        maps = (procrustes, whitened, sphered)
        found = (turned, self._found(whitened)[0], level)
        shares = [self._share(*one) for one in zip(maps, found, strict=True)]
        reached = [_precision(one)[_SHARES.index(share)] for one, share in zip(found, shares, strict=True)]
        best = max(range(len(maps)), key=lambda place: float(reached[place].sum()))
        best = best if _is_more(reached[best] - reached[0], _ERRORS_CLEAR) else 0
        if fits and _adds(plain, found[best]):
            return as_they_are, self._share(as_they_are, plain)
        return maps[best], shares[best]

    def _share(self, fit: Fit, found: torch.Tensor) -> float:
        """Return the share of a map, by labels no larger than what both models bear out."""
        share = self._cautious(self._counted(found))
        return share if self.labels is None else min(share, self._borne_out(fit))

    @cached_property
    def _by_both(self) -> ShareJudge:
        return ShareJudge(self.u, self.v, None, torch.Generator().manual_seed(0))

    def _borne_out(self, fit: Fit) -> float:
        """Return the largest share up to which queries find what both models together find, as well as old ones do."""
        hits = self._by_both._found(fit)[0][..., 0]
        worse = [_is_more(hits[0] - one, _ERRORS) for one in hits]
        return _SHARES[worse.index(True) - 1] if True in worse else _SHARES[-1]

    def _found(self, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(shares, N, places)``, where each query finds something right, and ``(N,)``, the share of all items
        that each mapped row puts below its own."""
        found = torch.zeros(len(_SHARES), len(self.u), self.depth, dtype=torch.float64)
        below = torch.zeros(len(self.u), dtype=torch.float64)
        for queries in self.folds:
            mapped = fit(self.v[~queries], self.u[~queries])
            places, share = self._right(queries.nonzero()[:, 0], mapped, _SHARES)
            found[:, queries.cpu()], below[queries.cpu()] = places.cpu(), share.double().cpu()
        return found, below

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

    def finds(self, mapped: QueryMap, share: float) -> float:
        """Return what all queries together find: how many something right first, or the sum of their precisions."""
        queries = torch.arange(len(self.u), device=self.u.device)
        return float(self._counted(self._right(queries, mapped, (share,))[0].cpu()).sum())

    def _counted(self, found: torch.Tensor) -> torch.Tensor:
        return found[..., 0] if self.first_counts else _precision(found)

    def _right(
        self, queries: torch.Tensor, mapped: QueryMap, shares: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found, below = [], []
        for numbers in queries.split(_BLOCK):
            u, v = self.u[numbers], normalize(mapped(self.v[numbers]), dim=1)
            old, new, cosine = u @ self.u.t(), v @ self.u.t(), (u * v).sum(1, keepdim=True)
            own = torch.arange(len(numbers), device=u.device), numbers
            below.append((new < new[own][:, None]).float().mean(1))
            old[own] = new[own] = -torch.inf
            first = []
            for share in shares:
                a, b = coefficients(cosine, share)
                scores = new if share == 1 else old if share == 0 else a * old + b * new
                first.append(scores.topk(self.depth, dim=1).indices)
            found.append(self._is_right(numbers, torch.stack(first)))
        return torch.cat(found, dim=1), torch.cat(below)

    def _is_right(self, numbers: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        if self.labels is not None:
            return (self.labels[first] == self.labels[numbers, None]).double()
        return (self.right[numbers, None] == first[..., None]).any(3).double()


def _precision(found: torch.Tensor) -> torch.Tensor:
    """Return the mean of each query's precisions at 1, 2, and so on, of ``(shares, N, places)``."""
    return (found.cumsum(2) / torch.arange(1, found.shape[2] + 1)).mean(2)


def _related(below: torch.Tensor) -> bool:
    """Tell whether the two models, as mapped, have to do with each other."""
    return float(below.mean()) >= _RELATED


def _adds(found: torch.Tensor, less: torch.Tensor) -> bool:
    """Tell whether the best share of ``found`` finds significantly more than that of ``less``."""
    one, other = (_precision(places) for places in (found, less))
    return _is_more(one[one.sum(1).argmax()] - other[other.sum(1).argmax()], _ERRORS)


def _is_more(differences: torch.Tensor, errors: float) -> bool:
    """Tell whether the sum of the queries' differences is above 0 by more than so many of its standard errors."""
    return float(differences.sum()) > errors * _error(differences)


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
