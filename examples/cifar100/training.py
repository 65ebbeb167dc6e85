"""Training and embedding, the same for every model of the comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from data import Images, augment, crop, mix, scaled
from profiles import Profile
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from tqdm import tqdm

from pml_compat.frozen import FrozenModel

EMBED_BATCH = 1000


def task_loss(classes: int, width: int) -> NormalizedSoftmaxLoss:
    """The loss that all models learn their classes by, with PML's own settings."""
    return NormalizedSoftmaxLoss(classes, width)


def train(
    model: torch.nn.Module,
    loss_func: torch.nn.Module,
    data: Images,
    profile: Profile,
    name: str,
    stored: dict[str, torch.Tensor] | None = None,
    after_epoch: Callable[[int], Any] = lambda epoch: None,
    old_model: FrozenModel | None = None,
) -> None:
    """Train a model and its loss.

    Stored embeddings of the same images, by model, go to a loss that reads them. With an ``old_model`` it is asked
    instead, about the very views that the new one sees and about as many mixtures of them, which have no label.
    """

    def loss_beside(old_model: FrozenModel, index: torch.Tensor) -> torch.Tensor:
        views = augment(data.images[index], profile.flip)
        n, views = len(views), torch.cat([views, mix(views)])
        new, old = (embed_batch(network, views, profile) for network in (model, old_model))
        labelled = loss_func(new[:n], data.labels[index], ref_emb=old[:n])
        return labelled + loss_func.without_labels(new[n:], ref_emb=old[n:])

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        if old_model is not None:
            return loss_beside(old_model, index)
        rows = {name: embeddings[index] for name, embeddings in (stored or {}).items()}
        references = {"ref_emb": rows if len(rows) > 1 else next(iter(rows.values()))} if rows else {}
        return loss_func(
            embed_batch(model, augment(data.images[index], profile.flip), profile), data.labels[index], **references
        )

    _run(model, loss_func, loss_of, len(data), profile, profile.epochs, name, after_epoch)


def train_without_labels(model: torch.nn.Module, data: Images, profile: Profile, name: str) -> None:
    """SimCLR: of all crops in a batch, each finds the other one of its own image."""
    with torch.no_grad():
        width = embed_batch(model, data.images[:2], profile).shape[1]
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
    both = torch.nn.Sequential(model, head.to(data.images.device))

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        views = [recolor(crop(data.images[index], profile.flip)) for _ in range(2)]
        return info_nce(embed_batch(both, torch.cat(views), profile))

    _run(both, torch.nn.Module(), loss_of, len(data), profile, profile.side_epochs, name)


def info_nce(embeddings: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """Return SimCLR's loss of two views, one below the other. PML's NTXentLoss takes cubic time for this."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    logits = (unit @ unit.t() / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return torch.nn.functional.cross_entropy(logits, other)


def recolor(images: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast and the balance of the colours of each image at random."""
    n, device = len(images), images.device
    values = images.float()
    mean = values.mean((1, 2, 3), keepdim=True)
    contrast = torch.empty(n, 1, 1, 1, device=device).uniform_(0.6, 1.4)
    color = torch.empty(n, 3, 1, 1, device=device).uniform_(0.7, 1.3)
    gray = torch.rand(n, 1, 1, 1, device=device) < 0.2
    values = torch.where(gray, values.mean(1, keepdim=True).expand_as(values), values)
    return (((values - mean) * contrast + mean) * color).clamp_(0, 255)


def embed_batch(model: torch.nn.Module, images: torch.Tensor, profile: Profile) -> torch.Tensor:
    """Return float32 embeddings, computed in the profile's precision."""
    device, wanted = images.device.type, profile.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_faster(device) if wanted is None else wanted):
        return model(scaled(images, profile.size)).float()


@cache
def bfloat16_is_faster(device: str) -> bool:
    """Measure it: some processors compute in bfloat16, others imitate it, many times slower than float32."""
    if device != "cpu":
        return True
    images, weight = torch.ones(16, 32, 16, 16), torch.ones(32, 32, 3, 3)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.conv2d(images.to(dtype), weight.to(dtype), padding=1)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[1] < seconds[0]


@torch.no_grad()
def embed(model: torch.nn.Module, images: torch.Tensor, profile: Profile) -> torch.Tensor:
    """Return the model's embeddings of plain images, as it gives them, on the CPU."""
    model.eval()
    parts = [embed_batch(model, part, profile).cpu() for part in images.split(EMBED_BATCH)]
    return torch.cat(parts)


def _run(
    model: torch.nn.Module,
    loss_func: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    profile: Profile,
    epochs: int,
    name: str,
    after_epoch: Callable[[int], Any] = lambda epoch: None,
) -> None:
    parameters = [*model.parameters(), *loss_func.parameters()]
    optimizer = torch.optim.SGD(parameters, profile.lr, momentum=0.9, nesterov=True, weight_decay=profile.weight_decay)
    steps = size // profile.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, profile.lr, epochs * steps, pct_start=0.2)
    device = next(model.parameters()).device
    with tqdm(total=epochs * steps, desc=name, unit="step", mininterval=5) as progress:
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(size, device=device)[: steps * profile.batch_size]  # whole batches
            for index in order.split(profile.batch_size):
                optimizer.zero_grad()
                loss = loss_of(index)
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            after_epoch(epoch + 1)
