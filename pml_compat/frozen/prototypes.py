"""UniBCT's class prototypes: means of old embeddings that listen to their neighbours in the new space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import as_tensor, check_finite, check_integer, check_labels, check_number
from .._rows import precise_dtype
from .class_centers import ClassCenters

_BLOCK_ELEMENTS = 2**25  # similarities held at once: a class of up to 5792 samples keeps its own while it is iterated
_TOLERANCE = 1e-9  # of the iteration: the distance from the exact prototype, old embeddings being unit rows


@torch.no_grad()
def refine_prototypes(
    old_embeddings: Any,
    new_embeddings: Any,
    labels: Any,
    *,
    smoothing: float = 0.9,
    temperature: float = 0.05,
    max_class_size: int = 2048,
) -> ClassCenters:
    r"""Return a prototype for each class: the mean of its old embeddings, smoothed over a graph of the new ones.

    .. math:: p_y = \frac{m_y}{\lVert m_y \rVert}, \quad m_y = \operatorname{mean}_i \hat v_i, \quad
        \hat V = (1 - \lambda)(I - \lambda S)^{-1} V, \quad
        S_{ij} = \frac{e^{\langle f_i, f_j \rangle / \tau}}{\sum_{k \ne i} e^{\langle f_i, f_k \rangle / \tau}},
        \; S_{ii} = 0

    :math:`V` and :math:`f` are the old and the new embeddings of one class, as unit rows. The same mean is
    :math:`m_y = V^\top w` with :math:`w = \frac{1 - \lambda}{n} (I - \lambda S^\top)^{-1} 1`, weights that are above 0
    and add up to 1: a sample counts the more, the more samples of its class are near it *in the new space*. A
    mislabelled or spoilt sample is near none, and its weight falls to about :math:`(1 - \lambda) / n`. Two kinds keep
    theirs: several of one other class, which are near one another, and a stored vector that is bad though the new
    embedding of its item lies amid the class.

    Args:
        old_embeddings: ``(N, D_old)`` tensor, array, memory map or FrozenEmbeddings (rows by position), finite; of the
            *new* training set, by the old model in eval mode.
        new_embeddings: ``(N, D_new)``, likewise, row i of the same item; by the model in training, in eval mode.
        labels: ``(N,)`` labels of the new training set.
        smoothing: the share ``lambda`` that comes from neighbours, in [0, 1); 0 gives the plain class means.
        temperature: ``tau``, of cosines; above 0.
        max_class_size: up to this many samples a class is solved for exactly, in O(n^3) time and n^2 numbers of
            memory. A larger one is iterated, :math:`w \leftarrow (1 - \lambda) / n + \lambda S^\top w`, in blocks of
            its matrix: after k steps :math:`\lVert m_y - m_y^{(k)} \rVert \le \lVert w - w^{(k)} \rVert_1 \le 2
            \lambda^k`, as the rows of S sum to 1. It goes on until this, or the bound from the last step,
            :math:`\frac{\lambda}{1 - \lambda} \lVert w^{(k)} - w^{(k - 1)} \rVert_1`, is below 1e-9.
    Shape:
        - output: ClassCenters of the labels present, with counts and without boundaries, in the dtype of
          ``old_embeddings`` (float32 at least), on the device of ``new_embeddings``. Computed in float64. A class of
          one sample has that sample.
    Raises:
        ValueError: an argument out of its range; not two-dimensional, lengths that differ, NaN or infinity (which
            row); a class whose weighted mean is 0.
    Example:
        >>> old = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])  # the last is mislabelled
        >>> labels = torch.zeros(4, dtype=torch.long)
        >>> ClassCenters.from_embeddings(old, labels).centers
        tensor([[0.9484, 0.3172]])
        >>> refine_prototypes(old, old, labels).centers
        tensor([[0.9996, 0.0271]])

    Reference:
        Zhang et al., "Towards Universal Backward-Compatible Representation Learning", IJCAI 2022. Differs from
        the public code in: S is a softmax over each row. Over columns, as there, :math:`1^\top S = 1^\top`, so that
        every weight is 1/n and the prototype is the plain mean. Embeddings and prototypes are unit rows.
    """
    smoothing = check_number(smoothing, "smoothing", minimum=0)
    if smoothing >= 1:
        raise ValueError(f"smoothing must be below 1, got {smoothing!r}; at 1 nothing of the old embeddings is left")
    temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
    max_class_size = check_integer(max_class_size, "max_class_size", minimum=1)
    for name, rows in (("old_embeddings", old_embeddings), ("new_embeddings", new_embeddings)):
        if getattr(rows, "ndim", None) != 2 or 0 in rows.shape:
            got = type(rows).__name__ if getattr(rows, "shape", None) is None else f"shape {tuple(rows.shape)}"
            raise ValueError(f"{name} must be a non-empty (N, D) tensor or array, got {got}")
    if len(old_embeddings) != len(new_embeddings):
        raise ValueError(
            "new_embeddings must have a row for each of old_embeddings, row i of the same item: "
            f"expected {len(old_embeddings)}, got {len(new_embeddings)}"
        )
    device = new_embeddings.device if isinstance(new_embeddings, torch.Tensor) else torch.device("cpu")
    labels = check_labels(labels, length=len(old_embeddings)).to(device)
    order = torch.argsort(labels, stable=True)
    classes, counts = torch.unique_consecutive(labels[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    prototypes = torch.zeros(len(classes), old_embeddings.shape[1], dtype=torch.float64, device=device)
    for size in counts.unique().tolist():  # classes of equal size are solved for together
        alike = (counts == size).nonzero()[:, 0]
        for rows in alike.split(max(1, _BLOCK_ELEMENTS // (size * size))):
            index = order[starts[rows, None] + torch.arange(size, device=device)]
            old, new = (
                _unit_rows(given, index, name)
                for given, name in ((old_embeddings, "old_embeddings"), (new_embeddings, "new_embeddings"))
            )
            if size <= max_class_size:
                weights = _solve_weights(new, smoothing, temperature)
            else:
                weights = torch.stack([_iterate_weights(own, smoothing, temperature) for own in new])
            prototypes[rows] = (weights[:, None] @ old)[:, 0]
    dtype = precise_dtype(as_tensor(old_embeddings[:1], "old_embeddings").dtype)
    return ClassCenters(prototypes, classes, counts=counts).to(dtype).remember(old_embeddings, labels)


def _unit_rows(embeddings: Any, index: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows ``index``, ``(k, n)``, as float64 ``(k, n, D)`` of length 1, or 0 where the row is 0."""
    flat = index.flatten()
    if isinstance(embeddings, torch.Tensor):
        rows = embeddings.detach()[flat.to(embeddings.device)]
    else:
        rows = as_tensor(embeddings[flat.cpu().numpy()], name)
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {rows.dtype}")
    check_finite(rows, name, places=flat)
    rows = normalize(rows.to(index.device, torch.float64), dim=1, eps=torch.finfo(torch.float64).tiny)
    return rows.unflatten(0, index.shape)


def _neighbours(rows: torch.Tensor, directions: torch.Tensor, first: int, temperature: float) -> torch.Tensor:
    """Return the rows of S, ``(..., r, n)``, of the samples ``rows``, which stand at ``first`` in ``directions``."""
    similarities = rows @ directions.mT / temperature
    similarities.diagonal(first, -2, -1).fill_(-torch.inf)
    return similarities.softmax(-1)


def _solve_weights(directions: torch.Tensor, smoothing: float, temperature: float) -> torch.Tensor:
    """Return ``w``, ``(k, n)``, of k classes of n samples, ``(k, n, D)``."""
    n = directions.shape[1]
    if n == 1:
        return directions.new_ones(len(directions), 1)
    system = _neighbours(directions, directions, 0, temperature).mT.mul(-smoothing)
    system.diagonal(0, -2, -1).add_(1)
    return torch.linalg.solve(system, directions.new_full(directions.shape[:2], (1 - smoothing) / n))


def _iterate_weights(directions: torch.Tensor, smoothing: float, temperature: float) -> torch.Tensor:
    """Return ``w``, ``(n,)``, of one class, ``(n, D)``, within ``_TOLERANCE`` in the sum of absolute differences."""
    n = len(directions)
    size = max(1, _BLOCK_ELEMENTS // n)
    parts = [(start, directions[start : start + size]) for start in range(0, n, size)]
    kept = [_neighbours(part, directions, start, temperature) for start, part in parts] if len(parts) == 1 else None
    weights = directions.new_full((n,), 1 / n)
    steps = math.ceil(math.log(_TOLERANCE / 2) / math.log(smoothing)) if smoothing > 0 else 0
    for _ in range(steps):
        following = directions.new_full((n,), (1 - smoothing) / n)
        for number, (start, part) in enumerate(parts):
            block = _neighbours(part, directions, start, temperature) if kept is None else kept[number]
            following += smoothing * (weights[start : start + len(part)] @ block)
        change = (following - weights).abs().sum()
        weights = following
        if float(change) * smoothing / (1 - smoothing) < _TOLERANCE:
            break
    return weights
