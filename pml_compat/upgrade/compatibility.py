"""What an upgrade is worth: the criterion, the update gain, and every model against every gallery."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..accuracy import CrossModelAccuracyCalculator


def is_compatible(*, old_to_old: float, new_to_old: float) -> bool:
    r"""Tell whether new queries find the old gallery better than old queries did: :math:`M(n, o) > M(o, o)`.

    Args:
        old_to_old: accuracy of old queries on the old gallery; any metric of which more is better.
        new_to_old: accuracy of new queries on the old gallery, same metric.
    Raises:
        ValueError: a value is NaN or infinite.
    Example:
        >>> is_compatible(old_to_old=0.46, new_to_old=0.47)
        True

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, the empirical criterion
        (strict).
    """
    return _accuracy(new_to_old, "new_to_old") > _accuracy(old_to_old, "old_to_old")


def update_gain(*, old_to_old: float, new_to_old: float, independent: float) -> float:
    r"""Return the share of a full re-embedding's benefit that comes without re-embedding.

    .. math:: \Gamma = \frac{M(n, o) - M(o, o)}{M(\phi^*, \phi^*) - M(o, o)}

    1 is as good as re-embedding everything with a model trained with no compatibility term; 0 is no better than
    not upgrading; below 0 the upgrade hurts.

    Args:
        old_to_old: accuracy of old queries on the old gallery.
        new_to_old: accuracy of new queries on the old gallery.
        independent: accuracy of the independent new model on its own gallery.
    Returns:
        The gain, no unit. NaN, with a RuntimeWarning, where the independent model is not better than the old one.
    Raises:
        ValueError: a value is NaN or infinite.
    Example:
        >>> round(update_gain(old_to_old=0.40, new_to_old=0.45, independent=0.60), 3)
        0.25

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020.
    """
    old = _accuracy(old_to_old, "old_to_old")
    new = _accuracy(new_to_old, "new_to_old")
    room = _accuracy(independent, "independent") - old
    if room <= 0:
        warnings.warn(
            f"update_gain is undefined: independent ({independent:g}) must be above old_to_old ({old_to_old:g})",
            RuntimeWarning,
            stacklevel=2,
        )
        return math.nan
    return (new - old) / room


def compatibility_matrix(
    queries: Mapping[str, Any],
    query_labels: Any,
    galleries: Mapping[str, Any] | None = None,
    gallery_labels: Any = None,
    *,
    calculator: CrossModelAccuracyCalculator | None = None,
    ref_includes_query: bool | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure every model's queries against every model's gallery.

    Args:
        queries: model name to ``(N, D)`` query embeddings; widths may differ between models.
        query_labels: ``(N,)``.
        galleries: model name to ``(M, D)`` gallery embeddings; by default the queries are the galleries too, each
            item left out of its own ranking.
        gallery_labels: ``(M,)``, with ``galleries``.
        calculator: what measures; by default a
            :class:`~pml_compat.accuracy.CrossModelAccuracyCalculator` of ``precision_at_1`` and
            ``mean_average_precision``, which compares models of different widths by
            :func:`pml_compat.fit_width`.
        ref_includes_query: row i of every gallery is the item of row i of the queries. By default True without
            ``galleries``, False with them.
        **kwargs: for ``calculator.get_accuracy``: ``query_ids``, ``reference_ids``, ``query_cameras``, ...
    Returns:
        ``matrix[query model][gallery model][metric]``.
    Raises:
        ValueError: no model; ``galleries`` without ``gallery_labels``; what ``get_accuracy`` raises.
    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> matrix = compatibility_matrix({"old": torch.eye(4)[:, :2], "new": torch.eye(2)[labels]}, labels)
        >>> matrix["new"]["new"]["precision_at_1"]
        1.0
    """
    if not queries:
        raise ValueError("queries must name at least one model, got none")
    if galleries is None:
        galleries, gallery_labels = queries, query_labels
        kwargs.setdefault("reference_ids", kwargs.get("query_ids"))
        kwargs.setdefault("reference_cameras", kwargs.get("query_cameras"))
        ref_includes_query = kwargs.get("query_ids") is None if ref_includes_query is None else ref_includes_query
    elif gallery_labels is None:
        raise ValueError("gallery_labels must be given with galleries, got None")
    metrics = ("precision_at_1", "mean_average_precision")
    calculator = calculator or CrossModelAccuracyCalculator(include=metrics, fit_width=True)
    return {
        query_name: {
            gallery_name: calculator.get_accuracy(
                query, query_labels, gallery, gallery_labels, bool(ref_includes_query), **kwargs
            )
            for gallery_name, gallery in galleries.items()
        }
        for query_name, query in queries.items()
    }


def _accuracy(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite accuracy, got {value!r}")
    return float(value)
