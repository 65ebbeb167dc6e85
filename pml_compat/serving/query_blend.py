"""Two finished models at query time: the new query, rotated into the old space, blended with the old one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import check_labels, check_matrix, check_same_device, stored_rows
from .._extras import import_extra
from .._files import load_tensors, save_tensors, whole_file
from .._rows import precise_dtype, unit_rows_as_given
from ..transformations import OrthogonalTransformation

_FORMAT = "pml_compat.QueryBlend/1"
_SHARES = tuple(step / 10 for step in range(11))
_ROTATION_ROWS = 2**15  # that the rotation is fitted to, at most
_JUDGED_ROWS = 4096  # that the share is chosen on; the scores are their square
_FOLDS = 4
_NEIGHBORS = 10  # of both models together, which are right where there are no labels
_BLOCK = 512  # rows of scores at once
_SEEN_ROWS = 8  # queries that tell whether the two models were exchanged
_SHORT_ARC, _NEAR_OPPOSITE = 1e-4, 2e-3  # radians
_RELATED = 0.6  # share of items that a rotated query of a related model puts below its own; of another model's a half


class QueryBlend:
    r"""Search the old gallery with a blend of the old and the new model's query; nothing is trained or rewritten.

    .. math:: v = n(n(f_{new}) R), \quad \theta = \angle(u, v), \quad
        q = \frac{\sin((1 - a) \theta)\, u + \sin(a \theta)\, v}{\sin \theta}

    :math:`u` is the old model's unit query, :math:`R` the semi-orthogonal map that best takes the new model's unit rows
    to the old model's (orthogonal Procrustes, uncentred). The share :math:`a` is 0 where the old query is best alone.
    Both encoders run at query time; the gallery, and new/new, stay as they are.

    A query is rotated, as a regression draws it to the mean and loses what tells classes apart; where the *gallery* is
    mapped, a regression is right (:class:`pml_compat.transformations.LinearTransformation`).

    Models that already fit each other (BCT, LCE, a head's ``old_part``) blend too: no rotation at all, the first
    coordinates as they are, is among the choices.

    Attributes:
        share: :math:`a`, in [0, 1].
        rotation: :math:`R`, ``(D_new, D_old)`` float32.
        old_fingerprint: of the old model behind what it was fitted to, where that said so.
        new_fingerprint: of the new model, likewise.
    Example:
        >>> old, turn = torch.randn(200, 4), torch.linalg.qr(torch.randn(4, 4))[0]
        >>> blend = QueryBlend().fit(old, old @ turn, torch.arange(200) % 5)
        >>> torch.allclose(blend.query_rows(old, old @ turn), torch.nn.functional.normalize(old), atol=1e-4)
        True

    Reference:
        "Rotate, then interpolate", arXiv:2609.39836, 2026. Differs in: the share is chosen on folds that neither the
        rotation nor, with labels, any class was seen in, the middle one of those up to the best and within a standard
        error of it; without labels what is right is what both models' similarities together rank first, as an item of
        a single modality always finds itself.
    """

    share: float
    rotation: torch.Tensor
    old_fingerprint: str | None
    new_fingerprint: str | None

    def fit(self, old: Any, new: Any, labels: Any = None, *, seed: int = 0) -> QueryBlend:
        """Find the rotation and the share, in seconds; return ``self``.

        Items that neither model was trained on tell most. A thousand are enough at a width of 128.

        Args:
            old: ``(N, D_old)``, the old model's embeddings: tensor, array, memory map or ``FrozenEmbeddings``, whose
                fingerprint is kept.
            new: ``(N, D_new)``, row i of the same item.
            labels: ``(N,)``, of the items; two classes or more. The share is then the one with the best P@1, each item
                left out of its own ranking, else the one that finds best what both models together find.
            seed: of the sample of rows and of the folds.
        Raises:
            ValueError: lengths that differ, fewer than two rows, NaN or infinity; one class alone, or no two items of
                one class.
        """
        for rows, name in ((old, "old"), (new, "new")):
            if not hasattr(rows, "shape"):
                raise ValueError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(rows).__name__}")
            if len(rows.shape) != 2:
                raise ValueError(f"{name} must be 2-dimensional, (N, D), got shape {tuple(rows.shape)}")
        if len(old) != len(new):
            raise ValueError(f"new must have the items of old, row by row: expected {len(old)} rows, got {len(new)}")
        if len(old) < 2:
            raise ValueError(f"old must have two rows or more to fit to, got {len(old)}")
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(old), generator=generator)[:_ROTATION_ROWS]
        u, v = (_unit(stored_rows(rows, index, name), name) for rows, name in ((old, "old"), (new, "new")))
        check_same_device(v, "new", u, "old")
        if labels is not None:
            labels = check_labels(labels, length=len(old))
            labels = labels[index.to(labels.device)].to(u.device)
        few = _JUDGED_ROWS
        judge = _Judge(u[:few], v[:few], None if labels is None else labels[:few], generator)
        self.old_fingerprint, self.new_fingerprint = (getattr(rows, "fingerprint", None) for rows in (old, new))
        rotations = [torch.eye(v.shape[1], u.shape[1], device=u.device), procrustes(v, u)]
        found = [judge.best_share(turned) for turned in (False, True)]
        turned = found[0][0] == 0 or found[1][1] >= found[0][1]
        self.share, self.rotation = found[turned][0], rotations[turned]
        if judge.hits(self.rotation, self.share) < judge.hits(self.rotation, 0.0):
            self.share = 0.0
        self._agreement = float((u * normalize(v @ self.rotation, dim=1)).sum(1).mean())
        self._known_to_fit = False
        return self

    @torch.no_grad()
    def query_rows(self, old_query: Any, new_query: Any) -> torch.Tensor:
        """Return unit rows ``(N, D_old)`` to search the old gallery with, in the dtype of ``old_query``.

        Args:
            old_query: ``(N, D_old)``, the old model's (or a head's ``old_part``).
            new_query: ``(N, D_new)``, the new model's of the same queries.
        Raises:
            ValueError: not fitted; other widths or numbers of rows, another device; the two models exchanged; the
                fingerprint of ``FrozenEmbeddings`` is another model's.
        """
        rotation = self._fitted().rotation
        for rows, name, own in (
            (old_query, "old_query", self.old_fingerprint),
            (new_query, "new_query", self.new_fingerprint),
        ):
            given = getattr(rows, "fingerprint", None)
            if given is not None and own is not None and given != own:
                raise ValueError(f"{name} must be of the model with fingerprint {own!r}, got {given!r}")
        old, new = (rows[:] if hasattr(rows, "fingerprint") else rows for rows in (old_query, new_query))
        old = check_matrix(old, "old_query", rotation.shape[1])
        new = check_matrix(new, "new_query", rotation.shape[0])
        if len(old) != len(new):
            raise ValueError(f"new_query must have the queries of old_query, {len(old)}, got {len(new)}")
        check_same_device(new, "new_query", old, "old_query")
        precise = precise_dtype(old.dtype)
        u, v, rotation = unit_rows_as_given(old.to(precise)), new.to(precise), rotation.to(old.device, precise)
        if not self._known_to_fit and len(u) >= _SEEN_ROWS and u.shape == v.shape:
            self._check_order(u, unit_rows_as_given(v), rotation)
        return interpolate(u, unit_rows_as_given(v @ rotation), self.share).to(old.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rotation, share and both fingerprints to a safetensors file; it appears whole or not at all."""
        fitted = self._fitted()
        numbers = torch.tensor([fitted.share, fitted._agreement], dtype=torch.float64)
        names = {"old_fingerprint": fitted.old_fingerprint, "new_fingerprint": fitted.new_fingerprint}
        metadata = {name: value for name, value in names.items() if value is not None}
        tensors = {"rotation": fitted.rotation, "share_and_agreement": numbers}
        save_tensors(path, tensors, {"format": _FORMAT, "direction": "new to old", **metadata})

    @torch.no_grad()
    def export(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.onnx`` file with the inputs ``old_query`` and ``new_query`` and the output ``query``, float32.

        :class:`NumpyQueryBlend` reads what :meth:`save` wrote, on a server without torch.

        Raises:
            ImportError: onnx and onnxscript (extra ``onnx``) are not installed.
            ValueError: ``path`` is no ``.onnx`` file.
        """
        if Path(path).suffix != ".onnx":
            raise ValueError(f"path must be an .onnx file, got {os.fspath(path)!r}")
        for module in ("onnx", "onnxscript"):
            import_extra(module, "onnx")
        fitted = self._fitted()
        inputs = tuple(torch.randn(2, width) for width in reversed(fitted.rotation.shape))
        rows = torch.export.Dim("rows", min=1)
        with whole_file(path) as temporary:
            torch.onnx.export(
                _Program(fitted.rotation, fitted.share).eval(),
                inputs,
                temporary,
                input_names=["old_query", "new_query"],
                output_names=["query"],
                dynamic_shapes=({0: rows}, {0: rows}),
                external_data=False,
                dynamo=True,
                verbose=False,
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        old_fingerprint: str | None = None,
        new_fingerprint: str | None = None,
    ) -> QueryBlend:
        """Read what :meth:`save` wrote, onto the CPU.

        Args:
            path: the file.
            old_fingerprint: :func:`~pml_compat.frozen.model_fingerprint` of the old model that will answer; the file
                must have the same.
            new_fingerprint: of the new model.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a truncated file, one that holds something else, or the fingerprint of another model.
        """
        tensors, metadata = load_tensors(path, _FORMAT, "QueryBlend.save")
        if {"rotation", "share_and_agreement"} - set(tensors):
            raise ValueError(f"path must be a file written by QueryBlend.save, {os.fspath(path)!r} is not")
        blend = cls()
        blend.rotation = tensors["rotation"]
        blend.share, blend._agreement = tensors["share_and_agreement"].tolist()
        blend.old_fingerprint, blend.new_fingerprint = map(metadata.get, ("old_fingerprint", "new_fingerprint"))
        blend._known_to_fit = False
        given = {"old_fingerprint": old_fingerprint, "new_fingerprint": new_fingerprint}
        for name, value in given.items():
            own = getattr(blend, name)
            if value is not None and value != own:
                other = blend.new_fingerprint if name == "old_fingerprint" else blend.old_fingerprint
                swapped = "; old and new model are exchanged" if value == other else ""
                raise ValueError(f"{name} must be that of the model it was fitted to, {own!r}, got {value!r}{swapped}")
        return blend

    def __repr__(self) -> str:
        if not hasattr(self, "rotation"):
            return "QueryBlend(not fitted)"
        return (
            f"QueryBlend(new_features={len(self.rotation)}, old_features={self.rotation.shape[1]}, share={self.share})"
        )

    def _fitted(self) -> QueryBlend:
        if not hasattr(self, "rotation"):
            raise ValueError("QueryBlend must be fitted first: call .fit(old, new, labels), or .load(path)")
        return self

    def _check_order(self, u: torch.Tensor, v: torch.Tensor, rotation: torch.Tensor) -> None:
        """Raise a ValueError where the other order of the two fits what was fitted, and this one does not."""
        given = float((u * normalize(v @ rotation, dim=1)).sum(1).mean())
        exchanged = float((v * normalize(u @ rotation, dim=1)).sum(1).mean())
        nearer = abs(exchanged - self._agreement) < abs(given - self._agreement)
        if nearer and exchanged - given > 0.25 * abs(self._agreement):
            raise ValueError(
                "old_query must be the old model's and new_query the new model's, got them exchanged: after the "
                f"rotation their mean cosine is {given:.2f}, the other way round {exchanged:.2f}, and where the blend "
                f"was fitted it was {self._agreement:.2f}"
            )
        self._known_to_fit = True


class _Program(torch.nn.Module):
    rotation: torch.Tensor

    def __init__(self, rotation: torch.Tensor, share: float) -> None:
        super().__init__()
        self.register_buffer("rotation", rotation.float())
        self.share = share

    def forward(self, old_query: torch.Tensor, new_query: torch.Tensor) -> torch.Tensor:
        u, v = normalize(old_query, dim=1), normalize(normalize(new_query, dim=1) @ self.rotation, dim=1)
        return interpolate(u, v, self.share)


def procrustes(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the ``(D_source, D_target)`` semi-orthogonal map that best takes unit rows to unit rows, float32."""
    fitted = OrthogonalTransformation(source.shape[1], target.shape[1]).fit(source, target)
    return fitted.base.to(source.device, torch.float32)


def interpolate(u: torch.Tensor, v: torch.Tensor, share: float) -> torch.Tensor:
    """Return the unit rows at ``share`` of the way from ``u`` to ``v`` on the great circle."""
    if share in (0.0, 1.0):
        return v if share else u
    first, second = _coefficients((u * v).sum(1, keepdim=True), share)
    return unit_rows_as_given(first * u + second * v)


def alignability(old: Any, new: Any, *, max_rows: int = 2048, seed: int = 0) -> float:
    r"""Measure how far two models disagree about which items are alike, before anything is fitted.

    .. math:: \sqrt{\operatorname{mean}_{i \ne j} (\langle u_i, u_j \rangle - \langle v_i, v_j \rangle)^2}

    over unit rows: 0 where one space is a rotation of the other. The error of the best rotation is bounded by it.

    Args:
        old: ``(N, D_old)`` tensor, array or memory map.
        new: ``(N, D_new)``, row i of the same item.
        max_rows: of more items, that many are drawn at random.
        seed: of that draw.
    Raises:
        ValueError: lengths that differ, fewer than two rows, NaN or infinity.
    Reference:
        arXiv:2510.13406, 2025.
    """
    if len(old) != len(new) or len(old) < 2:
        raise ValueError(f"old and new must have the same two items or more, got {len(old)} and {len(new)} rows")
    index = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:max_rows]
    u, v = (_unit(stored_rows(rows, index, name), name) for rows, name in ((old, "old"), (new, "new")))
    difference = u @ u.t() - v @ v.t()
    difference.fill_diagonal_(0)
    return float((difference.square().sum() / (len(u) * (len(u) - 1))).sqrt())


class _Judge:
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
                a, b = _coefficients(cosine, share)
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


def _coefficients(cosine: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the two ends weigh, but for a factor: along the chord of a short arc; of opposite ends the first."""
    angle = cosine.clamp(-1, 1).arccos()
    short, opposite = angle < _SHORT_ARC, angle > torch.pi - _NEAR_OPPOSITE
    first = torch.where(short, 1 - share, torch.sin((1 - share) * angle))
    second = torch.where(short, share, torch.sin(share * angle))
    return torch.where(opposite, 1.0, first), torch.where(opposite, 0.0, second)


def _unit(rows: Any, name: str) -> torch.Tensor:
    return normalize(check_matrix(rows, name).detach().float(), dim=1)
