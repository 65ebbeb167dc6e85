"""Old and new vectors side by side in one index, ranked by what their scores mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import (
    check_embeddings,
    check_integer,
    check_labels,
    check_matrix,
    check_number,
    check_same_device,
)
from .._files import whole_file
from .._rows import unit_rows_as_given

_FORMAT = "pml_compat.MixedGallery/1"
_BINS = 4096  # of the cosines, from -1 to 1
_BLOCK = 512  # rows of scores at once


class MixedGallery:
    r"""Rows for one index of old and new vectors, in which a query's scores of both kinds can be compared.

    A new query meets old vectors in the old space and new vectors in its own, and the two cosines mean different
    things: ranked together as they are, the kind with the larger cosines stands in front whatever it shows. Here each
    kind's cosine is turned into the log-odds that two items are of one class,

    .. math:: s_{old} = a_o \cos(p, f_o) + b_o, \qquad s_{new} = a_n \cos(f, f') + b_n

    with :math:`p` what is compared with old vectors and :math:`f` what is compared with new ones. Both are one inner
    product of the query's :math:`[p ; f ; 1 ; 0]` with a row of the gallery, and all rows are scaled and padded to
    length 1: any index serves them, by inner product, cosine or Euclidean distance. Within a kind the ranking is that
    of its cosine.

    :math:`p` may come from any model that finds the old vectors: a head's ``old_part``; or of two finished models the
    old model's own query, or better the blended one (:class:`QueryBlend`), as old vectors are then found as well before
    a row is new as the blend finds them. One embedding may serve both kinds (BCT, LCE, or a gallery that FCT
    transformed): then there is no second part.

    Args:
        old_features: width of the old vectors and of :math:`p`.
        new_features: width of :math:`f`; None where :math:`p` is :math:`f`.
        old_calibration: :math:`a_o` (above 0) and :math:`b_o`; from :meth:`fit`.
        new_calibration: :math:`a_n` (above 0) and :math:`b_n`.
    Attributes:
        width: of the rows, ``old_features + new_features + 2``.
    Raises:
        ValueError: a width below 1, a slope that is not above 0.
    Example:
        >>> mixed = MixedGallery(2, None, (10.0, -5.0), (20.0, -15.0))
        >>> query = mixed.query_rows(torch.tensor([[1.0, 0.0]]))
        >>> stored = torch.tensor([[0.8, 0.6]])
        >>> scores = query @ torch.cat([mixed.old_rows(stored), mixed.new_rows(stored)]).t()
        >>> scores.argmax().item()  # of log-odds 3 and 1
        0

    Reference:
        Ours. That mixed galleries rank worse than either end: Jaeckle et al., "FastFill: Efficient Compatible Model
        Update", ICLR 2023. Log-odds from scores: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
    """

    def __init__(
        self,
        old_features: int,
        new_features: int | None,
        old_calibration: Sequence[float],
        new_calibration: Sequence[float],
    ) -> None:
        self.old_features = check_integer(old_features, "old_features", minimum=1)
        self.new_features = None if new_features is None else check_integer(new_features, "new_features", minimum=1)
        self.old_calibration = _slope_and_offset(old_calibration, "old_calibration")
        self.new_calibration = _slope_and_offset(new_calibration, "new_calibration")

    @classmethod
    def fit(
        cls,
        old_part: Any,
        old_embeddings: Any,
        labels: Any = None,
        embeddings: Any = None,
        *,
        max_rows: int = 4096,
        seed: int = 0,
    ) -> MixedGallery:
        """Fit both calibrations on items that both models embedded.

        Items that no model was trained on show what the scores mean later; training images make both kinds of vectors
        look better than they are. A few hundred items of some tens of classes are enough, and their classes need not
        be the gallery's. Two numbers a kind are fitted, by Newton's method on histograms of all pairs of different
        items. Without labels each kind's cosines become z-scores, of their mean and deviation over these pairs.

        Args:
            old_part: ``(N, D_old)``, what is compared with old vectors: of the new model, or the blended query.
            old_embeddings: ``(N, D_old)``, what is stored of the same items; transformed, where the gallery is.
            labels: ``(N,)``; None for z-scores.
            embeddings: ``(N, D_new)``, of the new model, what is compared with new vectors; None where that is
                ``old_part``.
            max_rows: of more items, that many are drawn at random; the pairs are their square.
            seed: of that draw.
        Raises:
            ValueError: widths or lengths that differ, NaN or infinity; no two items of one class, or none of different
                classes; scores that are not higher within a class than between classes.
        """
        part = check_embeddings(old_part, "old_part").detach()
        old = check_embeddings(old_embeddings, "old_embeddings", part.shape[1]).detach()
        new = part if embeddings is None else check_embeddings(embeddings).detach()
        for rows, name in ((old, "old_embeddings"), (new, "embeddings")):
            check_same_device(rows, name, part, "old_part")
            if len(rows) != len(part):
                raise ValueError(f"{name} must have the items of old_part: expected {len(part)} rows, got {len(rows)}")
        known = None if labels is None else check_labels(labels, length=len(part)).to(part.device)
        some = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        some = some[: check_integer(max_rows, "max_rows", minimum=2)].to(part.device)
        part, old, new = (normalize(rows[some].float(), dim=1) for rows in (part, old, new))
        groups = torch.arange(len(part), device=part.device) if known is None else known[some]
        calibrate = _z_scores if known is None else _log_odds
        old_calibration = calibrate(_histograms(part, old, groups), "old_part")
        new_calibration = calibrate(_histograms(new, new, groups), "embeddings")
        return cls(part.shape[1], None if embeddings is None else new.shape[1], old_calibration, new_calibration)

    @property
    def width(self) -> int:
        """The width of the rows."""
        return self.old_features + (self.new_features or 0) + 2

    def query_rows(self, old_part: Any, embeddings: Any = None) -> torch.Tensor:
        """Return unit rows ``(N, width)`` to search with.

        Args:
            old_part: ``(N, old_features)``, of the new model.
            embeddings: ``(N, new_features)``, of the new model; None where there is no second part.
        Raises:
            ValueError: another width or number of rows, ``embeddings`` missing or not asked for.
        """
        parts = [check_matrix(old_part, "old_part", self.old_features)]
        if (embeddings is None) != (self.new_features is None):
            wanted = "None" if self.new_features is None else f"given, (N, {self.new_features})"
            raise ValueError(f"embeddings must be {wanted}, got {'None' if embeddings is None else 'a matrix'}")
        if embeddings is not None:
            parts.append(check_matrix(embeddings, width=self.new_features))
            if len(parts[1]) != len(parts[0]):
                raise ValueError(f"embeddings must have the rows of old_part, {len(parts[0])}, got {len(parts[1])}")
        parts = [unit_rows_as_given(part) for part in parts]
        return normalize(torch.cat([*parts, _columns(parts[0], 1.0, 0.0)], dim=1), dim=1)

    def old_rows(self, old_embeddings: Any) -> torch.Tensor:
        """Return unit rows ``(N, width)`` for the index, of stored old vectors ``(N, old_features)``."""
        old = unit_rows_as_given(check_matrix(old_embeddings, "old_embeddings", self.old_features))
        slope, offset, rest = self._scaled()[0]
        nothing = old.new_zeros(len(old), self.new_features or 0)
        return torch.cat([slope * old, nothing, _columns(old, offset, rest)], dim=1)

    def new_rows(self, embeddings: Any, old_embeddings: Any = None) -> torch.Tensor:
        r"""Return unit rows ``(N, width)`` for the index, of the new model's ``(N, new_features)``.

        With the old vectors of the same items a row keeps both, in the same width, and its score is
        :math:`(s_{old} + s_{new}) / 2`. Where two models agree they are right more often than either; and new rows do
        not stand in front for being new, while they are few and the new model was surer on the items of :meth:`fit`.

        Args:
            embeddings: ``(N, new_features)``; without a second part what would be the query's ``old_part``.
            old_embeddings: ``(N, old_features)``, what was stored of the same items.
        Raises:
            ValueError: another width or number of rows; ``old_embeddings`` without a second part.
        """
        new = unit_rows_as_given(check_matrix(embeddings, width=self.new_features or self.old_features))
        (old_slope, old_offset, _), (slope, offset, rest) = self._scaled()
        if old_embeddings is None:
            nothing = new.new_zeros(len(new), 0 if self.new_features is None else self.old_features)
            return torch.cat([nothing, slope * new, _columns(new, offset, rest)], dim=1)
        if self.new_features is None:
            raise ValueError("old_embeddings must be None where one part serves both kinds, got rows")
        old = unit_rows_as_given(check_matrix(old_embeddings, "old_embeddings", self.old_features)).to(new)
        if len(old) != len(new):
            raise ValueError(f"old_embeddings must have the items of embeddings, {len(new)} rows, got {len(old)}")
        half = (old_slope / 2, slope / 2, (old_offset + offset) / 2)
        rest = math.sqrt(max(0.0, 1 - sum(number**2 for number in half)))
        return torch.cat([half[0] * old, half[1] * new, _columns(new, half[2], rest)], dim=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the widths and calibrations as JSON; the file appears whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"format": _FORMAT, **vars(self)}, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MixedGallery:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a truncated file, or one that holds something else.
        """
        if Path(path).is_dir():
            raise ValueError(f"path must be a whole JSON file, {os.fspath(path)!r} is a folder")
        text = Path(path).read_bytes()
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"path must be a whole JSON file, {os.fspath(path)!r} is not: {error}") from error
        names = {"old_features", "new_features", "old_calibration", "new_calibration"}
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT or set(found) != names:
            raise ValueError(f"path must be a file written by MixedGallery.save, {os.fspath(path)!r} is not")
        return cls(**found)

    def _scaled(self) -> list[tuple[float, float, float]]:
        """Return slope, offset and padding of old and new rows, divided by the length that all rows share.

        Only the difference of the offsets matters: half of it on each side keeps the rows near their cosine.
        """
        (old_slope, old_offset), (new_slope, new_offset) = self.old_calibration, self.new_calibration
        half = (old_offset - new_offset) / 2
        longest = math.hypot(max(old_slope, new_slope), half)
        return [
            (slope / longest, offset / longest, math.sqrt(max(0.0, 1 - (slope**2 + half**2) / longest**2)))
            for slope, offset in ((old_slope, half), (new_slope, -half))
        ]


def _columns(rows: torch.Tensor, *values: float) -> torch.Tensor:
    return rows.new_tensor(values).expand(len(rows), -1)


def _histograms(query: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the cosines of pairs of different items: ``(2, bins)``, between classes and within one."""
    counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=query.device)
    for start in range(0, len(query), _BLOCK):
        rows = slice(start, start + _BLOCK)
        bins = ((query[rows] @ gallery.t() + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
        bins += (labels[rows, None] == labels) * _BINS
        counts += torch.bincount(bins.view(-1), minlength=2 * _BINS)
        counts -= torch.bincount(bins.diagonal(start), minlength=2 * _BINS)  # an item and itself
    return counts.view(2, _BINS).double().cpu()


def _z_scores(counts: torch.Tensor, name: str) -> tuple[float, float]:
    """Return slope and offset that give the cosines of all pairs the mean 0 and the deviation 1."""
    total = counts.sum(0)
    centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 / _BINS) - 1
    mean = float((total * centers).sum() / total.sum())
    deviation = float((total * (centers - mean).square()).sum() / total.sum()) ** 0.5
    if not deviation > 0:
        raise ValueError(f"{name} must have cosines that differ, all are {mean:.4f}")
    return 1 / deviation, -mean / deviation


def _log_odds(counts: torch.Tensor, name: str) -> tuple[float, float]:
    """Fit slope and offset of the log-odds of the same class, given a cosine, to histograms of both kinds of pairs.

    Platt's targets, a little inside 0 and 1, keep the slope finite where the scores separate the classes.
    """
    different, same = counts
    total_different, total_same = float(different.sum()), float(same.sum())
    if total_same == 0 or total_different == 0:
        missing = "two items of one class" if total_same == 0 else "items of different classes"
        raise ValueError(f"labels must have {missing}, got none")
    target_same, target_different = (total_same + 1) / (total_same + 2), 1 / (total_different + 2)
    centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 / _BINS) - 1
    inputs = torch.stack([centers, torch.ones_like(centers)], dim=1)
    wanted = same * target_same + different * target_different
    both = same + different
    weights = torch.tensor([0.0, float(torch.tensor(total_same / total_different).log())], dtype=torch.float64)
    for _ in range(100):
        odds = torch.sigmoid(inputs @ weights)
        gradient = inputs.t() @ (wanted - both * odds)
        curvature = (inputs * (both * odds * (1 - odds))[:, None]).t() @ inputs
        step = torch.linalg.lstsq(curvature, gradient[:, None]).solution[:, 0]
        longest = float(step.abs().max())
        step *= min(1.0, 10 / max(longest, 1e-300))  # far from the optimum Newton's step is too long
        weights += step
        if longest < 1e-9:
            break
    slope, offset = weights.tolist()
    if not slope > 0:
        raise ValueError(
            f"{name} must score higher within a class than between classes, got a slope of {slope:.3g}; "
            "are these models compatible, and the rows of the same items?"
        )
    return slope, offset


def _slope_and_offset(value: Sequence[float], name: str) -> tuple[float, float]:
    try:
        slope, offset = (float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers, slope and offset, got {value!r}") from None
    if not math.isfinite(offset):
        raise ValueError(f"the offset of {name} must be finite, got {offset}")
    return check_number(slope, f"the slope of {name}", minimum=0, exclusive=True), offset
