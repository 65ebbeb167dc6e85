"""What an upgrade kept and what it gained, over several test sets: P_up, P_comp and P_1."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from .per_query import as_vector


def compatibility_scores(
    *, old_to_old: Any, new_to_new: Any, new_to_old: Any, independent: Any, squash: bool = True
) -> dict[str, float]:
    r"""Return what an upgrade kept of the new model (P_up), what it gained on the old gallery (P_comp), and both (P_1).

    .. math::
        u_t = \sigma\left( \frac{M_t(n, n) - M_t(\phi^*, \phi^*)}{M_t(\phi^*, \phi^*)} \right), \quad
        c_t = \sigma\left( \frac{M_t(n, o) - M_t(o, o)}{M_t(\phi^*, \phi^*) - M_t(o, o)} \right)

        P_{up} = \frac1T \sum_t u_t, \quad P_{comp} = \frac1T \sum_t c_t, \quad
        P_1 = \frac1T \sum_t \frac{2 u_t c_t}{u_t + c_t}

    over T test sets, with :math:`\sigma` the logistic function. A P_up of 0.5 is a new model as good as the
    independent one; a P_comp of 0.5 is an old gallery that serves new queries no better than old ones, and
    :math:`\sigma(1) = 0.731` an update gain of 1.

    Args:
        old_to_old: accuracy of old queries on the old gallery: a number, or one a test set. As with the others,
            fractions, or percents in all four: where any value exceeds 1, all are percents. 1 % or less has to be a
            fraction, except in ``new_to_old`` beside a test set with more.
        new_to_new: accuracy of new queries on the new gallery.
        new_to_old: accuracy of new queries on the old gallery.
        independent: accuracy, on its own gallery, of a new model trained with no compatibility term.
        squash: apply :math:`\sigma`. Without it :math:`c_t` is :func:`update_gain`, :math:`u_t` is a relative change
            that is 0 at best for most methods, and P_1, a harmonic mean, has a meaning only where both are above 0.
    Returns:
        ``{"p_up": ..., "p_comp": ..., "p_1": ...}``, fractions. NaN, with a RuntimeWarning, where a test set's
        denominator is 0 or below.
    Raises:
        ValueError: a value is not a number from 0 to 100; numbers of test sets that differ; fractions among percents.
    Example:
        >>> scores = compatibility_scores(old_to_old=0.40, new_to_new=0.57, new_to_old=0.45, independent=0.60)
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'p_up': 0.488, 'p_comp': 0.562, 'p_1': 0.522}

    Reference:
        Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval",
        CVPR 2023; tested against its published table.
    """
    old, new, cross, paragon = _same_unit(
        old_to_old=old_to_old, new_to_new=new_to_new, new_to_old=new_to_old, independent=independent
    )
    gain = _ratio(cross - old, paragon - old, paragon > old, "p_comp and p_1", "independent must be above old_to_old")
    change = _ratio(new - paragon, paragon, paragon > 0, "p_up and p_1", "independent must be above 0")
    comp, up = (_logistic(gain), _logistic(change)) if squash else (gain, change)
    both = _ratio(2 * comp * up, comp + up, comp + up != 0, "p_1", "its two ratios must not add up to 0")
    return {"p_up": float(up.mean()), "p_comp": float(comp.mean()), "p_1": float(both.mean())}


def _same_unit(**values: Any) -> list[np.ndarray]:
    vectors = {name: as_vector(value, name) for name, value in values.items()}
    sizes = {name: len(vector) for name, vector in vectors.items()}
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(f"every argument must have one value a test set: got {got}")
    for name, vector in vectors.items():
        if not ((vector >= 0) & (vector <= 100)).all():
            wrong = vector[~((vector >= 0) & (vector <= 100))][0]
            raise ValueError(f"{name} must be a fraction or a percentage, from 0 to 100, got {wrong:g}")
    largest = max(vectors, key=lambda name: vectors[name].max())
    if vectors[largest].max() > 1:
        for name, vector in vectors.items():
            low = (vector > 0) & (vector <= 1)
            # Queries of a model that does not fit the old gallery may well find under 1 % in one test set.
            if low.all() if name == "new_to_old" else low.any():
                raise ValueError(
                    "accuracies must be all fractions or all percents: "
                    f"{name} has {vector[low][0]:g} where {largest} has {vectors[largest].max():g}; "
                    "divide the percents by 100"
                )
    return list(vectors.values())


def _ratio(top: np.ndarray, bottom: np.ndarray, defined: np.ndarray, scores: str, rule: str) -> np.ndarray:
    if not defined.all():
        where = int((~defined).argmax())
        warnings.warn(f"compatibility_scores: no {scores}, for test set {where}: {rule}", RuntimeWarning, stacklevel=3)
    return np.divide(top, bottom, out=np.full_like(top, math.nan), where=defined)


def _logistic(values: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(values / 2)) / 2  # no overflow, however small a denominator was
