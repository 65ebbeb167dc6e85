"""Are two embeddings of the same identity? Verification (1:1), and what a threshold carried over does.

The threshold of a FAR is the lowest that accepts at most that share of the impostors: it lies just above the highest
impostor score that must be refused, so impostors that tie are all accepted or all refused, and the FAR reached never
exceeds the one asked for. Where a single impostor is already too much of a share, it lies above all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from .._checks import as_tensor, check_finite
from .pair_scores import GRID, PairScores
from .thresholds import check_rates, count_true, find_thresholds, largest, number_allowed


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does: a pair is accepted where its cosine similarity is at least ``threshold``."""

    threshold: float
    far: float  # the share of the impostor pairs that is accepted
    tar: float  # the share of the genuine pairs that is accepted


@dataclass(frozen=True)
class VerificationResult:
    """What :func:`verification` found."""

    at_far: dict[float, OperatingPoint]  # by the FAR asked for
    at_threshold: dict[Any, OperatingPoint]  # by the key of the threshold given
    genuine_pairs: int
    impostor_pairs: int

    @property
    def thresholds(self) -> dict[float, float]:
        """The threshold of each FAR asked for, at which another result may be measured."""
        return {far: point.threshold for far, point in self.at_far.items()}


@overload
def tar_at_far(scores: Any, same: Any, far: float) -> float: ...
@overload
def tar_at_far(scores: Any, same: Any, far: Sequence[float]) -> dict[float, float]: ...
def tar_at_far(scores: Any, same: Any, far: float | Sequence[float]) -> float | dict[float, float]:
    r"""Return the share of genuine pairs accepted where at most a share ``far`` of the impostor pairs is.

    .. math:: TAR = \frac{|\{p \in G : s_p \ge t\}|}{|G|}, \quad
        t = \min \left\{ t : \frac{|\{p \in I : s_p \ge t\}|}{|I|} \le FAR \right\}

    Args:
        scores: ``(P,)`` similarities of pairs, higher is more alike; a tensor or an array.
        same: ``(P,)`` bool, True for a genuine pair (:math:`G`), False for an impostor pair (:math:`I`).
        far: the false accept rate allowed, above 0 and at most 1; or several.
    Returns:
        The TAR; ``{far: TAR}`` where several are asked for. Where ``far`` is less than one impostor, it is the share
        of genuine pairs above all impostors.
    Raises:
        ValueError: ``scores`` or ``same`` not 1-dimensional, of different lengths or not of the type above; NaN or
            infinite scores; no genuine or no impostor pair; a ``far`` out of range.
    Example:
        >>> scores, same = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, True, False])
        >>> tar_at_far(scores, same, 0.5)
        1.0
        >>> tar_at_far(scores, same, [0.1, 0.5])
        {0.1: 0.3333333333333333, 0.5: 1.0}

    Reference:
        The 1:1 protocol of IJB-C. Public evaluation code (of MixBCT, for one) takes the ROC point whose FAR is nearest
        to the one asked for, which may exceed it: by less than one impostor pair where no scores tie, else by more.
    """
    values, genuine = as_tensor(scores, "scores").detach(), as_tensor(same, "same")
    if values.ndim != 1:
        raise ValueError(f"scores must be 1-dimensional, (P,), got shape {tuple(values.shape)}; flatten them")
    if genuine.dtype != torch.bool:
        raise ValueError(f"same must be bool, got {genuine.dtype}; convert it with .bool()")
    if genuine.shape != values.shape:
        raise ValueError(
            f"same must have one entry a score: expected {tuple(values.shape)}, got {tuple(genuine.shape)}"
        )
    if values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"scores must be real numbers, got {values.dtype}")
    check_finite(values, "scores")
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    value, mask = values.cpu().numpy(), genuine.cpu().numpy()
    accepted, refused = value[mask], value[~mask]
    _check_counts("same", len(accepted), len(refused))
    out = {}
    for rate in check_rates(far, "far"):
        allowed = number_allowed(rate, len(refused))
        hits = accepted if allowed == len(refused) else accepted[accepted > largest(refused, allowed + 1)]
        out[rate] = len(hits) / len(accepted)
    return out if isinstance(far, Sequence | np.ndarray) else out[float(far)]


def verification(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    fars: float | Sequence[float] = (1e-3,),
    thresholds: Mapping[Any, float] | float | Sequence[float] = (),
    ref_includes_query: bool = False,
    query_ids: Any = None,
    reference_ids: Any = None,
    device: str | torch.device | None = None,
    fit_width: bool = False,
) -> VerificationResult:
    r"""Measure TAR@FAR over all pairs of a query and a gallery item, whatever models embedded them.

    A pair is genuine where the labels are equal. Scores are cosine similarities; a row of zeros is 0 to all. Rates are
    exact: those of float64 similarities of the rows as given, where similarities equal to 1.5e-11 tie.

    Args:
        query: ``(Q, D_query)`` embeddings, a tensor or an array.
        query_labels: ``(Q,)`` numbers, bools or strings; an unknown one (NaN, None) is another than all.
        reference: ``(N, D_reference)`` gallery embeddings of any model; by default the queries, each left out of its
            own pairs.
        reference_labels: ``(N,)``.
        fars: the false accept rates to measure at, each above 0 and at most 1. One pass over the pairs in float32
            serves them all. Two in float64 follow where millions of pairs are near a threshold, as with many ties.
        thresholds: similarities to measure at besides, named or not; ``thresholds`` of another result, most of all.
        ref_includes_query: row i of ``query`` and row i of ``reference`` are the same item, which is no pair.
        query_ids: ``(Q,)`` item ids, which say the same for galleries in any order.
        reference_ids: ``(N,)``, with ``query_ids``.
        device: where to compute; by default where ``reference`` is.
        fit_width: compare queries of another width by :func:`pml_compat.fit_width`: for a new model that was
            trained so.
    Shape:
        - memory: never ``(Q, N)``, but tens of MiB beyond the inputs
    Raises:
        ValueError: NaN, infinite or empty embeddings; lengths that differ; widths that do, without
            ``fit_width``; no genuine or no impostor pair; a rate or
            threshold out of range; one of a pair of arguments alone; ids beside ``ref_includes_query``; with
            ``ref_includes_query`` a gallery that is shorter than the queries or has other labels in their rows.
    Example:
        >>> angles, labels = torch.tensor([0.0, 0.2, 0.5, 1.5]), torch.tensor([0, 0, 1, 1])
        >>> embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> result = verification(embeddings, labels, fars=0.01)
        >>> result.at_far[0.01].tar, result.genuine_pairs, result.impostor_pairs
        (0.5, 4, 8)
    """
    rates = check_rates(fars, "fars")
    keys = _threshold_keys(thresholds)
    pairs = PairScores(
        query,
        query_labels,
        reference,
        reference_labels,
        ref_includes_query=ref_includes_query,
        query_ids=query_ids,
        reference_ids=reference_ids,
        device=device,
        fit_width=fit_width,
    )
    _check_counts("query_labels and reference_labels", pairs.genuine, pairs.impostors)
    allowed = [number_allowed(rate, pairs.impostors) for rate in rates]
    found, accepted = find_thresholds(pairs, allowed, list(keys.values()))
    points = [*found, *zip(keys.values(), accepted, strict=True)]
    genuine = [0] * len(points)
    for block in pairs.genuine_blocks():
        for place, (key, _) in enumerate(points):
            genuine[place] += count_true(block >= (key - 0.5) / GRID)  # what rounds to the key or above
    measured = [
        OperatingPoint(threshold=key / GRID, far=false / pairs.impostors, tar=true / pairs.genuine)
        for (key, false), true in zip(points, genuine, strict=True)
    ]
    return VerificationResult(
        at_far=dict(zip(rates, measured, strict=False)),
        at_threshold=dict(zip(keys, measured[len(rates) :], strict=True)),
        genuine_pairs=pairs.genuine,
        impostor_pairs=pairs.impostors,
    )


def carry_thresholds(
    old_query: Any,
    new_query: Any,
    query_labels: Any,
    old_reference: Any = None,
    new_reference: Any = None,
    reference_labels: Any = None,
    *,
    fars: float | Sequence[float] = (1e-3,),
    **kwargs: Any,
) -> dict[str, VerificationResult]:
    """Measure what becomes of the old system's thresholds when its query model, then its gallery, is replaced.

    A service accepts a pair above a threshold that was set on old queries and the old gallery. The day new queries
    meet that gallery, the threshold still stands, but similarities are distributed differently: the false accepts may
    be many times what was promised, with no error anywhere. ``at_threshold[far]`` tells what the old threshold of that
    FAR does now, ``at_far[far]`` what a threshold set anew would do.

    Args:
        old_query: ``(Q, D_old)`` old embeddings of the queries.
        new_query: ``(Q, D_new)`` new embeddings of the same queries.
        query_labels: ``(Q,)``.
        old_reference: ``(N, D_old)`` old gallery; by default the queries are the gallery, each left out of its own
            pairs.
        new_reference: ``(N, D_new)`` the gallery embedded anew, where there is one.
        reference_labels: ``(N,)``, with ``old_reference``.
        fars: the false accept rates that the old system was calibrated for.
        **kwargs: for :func:`verification`: ``query_ids``, ``reference_ids``, ``ref_includes_query``, ``device``,
            ``fit_width``.
    Returns:
        Results by ``"old_to_old"``, ``"new_to_old"`` and, but for a gallery that was not embedded anew,
        ``"new_to_new"``.
    Raises:
        ValueError: ``new_reference`` or ``reference_labels`` without ``old_reference``; queries or galleries that
            differ in number between the models; what :func:`verification` raises.
    Example:
        >>> angles, labels = torch.tensor([0.0, 0.2, 0.5, 0.7]), torch.tensor([0, 0, 1, 1])
        >>> old = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> new = torch.stack([(angles / 2).cos(), (angles / 2).sin()], dim=1)
        >>> results = carry_thresholds(old, new, labels, fars=0.01)
        >>> results["old_to_old"].at_far[0.01].far, results["new_to_new"].at_threshold[0.01].far
        (0.0, 0.75)
    """
    if old_reference is None and (new_reference is not None or reference_labels is not None):
        raise ValueError("old_reference must be given with new_reference or reference_labels, got None")
    for name, old, new in (("query", old_query, new_query), ("reference", old_reference, new_reference)):
        if old is not None and new is not None and len(old) != len(new):
            raise ValueError(f"new_{name} must have the rows of old_{name}: expected {len(old)}, got {len(new)}")
    if old_reference is None:
        ids = kwargs.get("query_ids")
        kwargs = {"ref_includes_query": ids is None, "reference_ids": ids} | kwargs
        old_reference, new_reference, reference_labels = old_query, new_query, query_labels
    old_to_old = verification(old_query, query_labels, old_reference, reference_labels, fars=fars, **kwargs)
    results = {"old_to_old": old_to_old}
    for name, gallery in (("new_to_old", old_reference), ("new_to_new", new_reference)):
        if gallery is not None:
            results[name] = verification(
                new_query,
                query_labels,
                gallery,
                reference_labels,
                fars=fars,
                thresholds=old_to_old.thresholds,
                **kwargs,
            )
    return results


def _check_counts(name: str, genuine: int, impostors: int) -> None:
    if not genuine or not impostors:
        missing = "impostor" if genuine else "genuine"
        raise ValueError(f"{name} must make at least one genuine and one impostor pair, got no {missing} pair")


def _threshold_keys(thresholds: Mapping[Any, float] | float | Sequence[float]) -> dict[Any, int]:
    if not isinstance(thresholds, Mapping):
        values = thresholds if isinstance(thresholds, Sequence | np.ndarray) else [thresholds]
        thresholds = {value: value for value in values}
    for value in thresholds.values():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not abs(value) <= 1 + 1 / GRID:  # just above an impostor's 1.0
            raise ValueError(f"thresholds must be cosine similarities, from -1 to 1, got {value!r}")
    return {name: round(float(value) * GRID) for name, value in thresholds.items()}
