"""Class centres that tell the classes of an old space apart, fitted to stored embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from .._checks import check_integer, check_labels, check_number, stored_rows
from .class_centers import ClassCenters
from .measured_classes import Boundary, check_boundary_rule, in_pieces, measure_boundaries


def fit_centers(
    embeddings: Any,
    labels: Any,
    *,
    scale: float = 16.0,
    boundary: Boundary | None = "max",
    epochs: int = 30,
    batch_size: int = 1024,
    lr: float = 1e-2,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ClassCenters:
    r"""Fit a direction to each class of old embeddings, by which a cosine softmax tells the classes apart.

    .. math:: c = \arg\min_c - \sum_i \log \frac{e^{s \cos(f_i, c_{y_i})}}{\sum_j e^{s \cos(f_i, c_j)}}

    A linear probe of the old model. Where the old model never learned to keep classes apart their means lie close
    together, and to be like the mean of one's class is then to be like many others too; these directions are like
    their own class and unlike the others. They go wherever class centres go: into
    :meth:`FrozenClassifier.from_centers` for BCT, into ``LCELoss``.

    Adam from the means on, its learning rate falling as half a cosine to 0. Time :math:`O(N C D)` an epoch, memory
    :math:`O(C (D + \text{batch}))`; rows are read by batches.

    Args:
        embeddings: ``(N, D)`` tensor, array, memory map or ``FrozenEmbeddings``: the old model's, of the new training
            set in eval mode and without augmentation.
        labels: ``(N,)`` of the new training set.
        scale: :math:`s`, of the cosines, above 0; the classifier's that they are for.
        boundary: as for :meth:`ClassCenters.from_embeddings`, measured around the fitted directions.
        epochs: passes over the rows, 1 or more.
        batch_size: rows a step, at most; 1 or more.
        lr: the highest learning rate, above 0.
        seed: of the order.
        device: where they are fitted; None for where ``embeddings`` are.
        progress: show a progress bar.
    Returns:
        The centres, where ``embeddings`` are.
    Raises:
        ValueError: empty, NaN or infinite, lengths that differ, a class whose mean is 0, a number out of range.
    Example:
        >>> old, labels = torch.randn(60, 4), torch.arange(60) % 3
        >>> centers = fit_centers(old, labels, progress=False)
        >>> centers.centers.shape, centers.labels
        (torch.Size([3, 4]), tensor([0, 1, 2]))

    Reference:
        Ours. Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, take the mean for a class
        that the old classifier lacks.
    """
    scale = check_number(scale, "scale", minimum=0, exclusive=True)
    check_boundary_rule(boundary)
    lr = check_number(lr, "lr", minimum=0, exclusive=True)
    epochs = check_integer(epochs, "epochs", minimum=1)
    batch_size = check_integer(batch_size, "batch_size", minimum=1)
    generator = torch.Generator().manual_seed(check_integer(seed, "seed", minimum=0))
    pieces = in_pieces(embeddings, labels)
    means = ClassCenters.from_batches(pieces, boundary=None)
    targets = means.index_of(check_labels(labels).to(means.labels.device))
    counts = torch.bincount(targets)
    targets = targets.to(device)
    weight = means.centers.to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr)
    steps = math.ceil(len(targets) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in tqdm(range(epochs), desc="fit centres", unit="epoch", disable=not progress):
        for index in torch.randperm(len(targets), generator=generator).tensor_split(steps):
            rows = stored_rows(embeddings, index, "embeddings").to(weight)
            logits = scale * normalize(rows) @ normalize(weight).t()
            loss = cross_entropy(logits, targets[index.to(targets.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    rows = normalize(weight.detach().double()).to(means.centers.device)
    boundaries = measure_boundaries(pieces, rows, means.label_map, counts, boundary) if boundary else None
    return ClassCenters(rows.to(means.centers.dtype), means.labels, boundaries, counts)
