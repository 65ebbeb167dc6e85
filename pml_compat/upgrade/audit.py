"""What stored embeddings are like, before a training is spent on them: noise, classes, and what they call for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from .._checks import as_tensor, check_integer
from ..accuracy.items import as_values
from ..frozen import ClassCenters
from ..frozen.centers_summary import CentersSummary
from ..serving import alignability

_NEIGHBORS = 10
_OTHERS = 8  # of the neighbours, all of one other class, that speak against a label
_OWN = 0.7  # share of a class's items that find their own, for its neighbours to be a witness
_FENCE = 3.0  # interquartile ranges below the lower quartile of the nearest neighbour's cosine
_COPY = 1e-6  # of a cosine of 1
_BLOCK = 2**22  # scores at once
REASONS = {
    "not finite": "NaN or infinity",
    "zero": "of length 0",
    "copy": "equal to an earlier one of the same label",
    "contradiction": "equal to one of another label",
    "wrong label": f"{_OTHERS} or more of {_NEIGHBORS} neighbours are of one other class, none of the own",
    "outlier": "nothing is near",
}


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found.

    Args:
        rows: how many embeddings there are.
        audited: how many of them were looked at.
        flagged: by a key of ``REASONS``, the rows that speak for it; a row may stand under several.
        precision_at_1: share of the sound items whose nearest other one has their label; None without labels.
        worst: the classes whose items find their own least: label, P@1, items.
        centers: the classes' summary, with a forecast; None without labels.
        new_precision_at_1: the same of the new model.
        alignability: how far the two models disagree; see :func:`pml_compat.serving.alignability`.
        advice: what the data calls for, one sentence each.
    """

    rows: int
    audited: int
    flagged: dict[str, torch.Tensor]
    precision_at_1: float | None = None
    worst: list[tuple[Any, float, int]] = field(default_factory=list)
    centers: CentersSummary | None = None
    new_precision_at_1: float | None = None
    alignability: float | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def keep(self) -> torch.Tensor:
        """``(N,)`` bool: the rows that are not flagged; an outlier may be a rare item, and stays."""
        kept = torch.ones(self.rows, dtype=torch.bool)
        for reason, rows in self.flagged.items():
            if reason != "outlier":
                kept[rows] = False
        return kept

    def table(self) -> str:
        """Return what was found, as Markdown."""
        lines = [
            f"{self.rows:,} embeddings, {self.audited:,} of them looked at",
            "",
            "| | rows | |",
            "| --- | ---: | --- |",
        ]
        lines += [f"| {reason} | {len(self.flagged[reason]):,} | {REASONS[reason]} |" for reason in REASONS]
        if self.precision_at_1 is not None:
            lines += ["", f"P@1 of each among the others: {self.precision_at_1:.1%}"]
            if self.new_precision_at_1 is not None:
                lines[-1] += f"; of the new model: {self.new_precision_at_1:.1%}"
        if self.worst:
            lines += ["", "| class | P@1 | items |", "| --- | ---: | ---: |"]
            lines += [f"| {label} | {value:.1%} | {count:,} |" for label, value, count in self.worst]
        if self.alignability is not None:
            lines += ["", f"alignability {self.alignability:.3f}: 0 where the spaces are rotations of each other"]
        if self.centers is not None:
            lines += ["", "```text", str(self.centers), "```"]
        return "\n".join([*lines, "", *(f"- {sentence}" for sentence in self.advice)])

    def to_json(self, path: Any = None) -> dict[str, Any]:
        """Return the findings, of types that strict JSON has; with a path, write them there too."""
        out = {
            "rows": self.rows,
            "audited": self.audited,
            "flagged": {reason: rows.tolist() for reason, rows in self.flagged.items()},
            "precision_at_1": self.precision_at_1,
            "new_precision_at_1": self.new_precision_at_1,
            "worst": [{"label": label, "precision_at_1": value, "items": count} for label, value, count in self.worst],
            "alignability": self.alignability,
            "advice": self.advice,
        }
        if path is not None:
            Path(path).write_text(json.dumps(out, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
        return out


def audit(old: Any, labels: Any = None, new: Any = None, *, max_rows: int = 50_000, seed: int = 0) -> Audit:
    """Look through stored old embeddings of the new training set, before a training is spent on them.

    Neighbours are by cosine, exact, in bounded memory; the work grows with the square of the rows that are looked at.

    Args:
        old: ``(N, D)``, as stored: a tensor, an array or a memory map.
        labels: ``(N,)`` of the new training set, numbers or strings; None where there are none.
        new: ``(N, D_new)``, the same items by a finished new model.
        max_rows: of more rows, that many are drawn at random.
        seed: of the draw.
    Returns:
        The :class:`~pml_compat.upgrade.audit.Audit`: ``.table()``, ``.flagged``, ``.keep``, ``.advice``, ``.to_json``.
    Raises:
        ValueError: not 2-dimensional, no numbers, fewer than two sound rows; labels or new embeddings of other rows.
    Example:
        >>> labels = torch.arange(60) % 3
        >>> old = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
        >>> old[7], old[8] = 0, torch.nan
        >>> found = audit(old, labels)
        >>> found.flagged["zero"].tolist(), found.flagged["not finite"].tolist(), int(found.keep.sum())
        ([7], [8], 58)

    Reference:
        Ours. The wrong labels are an edited nearest-neighbour rule: Wilson, "Asymptotic Properties of Nearest Neighbor
        Rules Using Edited Data", IEEE SMC 1972, asked only in classes that find themselves.
    """
    given = {"old": old} | ({} if new is None else {"new": new})
    for name, rows in given.items():
        if getattr(rows, "ndim", 0) != 2 or 0 in rows.shape:
            raise ValueError(f"{name} must be (N, D) embeddings, got {getattr(rows, 'shape', type(rows).__name__)}")
        if len(rows) != len(old):
            raise ValueError(f"{name} must have a row an item: expected {len(old)}, got {len(rows)}")
    values = None if labels is None else as_values(labels, "labels")
    if values is not None and len(values) != len(old):
        raise ValueError(f"labels must have one entry a row: expected {len(old)}, got {len(values)}")
    check_integer(max_rows, "max_rows", minimum=2)
    index = torch.arange(len(old))
    if len(old) > max_rows:
        index = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values
    rows, newer = (None if one is None else _taken(one, index, name) for name, one in (("old", old), ("new", new)))
    assert rows is not None
    finite = rows.isfinite().all(1)
    zero = finite & ~(rows.abs().amax(1) > 0)
    sound = finite & ~zero if newer is None else finite & ~zero & newer.isfinite().all(1)
    if int(sound.sum()) < 2:
        raise ValueError(f"old must have two rows of numbers that are not all 0, got {int(sound.sum())}")
    places = index[sound]
    unit = normalize(rows[sound].double(), dim=1).float()
    names, codes = (None, None) if values is None else np.unique(values[index.numpy()], return_inverse=True)
    own = None if codes is None else torch.from_numpy(codes.reshape(-1))[sound]
    found = _look(unit, own)
    flagged = {"not finite": index[~finite], "zero": index[zero]} | {
        name: places[mask] for name, mask in found.flags.items()
    }
    alike = None if newer is None else alignability(unit, newer[sound], seed=seed)
    if own is None or names is None:
        audited = Audit(len(old), len(index), flagged, alignability=alike)
    else:
        good = ~(found.flags["wrong label"] | found.flags["contradiction"] | found.flags["copy"])
        shown = torch.from_numpy(names.astype(np.int64))[own] if names.dtype.kind in "iu" else own
        audited = Audit(
            len(old),
            len(index),
            flagged,
            float(found.hits.mean()),
            _worst(names, own, found.hits),
            ClassCenters.from_embeddings(unit[good], shown[good]).summary(),
            None if newer is None else float(_look(normalize(newer[sound], dim=1), own).hits.mean()),
            alike,
        )
    audited.advice.extend(_advice(audited))
    return audited


@dataclass(frozen=True)
class _Looked:
    flags: dict[str, torch.Tensor]
    hits: torch.Tensor


def _taken(rows: Any, index: torch.Tensor, name: str) -> torch.Tensor:
    some = rows[index.to(rows.device)] if isinstance(rows, torch.Tensor) else np.asarray(rows[index.numpy()])
    return as_tensor(some, name).detach().float().cpu()


def _neighbors(unit: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield blocks of rows, the cosines of their nearest others and these."""
    size, count = max(1, _BLOCK // len(unit)), min(_NEIGHBORS, len(unit) - 1)
    for start in range(0, len(unit), size):
        block = slice(start, min(start + size, len(unit)))
        cosines = unit[block] @ unit.t()
        cosines.diagonal(start).fill_(-torch.inf)
        yield (block, *cosines.topk(count, dim=1))


def _look(unit: torch.Tensor, own: torch.Tensor | None) -> _Looked:
    """Return what the neighbours say of each row."""
    count = len(unit)
    flags = {name: torch.zeros(count, dtype=torch.bool) for name in ("copy", "contradiction", "wrong label", "outlier")}
    hits, nearest, against = torch.zeros(count), torch.empty(count), torch.zeros(count, dtype=torch.bool)
    for block, cosines, rows in _neighbors(unit):
        nearest[block] = cosines[:, 0]
        here = torch.arange(block.start, block.stop)[:, None]
        copies = cosines >= 1 - _COPY
        if own is None:
            flags["copy"][block] = (copies & (rows < here)).any(1)
            continue
        same = own[rows] == own[block][:, None]
        flags["copy"][block] = (copies & same & (rows < here)).any(1)
        flags["contradiction"][block] = (copies & ~same).any(1)
        hits[block] = same[:, 0].float()
        most = own[rows].mode(1).values[:, None]
        against[block] = ~same.any(1) & ((own[rows] == most).sum(1) >= min(_OTHERS, rows.shape[1]))
    low, high = nearest.quantile(0.25), nearest.quantile(0.75)
    flags["outlier"] = nearest < low - _FENCE * (high - low)
    if own is not None:
        of_class = torch.zeros(int(own.max()) + 1).index_add_(0, own, hits) / own.bincount().clamp(min=1)
        flags["wrong label"] = against & (of_class >= _OWN)[own]
    return _Looked(flags, hits)


def _worst(names: Any, own: torch.Tensor, hits: torch.Tensor) -> list[tuple[Any, float, int]]:
    counts = own.bincount(minlength=len(names))
    values = torch.zeros(len(names)).index_add_(0, own, hits) / counts.clamp(min=1)
    order = torch.where(counts > 0, values, 2.0).argsort(stable=True)[:5]
    return [(names.tolist()[row], float(values[row]), int(counts[row])) for row in order.tolist() if counts[row]]


def _advice(found: Audit) -> list[str]:
    dropped = found.rows - int(found.keep.sum())
    advice = [f"Leave {dropped:,} rows out of centres and of the training: .keep says which."] if dropped else []
    if found.alignability is not None:
        advice.append("Both models are there: QueryBlend and a search in two stages need no training; try them first.")
    if found.centers is None:
        advice.append(
            "Without labels: PointAlignmentLoss, or CrossModelLoss of a pair loss, on each item's own old embedding; "
            "with a finished new model a map (FCTTransformation)."
        )
        return advice
    prospects = found.centers.prospects
    if prospects is not None:
        old, near = prospects.old, prospects.near_directions
        said = (
            f"near its class's direction a query finds {near.precision_at_1:.1%} / {near.mean_average_precision:.1%} "
            f"where the old model's finds {old.precision_at_1:.1%} / {old.mean_average_precision:.1%} (P@1 / mAP)"
        )
        if near.precision_at_1 > old.precision_at_1 and near.mean_average_precision > old.mean_average_precision:
            advice.append(f"BCTLoss or LCELoss, where the gallery is of these classes: {said}.")
        else:
            advice.append(f"CompatibleHead or a map, and not a class's place alone: {said}.")
    advice.append("Where the gallery's classes are in no training set: CompatibleHead, QueryBlend or two stages.")
    return advice
