"""Several maps tried on the same pairs, and the best of them fitted to all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from .._checks import check_labels, check_matrix, stored_rows
from .base import Transformation
from .fct import FCTTransformation
from .fit import fit_transformation
from .linear import LinearTransformation
from .low_rank import LowRankTransformation
from .orthogonal import OrthogonalTransformation
from .residual_bottleneck import ResidualBottleneckTransformation
from .scaled_orthogonal import ScaledOrthogonalTransformation
from .selection import hold_out, is_better

_MOST_ROWS = 2**15  # that a map is tried on; the best is fitted to all
_STANDARD_ERRORS = 2.0  # by which a map is surely worse in P@1
_RANKS = (2, 4, 8)  # parts of the narrower width
_UNCHANGED = "unchanged"
_TRAINED = ("residual bottleneck", "FCT")
_DECIMALS = 6  # of cosines: copies of a row tie, however their products were rounded

Arrays = dict[str, Any]
Scores = tuple[torch.Tensor, torch.Tensor]


class Tried(dict[str, dict[str, float]]):
    """What each map reached, by its name; printed, a table with the ``best`` in bold."""

    best = "linear"

    def __str__(self) -> str:
        lines = ["| map | P@1 | mAP | seconds |", "| --- | ---: | ---: | ---: |"]
        for name, found in self.items():
            percent = [f"{100 * found[key]:.1f}" for key in ("precision_at_1", "mean_average_precision")]
            shown = f"**{name}**" if name == self.best else name
            lines.append(f"| {shown} | {' | '.join(percent)} | {found['seconds']:.1f} |")
        return "\n".join(lines)


def fit_best(
    source: Any,
    target: Any,
    labels: Any = None,
    *,
    side_info: Any = None,
    queries: Any = None,
    trained: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Transformation:
    r"""Try every map from a stored gallery's space into a new model's; return the best one, fitted to all pairs.

    Tried are the gallery unchanged, the closed forms (a rotation, a rotation with scales, a linear map, and linear maps
    of a half, a quarter and an eighth of the rank) and the trained maps (residual bottleneck; FCT, with inner layers of
    8 times the new width, 2,048 at most). Each is fitted to the same rows, 32,768 at most, and judged on a tenth that
    none has seen, 2,000 at most: of the classes, where ``labels`` has 20 and more, else of the rows. What counts is
    what new embeddings find by cosine, as queries, among the mapped rows: the best P@1, and of maps within two standard
    errors of it the best mAP; of equal ones the first. After a map that finds everything no other is tried.

    The closed forms take seconds together. A trained map takes 500 steps on up to 1,024 rows each, as
    :func:`fit_transformation` trains it without a validation of its own: seconds to minutes on a CPU, by the widths.
    Where a trained map is the best it is trained once more, 500 steps or ten passes over all rows.

    What each map reached is kept in the attribute ``tried``: under each name a dict of ``precision_at_1``,
    ``mean_average_precision`` and ``seconds``; ``tried.best`` is the name that was chosen, and ``print(tried)`` shows
    a table. It is not saved with the transformation.

    The best map may still find less than the old model finds in the gallery as it is: whether to use it, says
    :func:`pml_compat.upgrade.evaluate`. *Queries* that go into an old space are another matter:
    :class:`pml_compat.serving.QueryBlend`.

    Args:
        source: ``(N, D_in)``, the stored model's embeddings: tensor, array, memory map or ``FrozenEmbeddings``.
        target: ``(N, D_out)``, the new model's, row i of the same item.
        labels: ``(N,)``: rows of a query's class are right, itself left out. None, or where the rows that are judged
            are of one class, or each of its own: the query's own item is right; the mAP is then the mean reciprocal
            rank.
        side_info: ``(N, S)``, stored beside ``source``, for FCT. The other maps do without: look at
            ``side_features`` of what is returned.
        queries: ``(N, D_out)``, the new model's, of a query whose answer is item i, to judge by; nothing is fitted to
            them. None: ``target``. Give them where a query is of another kind than what is stored, such as a question
            that a text answers: nearly every map finds the text by the text.
        trained: try the trained maps, too. False: the closed forms alone, in seconds; ``side_info`` is then not used.
        seed: of the rows that are held out, and of the trainings.
        progress: show a progress bar of the maps.
    Shape:
        - output: a transformation ``(N, D_in) -> (N, D_out)``, on the device of ``source``, in eval mode
    Warns:
        UserWarning: fewer than 20 rows, too few to judge by: the linear map is returned, and ``tried`` is empty.
    Raises:
        ValueError: lengths that differ, queries not as wide as ``target``, no rows, NaN or infinity (which row).
    Example:
        >>> old = torch.randn(30, 4)
        >>> new = old @ torch.linalg.qr(torch.randn(4, 4))[0]
        >>> old_to_new = fit_best(old, new, progress=False)
        >>> type(old_to_new).__name__, old_to_new.tried["rotation"]["precision_at_1"]
        ('OrthogonalTransformation', 1.0)
    """
    arrays = {"source": source, "target": target, "side_info": side_info, "queries": queries}
    arrays = {name: rows for name, rows in arrays.items() if rows is not None}
    for name, rows in arrays.items():
        check_matrix(rows[:1], name)
        if len(rows) != len(source):
            raise ValueError(
                f"{name} must have one row for each row of source: expected {len(source)}, got {len(rows)}"
            )
    if queries is not None:
        check_matrix(queries[:1], "queries", target.shape[1])
    labels = None if labels is None else check_labels(labels, length=len(source)).cpu()
    maps = candidates(source.shape[1], target.shape[1], None if side_info is None else side_info.shape[1])
    maps = {name: build for name, build in maps.items() if trained or name not in _TRAINED}
    training, judged = _split(len(source), labels, seed)
    tried = Tried()
    if len(judged):
        seen, unseen = ({name: stored_rows(rows, i, name) for name, rows in arrays.items()} for i in (training, judged))
        own = None if labels is None else labels[judged]
        scores: dict[str, Scores] = {}
        with tqdm(maps, desc="fit_best", unit="map", disable=not progress) as bar:
            for name in bar:
                bar.set_postfix_str(name)
                start = time.perf_counter()
                scores[name] = _judge(fitted(name, maps, seen, seed), unseen, own)
                seconds = time.perf_counter() - start
                precision, average = (float(values.mean()) for values in scores[name])
                tried[name] = {"precision_at_1": precision, "mean_average_precision": average, "seconds": seconds}
                if precision == average == 1:  # none of the others can be better
                    break
        tried.best = choose(scores)
    else:
        message = f"source must have 20 rows or more to compare maps by, got {len(source)}: the linear one is fitted"
        warnings.warn(message, stacklevel=2)
    transformation = fitted(tried.best, maps, arrays, seed)
    cast(Any, transformation).tried = tried
    return transformation


def candidates(in_features: int, out_features: int, side_features: int | None) -> dict[str, Callable[[], Any]]:
    """Return what builds each map, the simpler ones first."""
    widths = in_features, out_features
    ranks = sorted({max(1, min(widths) // part) for part in _RANKS}, reverse=True)
    return {
        _UNCHANGED: partial(LinearTransformation, *widths),
        "rotation": partial(OrthogonalTransformation, *widths),
        "scaled rotation": partial(ScaledOrthogonalTransformation, *widths),
        "linear": partial(LinearTransformation, *widths),
        **{f"linear, rank {rank}": partial(LowRankTransformation, *widths, rank) for rank in ranks},
        _TRAINED[0]: partial(ResidualBottleneckTransformation, *widths),
        _TRAINED[1]: partial(FCTTransformation, *widths, side_features, min(2048, 8 * out_features)),
    }


def fitted(name: str, maps: dict[str, Callable[[], Any]], arrays: Arrays, seed: int) -> Transformation:
    """Return the map of that name, fitted to ``source`` and ``target``, in eval mode."""
    source, target = arrays["source"], arrays["target"]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        transformation = maps[name]()
        if isinstance(source, torch.Tensor):
            transformation.to(source.device)
        if isinstance(transformation, ResidualBottleneckTransformation | FCTTransformation):
            side_info = arrays["side_info"] if transformation.side_features else None
            # On all rows to the end: whether the training was worth it is seen on rows that are held out here.
            fit_transformation(transformation, source, target, side_info, validation=0.0, seed=seed, progress=False)
        elif name != _UNCHANGED:
            transformation.fit(source, target)
    return transformation.eval()


def _split(rows: int, labels: torch.Tensor | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows to try maps on and rows to judge them by, both sorted; none to judge by where there are too few."""
    generator = torch.Generator().manual_seed(seed)
    training, judged = hold_out(rows, labels, generator)
    if not len(judged):  # classes of one row each
        training, judged = hold_out(rows, None, generator)
    return training[torch.randperm(len(training), generator=generator)[:_MOST_ROWS]].sort().values, judged


@torch.no_grad()
def _judge(transformation: Transformation, arrays: Arrays, labels: torch.Tensor | None) -> Scores:
    device = next(transformation.parameters()).device
    asked = "queries" if "queries" in arrays else "target"
    source, queries = (arrays[name].float().to(device) for name in ("source", asked))
    side_info = arrays["side_info"].to(device) if transformation.side_features else None
    return retrieval(queries, transformation(source, side_info), None if labels is None else labels.to(device))


def retrieval(target: torch.Tensor, mapped: torch.Tensor, labels: torch.Tensor | None) -> Scores:
    """Return P@1 and average precision of each new row that has an answer, as a query by cosine over the mapped ones.

    Where several rows are nearest, each counts for its share; the average precision takes rows of one cosine together,
    as sklearn does.

    Args:
        target: ``(N, D)``, the new model's rows.
        mapped: ``(N, D)``, row i of the same item.
        labels: ``(N,)``: right are the other rows of the class. Else, or where classes tell nothing, row i for query i.
    """
    queries, gallery = (normalize(rows.double(), dim=1) for rows in (target, mapped))
    cosines = (queries @ gallery.t()).round(decimals=_DECIMALS)
    right = own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    if labels is not None and 1 < len(torch.unique(labels)) < len(labels):
        right = (labels[:, None] == labels) & ~own
        cosines = cosines.masked_fill(own, -torch.inf)
    nearest = cosines == cosines.amax(1, keepdim=True)
    precision = (nearest & right).sum(1).double() / nearest.sum(1)
    falling, order = cosines.sort(dim=1, descending=True)
    right = right.gather(1, order)
    as_near = torch.searchsorted(-falling, -falling, right=True)  # how many rows are as near as each, or nearer
    found = right.cumsum(1).gather(1, as_near - 1).double() / as_near
    average = (found * right).sum(1) / right.sum(1).clamp(min=1)
    asked = right.any(1)
    return precision[asked], average[asked]


def choose(scores: dict[str, Scores]) -> str:
    """Return the map of the best mAP among those with the best P@1, or none surely worse; the first of equals.

    Surely: by more than two standard errors of the difference, query by query.
    """
    highest, _ = max(scores.values(), key=lambda found: float(found[0].mean()))
    close = [name for name, (precision, _) in scores.items() if not is_better(highest, precision, _STANDARD_ERRORS)]
    return max(close, key=lambda name: float(scores[name][1].mean()))
