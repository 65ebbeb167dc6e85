"""Where a query of a class should stand in the old space, so that it finds the stored vectors of its class."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize, softplus

from .._rows import LEAST_SPREAD, second_moments, spread_of, whitening

_SHARES = (0.0, 0.5, 1.0)  # of the fitted direction; the rest is the mean's
_POWERS = (0.0, 0.1, 0.2)  # of the rows' second moments, that a direction is divided by
_COMMON = 0.5  # length of what directions have in common, in root mean square lengths of the rest, at most
_MISS = 0.75  # of the way from a class's direction to where a linear map lands
_RIDGE = 1e-3  # of that map, in mean squared entries
_JUDGED_ROWS = 2048
_SCALE = 10.7  # of cosines, while directions are fitted, over the rows' spread
_NOISE = 0.75  # length of what is added to a unit query then, in spreads
_LARGEST_SCALE = 64.0  # of a softmax over cosines, over the rows' spread
_STEPS, _LEARNING_RATE = 300, 0.02
_GALLERY_ROWS, _QUERIES, _VIEWS = 2048, 512, 4  # a step, at most
_SCORES = 2**22  # held at once while rankings are read


@dataclass(frozen=True)
class Found:
    """P@1 and mAP of some queries."""

    precision_at_1: float
    mean_average_precision: float


@dataclass(frozen=True)
class Prospects:
    """What queries of a new model can expect to find among old embeddings, judged on rows that nothing was fitted to.

    Args:
        old: the old embeddings themselves, each left out of its own ranking.
        at_means: queries that all stand on the mean of their class.
        at_directions: queries that all stand on the direction of their class.
        near_directions: queries that miss it as a new model might: by three quarters of what a linear map of the old
            embeddings misses it by.
        fitted_share: of the fitted direction in :func:`class_directions`, 0 for means alone.
        whitening: the power of the old embeddings' second moments there, 0 for none.
    """

    old: Found
    at_means: Found
    at_directions: Found
    near_directions: Found
    fitted_share: float
    whitening: float


def class_directions(
    rows: torch.Tensor, classes: torch.Tensor, means: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None, Prospects]:
    r"""Return the direction for each class's queries, how they are whitened, and what that promises.

    .. math:: t_y \propto d_y - (1 - \gamma) \bar{d}, \quad d_y = n((\rho \, a_y + (1 - \rho) \, c_y) \, W), \quad
        W = C^{-\kappa}

    :math:`c` are class means, :math:`a` is what :func:`fit_directions` finds, :math:`C` are the second moments of the
    rows. Means find little where the old model does not keep classes apart; fitted directions find much, but where its
    embeddings all lie close together a query has to meet them exactly. Cosines are mostly made of the few directions in
    which all rows are alike, and a whitened query has less of these. So the share :math:`\rho` and the power
    :math:`\kappa` are measured: directions are fitted to one half of the rows, and the other half are queries that
    miss them as a new model might. For that a linear map from old embeddings to directions stands in, which mistakes
    one class for another where the old model does. Queries are then whitened by half the power: by more they find more
    of classes that are known, and less of others.

    :math:`\bar{d}` is what the directions have in common. It says little of a class, and a new model that has to keep
    classes apart cannot be where all directions lie close together; so :math:`\gamma` leaves at most half the root mean
    square length of what they differ by.

    Args:
        rows: ``(N, D)``, old embeddings as unit rows.
        classes: ``(N,)``, the row of ``means`` of each.
        means: ``(C, D)``, unit rows.
        seed: of what is drawn.
    Shape:
        - output: ``(C, D)``, unit rows of the dtype of ``means``; ``(D, D)`` :math:`C^{-\kappa / 2}`, None for no power
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    fitting, judging = order.tensor_split(2)
    judging = judging[:_JUDGED_ROWS]
    seen, gallery, own = rows[fitting], rows[judging], classes[judging]
    fitted = fit_directions(seen, classes[fitting], means, generator)
    moments = second_moments(rows)
    landing = _linear_map(seen, classes[fitting], len(means), gallery)
    near: dict[tuple[float, float], Found] = {}
    for share, power in itertools.product(_SHARES, _POWERS):
        directions = _mixed(fitted, means, share, whitening(moments, power))
        queries = torch.lerp(directions[own], normalize(landing @ directions, dim=1), _MISS)
        near[share, power] = found_by(normalize(queries, dim=1), own, gallery, own)
    share, power = max(near, key=lambda choice: near[choice].precision_at_1 + near[choice].mean_average_precision)
    flat = whitening(moments, power)
    at_means, at_directions = (
        found_by(directions[own], own, gallery, own) for directions in (means, _mixed(fitted, means, share, flat))
    )
    old = found_by(gallery, own, gallery, own)
    prospects = Prospects(old, at_means, at_directions, near[share, power], share, power)
    if share:
        fitted = fit_directions(rows, classes, means, generator)
    return _mixed(fitted, means, share, flat), whitening(moments, power / 2) if power else None, prospects


def fit_directions(
    rows: torch.Tensor, classes: torch.Tensor, means: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    r"""Fit the directions whose queries rank the old embeddings of their class first, also where they miss.

    .. math:: a = \arg\min_a \sum_y \operatorname{E}_\epsilon \operatorname{mean}_{i: y_i = y} \log \Bigl(1 +
        \sum_{j: y_j \ne y} e^{s (\langle q, f_j \rangle - \langle q, f_i \rangle) / \sigma} \Bigr), \quad
        q = \frac{a_y + \nu \sigma \epsilon}{\lVert a_y + \nu \sigma \epsilon \rVert}

    :math:`\sigma` is the spread of the rows about their mean, root mean square: where it is small, as ArcFace leaves it
    on a hard task, cosines hardly differ, and what tells classes apart is small too. :math:`\epsilon` are differences
    of old embeddings from their class means. Adam from the means on. A step takes at most 2048 rows and 512 queries,
    whatever the number of classes.

    Shape:
        - output: ``(C, D)`` unit rows
    """
    device = rows.device
    differences = _differences(rows, classes, len(means))
    spread = spread_of(rows)
    scale, noise = _SCALE / spread, _NOISE * spread
    directions = means.clone().requires_grad_()
    optimizer = torch.optim.Adam([directions], _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS if len(rows) and len(means) > 1 else 0):
        gallery = torch.randperm(len(rows), generator=generator)[:_GALLERY_ROWS].to(device)
        found = classes[gallery]
        asked = torch.unique(found).repeat(_VIEWS)
        if len(asked) > _QUERIES:
            asked = asked[torch.randperm(len(asked), generator=generator)[:_QUERIES].to(device)]
        missed_by = noise * differences[torch.randint(len(rows), (len(asked),), generator=generator).to(device)]
        with torch.enable_grad():
            queries = normalize(normalize(directions, dim=1)[asked] + missed_by, dim=1)
            scores = scale * queries @ rows[gallery].t()
            own = asked[:, None] == found
            against = scores.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
            loss = ((softplus(against - scores) * own).sum(1) / own.sum(1)).mean()
            (directions.grad,) = torch.autograd.grad(loss, directions)
        optimizer.step()
        schedule.step()
    return normalize(directions.detach(), dim=1)


def found_by(queries: torch.Tensor, query_classes: torch.Tensor, gallery: torch.Tensor, classes: torch.Tensor) -> Found:
    """Return what queries find in a gallery of the same items, unit rows both; row i is left out of its own ranking."""
    first, precision, counted = torch.zeros(3, dtype=torch.float64, device=gallery.device)
    place = torch.arange(1, len(gallery) + 1, device=gallery.device)
    size = max(1, _SCORES // max(1, len(gallery)))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ gallery.t()
        scores.diagonal(start).fill_(-torch.inf)  # the last one then
        ranked = classes[scores.argsort(1, descending=True)[:, :-1]]
        hits = ranked == query_classes[start : start + size, None]
        positives = hits.sum(1)
        first += hits[:, :1].sum()
        precision += ((hits.cumsum(1) / place[:-1] * hits).sum(1) / positives.clamp(min=1)).sum()
        counted += (positives > 0).sum()
    return Found(*(float(total / counted.clamp(min=1)) for total in (first, precision)))


def fitting_scale(rows: torch.Tensor, classes: torch.Tensor, count: int) -> float | None:
    """Return the scale at which a softmax over cosines with class means fits rows that were left out of the means.

    Of the powers of two from 1 to 64 over the rows' spread about their mean, with halfway values; None where too few
    rows are there to tell.

    Args:
        rows: ``(N, D)`` unit rows.
        classes: ``(N,)``.
        count: of classes.
    """
    if len(rows) < 2 * count or count == 1:
        return None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    seen, judged = order[_JUDGED_ROWS:], order[:_JUDGED_ROWS]
    if len(seen) < len(judged):
        seen, judged = order.tensor_split(2)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, classes[seen], rows[seen])
    cosines = rows[judged] @ normalize(sums, dim=1).t()
    steps = int(2 * math.log2(_LARGEST_SCALE / float(spread_of(rows))) + 1e-3) + 1
    scales = [2 ** (step / 2) for step in range(steps)]
    losses = [torch.nn.functional.cross_entropy(scale * cosines, classes[judged]) for scale in scales]
    errors = [round(float(loss), 6) for loss in losses]  # where classes are far apart many scales fit
    return scales[errors.index(min(errors))]


def _differences(rows: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    """Return what rows differ by from their class means, 1 long in the mean; 0 where they do not differ."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, classes, rows)
    counts = torch.bincount(classes, minlength=count).clamp(min=1)
    differences = rows - (sums / counts[:, None])[classes]
    length = torch.linalg.vector_norm(differences, dim=1).mean()
    return differences / length.clamp(min=1e-6)


def _linear_map(rows: torch.Tensor, classes: torch.Tensor, count: int, others: torch.Tensor) -> torch.Tensor:
    """Return what ``others`` weigh each class, ``(M, C)``, by the affine map from ``rows`` to their classes."""
    if len(rows) == 0:
        return others.new_zeros(len(others), count)
    center, goal = rows.mean(0), torch.bincount(classes, minlength=count).to(rows) / len(rows)
    centered = rows - center
    gram = centered.t() @ centered
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    sums = centered.new_zeros(count, rows.shape[1]).index_add_(0, classes, centered)
    return (others - center) @ torch.linalg.lstsq(gram, sums.t()).solution + goal


def _mixed(fitted: torch.Tensor, means: torch.Tensor, share: float, flat: torch.Tensor) -> torch.Tensor:
    directions = normalize(torch.lerp(means, fitted, share) @ flat, dim=1)
    common = directions.mean(0)
    rest = torch.linalg.vector_norm(directions - common, dim=1).square().mean().sqrt()
    length = torch.linalg.vector_norm(common)
    kept = torch.where(rest > LEAST_SPREAD, _COMMON * rest / length, 1.0).clamp(max=1)  # one class has nothing else
    return normalize(directions - (1 - kept) * common, dim=1)
