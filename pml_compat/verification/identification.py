"""Whose embedding is this, if anyone's in the gallery? Open-set identification (1:N) across models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch

from .pair_scores import PairScores, to_keys
from .thresholds import check_rates, largest, number_allowed


@overload
def tpir_at_fpir(
    query: Any, query_labels: Any, reference: Any, reference_labels: Any, fpir: float, **kwargs: Any
) -> float: ...
@overload
def tpir_at_fpir(
    query: Any, query_labels: Any, reference: Any, reference_labels: Any, fpir: Sequence[float], **kwargs: Any
) -> dict[float, float]: ...
def tpir_at_fpir(
    query: Any,
    query_labels: Any,
    reference: Any,
    reference_labels: Any,
    fpir: float | Sequence[float],
    **kwargs: Any,
) -> float | dict[float, float]:
    r"""Return the share of known probes identified, where at most a share ``fpir`` of the unknown ones is.

    With :math:`m_p` the highest cosine similarity of probe p to the gallery, U the probes whose label no gallery item
    has, and K the others:

    .. math:: t = \min \left\{ t : \frac{|\{p \in U : m_p \ge t\}|}{|U|} \le FPIR \right\}, \quad
        TPIR = \frac{|\{p \in K : m_p \ge t, \text{ p's label alone has } m_p\}|}{|K|}

    A probe that is as similar to an item of another label is not identified. Scores are those of :func:`verification`.

    Args:
        query: ``(Q, D_query)`` probe embeddings.
        query_labels: ``(Q,)`` integers.
        reference: ``(N, D_reference)`` gallery embeddings of any model.
        reference_labels: ``(N,)``.
        fpir: the false positive identification rate allowed, above 0 and at most 1; or several.
        **kwargs: as for :func:`verification`: ``ref_includes_query``, ``query_ids``, ``reference_ids``, ``device``.
    Returns:
        The TPIR; ``{fpir: TPIR}`` where several are asked for.
    Raises:
        ValueError: all probes known, or none; a rate out of range; and of embeddings, labels and ids what
            :func:`verification` raises.
    Example:
        >>> gallery, labels = torch.eye(2), torch.tensor([0, 1])
        >>> probes = torch.tensor([[1.0, 0.1], [0.5, 1.0], [1.0, 0.9], [0.6, 1.0]])
        >>> tpir_at_fpir(probes, torch.tensor([0, 1, 1, 2]), gallery, labels, fpir=0.1)
        0.6666666666666666

    Reference:
        The 1:N protocol of IJB-C. Public evaluation code takes a quantile of the unknown probes for the threshold,
        which may let one more of them pass.
    """
    rates = check_rates(fpir, "fpir")
    pairs = PairScores(query, query_labels, reference, reference_labels, **kwargs)
    right, wrong = torch.full((2, len(pairs.first)), -torch.inf, dtype=torch.float64, device=pairs.device)
    for rows, columns, scores in pairs.blocks(torch.float64):
        keys = to_keys(scores)
        for run in pairs.label_runs(rows, columns):
            best = right[rows][run[0]]
            torch.maximum(best, keys[run].amax(1), out=best)
            keys[run] = -torch.inf
        torch.maximum(wrong[rows], keys.amax(1), out=wrong[rows])
    known = torch.isfinite(right)
    unknown_best = wrong[~known].cpu().numpy()
    if not len(unknown_best) or not bool(known.any()):
        rule = "some probes that the gallery knows and some that it does not"
        raise ValueError(f"query_labels must have {rule}, got {int(known.sum())} and {len(unknown_best)}")
    identified = right[known & (right > wrong)].cpu().numpy()
    out = {}
    for rate in rates:
        allowed = number_allowed(rate, len(unknown_best))
        refused = largest(unknown_best, allowed + 1) if allowed < len(unknown_best) else -np.inf
        out[rate] = int((identified > refused).sum()) / int(known.sum())
    return out if isinstance(fpir, Sequence | np.ndarray) else out[float(fpir)]
