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
from .blend_share import ShareJudge
from .rotation import QueryMap, interpolate, unit_embeddings

_FORMAT = "pml_compat.QueryBlend/1"
_ROTATION_ROWS = 2**15  # that the rotation is fitted to, at most
_JUDGED_ROWS = 4096  # that the share is chosen on; the scores are their square
_SEEN_ROWS = 8  # queries that tell whether the two models were exchanged


class QueryBlend:
    r"""Search the old gallery with a blend of the old and the new model's query; nothing is trained or rewritten.

    .. math:: v = n(n(f_{new}) R - r), \quad \theta = \angle(u, v), \quad
        q = \frac{\sin((1 - a) \theta)\, u + \sin(a \theta)\, v}{\sin \theta}

    :math:`u` is the old model's unit query, :math:`R` the semi-orthogonal map that best takes the new model's unit rows
    to the old model's (orthogonal Procrustes, uncentred, :math:`r = 0`). Two other maps are taken where they find
    significantly more, each at the share that it would have: the same times :math:`C^{-0.2}`, :math:`C` the second
    moments of the old model's unit rows, whose largest directions are those in which all items are alike; or a rotation
    of what rows differ by from their mean, :math:`r` being the mean's part, which is sought between rows whitened in
    part, by the power 1/4 of each model's covariance, and followed by :math:`C^{-0.35}`.
    The share :math:`a` is 0 where the old query is best alone. Both encoders run at query time; the gallery, and
    new/new, stay as they are.

    A query is rotated, as a regression draws it to the mean and loses what tells classes apart; where the *gallery* is
    mapped, a regression is right (:class:`pml_compat.transformations.LinearTransformation`).

    Models that already fit each other (BCT, LCE, a head's ``old_part``) blend too: no rotation at all, the first
    coordinates as they are, is among the choices; their queries are not whitened here (for BCT's and LCE's see
    :meth:`pml_compat.frozen.ClassCenters.query_rows`; a head whitens its own). Judged by labels, a new model that by
    itself finds clearly more than the old one keeps its own queries (``share`` 1) unless a blend adds more than it
    does; the old model is then not asked. That is right for queries of the classes it was trained on. For queries of
    other classes leave the labels out: then the old query keeps the larger share.

    Attributes:
        share: :math:`a`, in [0, 1].
        rotation: :math:`R`, ``(D_new, D_old)`` float32, whitening included.
        offset: :math:`r`, ``(D_old,)`` float32.
        old_fingerprint: of the old model behind what it was fitted to, where that said so.
        new_fingerprint: of the new model, likewise.
    Example:
        >>> labels, turn = torch.arange(200) % 5, torch.linalg.qr(torch.randn(8, 8))[0]
        >>> old = torch.eye(5, 8)[labels] + 0.1 * torch.randn(200, 8)
        >>> blend = QueryBlend().fit(old, old @ turn, labels)
        >>> torch.allclose(blend.query_rows(old, old @ turn), torch.nn.functional.normalize(old), atol=1e-4)
        True

    Reference:
        "Rotate, then interpolate", arXiv:2609.39836, 2026. Differs in: rows may be centred and whitened in part, as in
        Artetxe et al., "Generalizing and improving bilingual word embedding mappings with a multi-step framework of
        linear transformations", AAAI 2018, and Jegou and Chum, "Negative evidences and co-occurences in image
        retrieval", ECCV 2012, but on the side of the queries alone, as the gallery stays; the share is chosen on folds
        that neither the map nor, with labels, any class was seen in, a third of the way among those up to the best and
        within a standard error of it; without labels what is right is what both models' similarities together rank
        first, as an item of a single modality always finds itself, and by that the share with labels is bounded.
    """

    share: float
    rotation: torch.Tensor
    offset: torch.Tensor
    old_fingerprint: str | None
    new_fingerprint: str | None

    def fit(self, old: Any, new: Any, labels: Any = None, *, seed: int = 0) -> QueryBlend:
        """Find the rotation and the share, in seconds; return ``self``.

        Items that neither model was trained on tell most. A thousand are enough at a width of 128. Labels of classes
        that the new model was trained on flatter it, so the share by them is no larger than what both models together
        find bears out.

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
        u, v = (unit_embeddings(stored_rows(rows, index, name), name) for rows, name in ((old, "old"), (new, "new")))
        check_same_device(v, "new", u, "old")
        if labels is not None:
            labels = check_labels(labels, length=len(old))
            labels = labels[index.to(labels.device)].to(u.device)
        few = _JUDGED_ROWS
        judge = ShareJudge(u[:few], v[:few], None if labels is None else labels[:few], generator)
        self.old_fingerprint, self.new_fingerprint = (getattr(rows, "fingerprint", None) for rows in (old, new))
        fit_map, self.share = judge.choose()
        mapped = fit_map(v, u)
        self.rotation, self.offset = mapped
        if judge.finds(mapped, self.share) < judge.finds(mapped, 0.0):
            self.share = 0.0
        self._agreement = _agreement(mapped, u, v)
        self._known_to_fit = False
        return self

    @torch.no_grad()
    def query_rows(self, old_query: Any, new_query: Any) -> torch.Tensor:
        """Return unit rows ``(N, D_old)`` to search the old gallery with, in the dtype of ``old_query``.

        Args:
            old_query: ``(N, D_old)``, the old model's; None where ``share`` is 1 and nobody asks it.
            new_query: ``(N, D_new)``, the new model's of the same queries.
        Raises:
            ValueError: not fitted; None for a blend that needs both; other widths or numbers of rows, another device;
                the two models exchanged; the fingerprint of ``FrozenEmbeddings`` is another model's.
        """
        mapped = self._fitted()._mapped()
        for rows, name, own in (
            (old_query, "old_query", self.old_fingerprint),
            (new_query, "new_query", self.new_fingerprint),
        ):
            given = getattr(rows, "fingerprint", None)
            if given is not None and own is not None and given != own:
                raise ValueError(f"{name} must be of the model with fingerprint {own!r}, got {given!r}")
        if old_query is None:
            if self.share < 1:
                raise ValueError(f"old_query must be given, got None: the old query has a share of {1 - self.share:g}")
            new = new_query[:] if hasattr(new_query, "fingerprint") else new_query
            new = check_matrix(new, "new_query", len(self.rotation))
            return unit_rows_as_given(mapped(new.to(precise_dtype(new.dtype)))).to(new.dtype)
        old, new = (rows[:] if hasattr(rows, "fingerprint") else rows for rows in (old_query, new_query))
        old = check_matrix(old, "old_query", self.rotation.shape[1])
        new = check_matrix(new, "new_query", self.rotation.shape[0])
        if len(old) != len(new):
            raise ValueError(f"new_query must have the queries of old_query, {len(old)}, got {len(new)}")
        check_same_device(new, "new_query", old, "old_query")
        precise = precise_dtype(old.dtype)
        u, v = unit_rows_as_given(old.to(precise)), new.to(precise)
        if not self._known_to_fit and len(u) >= _SEEN_ROWS and u.shape == v.shape:
            self._check_order(u, unit_rows_as_given(v), mapped)
        return interpolate(u, unit_rows_as_given(mapped(v)), self.share).to(old.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rotation, offset, share and both fingerprints to a safetensors file; it appears whole or not at all."""
        fitted = self._fitted()
        numbers = torch.tensor([fitted.share, fitted._agreement], dtype=torch.float64)
        names = {"old_fingerprint": fitted.old_fingerprint, "new_fingerprint": fitted.new_fingerprint}
        metadata = {name: value for name, value in names.items() if value is not None}
        tensors = {"rotation": fitted.rotation, "offset": fitted.offset, "share_and_agreement": numbers}
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
                _Program(fitted._mapped(), fitted.share).eval(),
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
        blend.offset = tensors.get("offset", blend.rotation.new_zeros(blend.rotation.shape[1]))  # of earlier versions
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

    def _mapped(self) -> QueryMap:
        return QueryMap(self.rotation, self.offset)

    def _check_order(self, u: torch.Tensor, v: torch.Tensor, mapped: QueryMap) -> None:
        """Raise a ValueError where the other order of the two fits what was fitted, and this one does not."""
        given, exchanged = _agreement(mapped, u, v), _agreement(mapped, v, u)
        nearer = abs(exchanged - self._agreement) < abs(given - self._agreement)
        if nearer and exchanged - given > 0.25 * abs(self._agreement):
            raise ValueError(
                "old_query must be the old model's and new_query the new model's, got them exchanged: after the "
                f"rotation their mean cosine is {given:.2f}, the other way round {exchanged:.2f}, and where the blend "
                f"was fitted it was {self._agreement:.2f}"
            )
        self._known_to_fit = True


def _agreement(mapped: QueryMap, u: torch.Tensor, v: torch.Tensor) -> float:
    """Return the mean cosine of old rows and mapped new ones."""
    return float((u * normalize(mapped(v), dim=1)).sum(1).mean())


class _Program(torch.nn.Module):
    rotation: torch.Tensor
    offset: torch.Tensor

    def __init__(self, mapped: QueryMap, share: float) -> None:
        super().__init__()
        self.register_buffer("rotation", mapped.matrix.float())
        self.register_buffer("offset", mapped.offset.float())
        self.share = share

    def forward(self, old_query: torch.Tensor, new_query: torch.Tensor) -> torch.Tensor:
        mapped = QueryMap(self.rotation, self.offset)
        u, v = normalize(old_query, dim=1), normalize(mapped(normalize(new_query, dim=1)), dim=1)
        return interpolate(u, v, self.share)
