"""The models of the demo, and the settings they are trained with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._extras import import_extra
from .._host import NTXentLoss, SelfSupervisedLoss
from ..frozen import ClassCenters, FrozenClassifier
from ..serving import QueryBlend
from ..transformations import FCTTransformation, fit_transformation
from .demo_methods import CLASSES, NETWORKS, NEW_WIDTH, OLD_WIDTH, OldSystem, task_loss

# Chosen on seeds 10 to 19; the results are those of seeds 0 to 4.
OLD_CLASSES, OLD_IMAGES_PER_CLASS = 5, 20
OLD_CHANNELS, OLD_EPOCHS, OLD_BATCH = 8, 30, 64
NEW_CHANNELS, NEW_EPOCHS, NEW_BATCH = 32, 40, 128
LEARNING_RATE = 2e-3  # of batches of 64
PROTOTYPE_EPOCHS = (10, 20)  # after which UniBCT refines its prototypes
SIDE_CHANNELS, SIDE_WIDTH, SIDE_EPOCHS, SIDE_BATCH, SIDE_TEMPERATURE = 16, 32, 10, 32, 0.2
FCT_HIDDEN = 512  # for speed; the library's own width is the paper's, 2048
MAPS = ("fct", "fct_side")  # of the old gallery, for the independent new model
SERVED = ("blended", "two_stage")  # at query time, by the old model and the independent one
METHODS = ("independent", *SERVED, "bct", "lce", "lce_backward", *MAPS)
ALL_METHODS = (*NETWORKS, *SERVED, *MAPS)


def count_epochs(methods: Sequence[str]) -> int:
    """Return the epochs that one seed takes, for a progress bar."""
    networks = sum(method in NETWORKS for method in methods)
    return OLD_EPOCHS + networks * NEW_EPOCHS + SIDE_EPOCHS * ("fct_side" in methods)


def split_in_half(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of a training and a test half, with the same share of every class."""
    split = import_extra("sklearn.model_selection", "demo").train_test_split
    train, test = split(np.arange(len(labels)), test_size=0.5, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


@dataclass
class Upgrade:
    """What one seed gave.

    Args:
        embeddings: of the test images, by the name of the model or gallery. ``METHOD_query`` are a model's in the old
            space, by its backward transformation; ``METHOD_gallery`` the old model's in the independent model's space.
        milliseconds: of a step of each method's training.
        held_mib: what each method's training holds beside the network and its task loss.
    """

    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    held_mib: dict[str, float] = field(default_factory=dict)


def upgrade(
    images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    seed: int,
    progress: tqdm,
    methods: Sequence[str] = METHODS,
) -> Upgrade:
    """Train the models of some methods; each draws the same random numbers, whatever the others are."""
    found = Upgrade()
    few = torch.cat([(labels == c).nonzero()[:OLD_IMAGES_PER_CLASS, 0] for c in range(OLD_CLASSES)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        progress.set_description(f"seed {seed}: old")
        old, old_loss = network(OLD_CHANNELS, OLD_WIDTH), task_loss(OLD_CLASSES, OLD_WIDTH)
        train(old, old_loss, images[few], labels[few], OLD_EPOCHS, OLD_BATCH, progress.update)
        found.embeddings["old"] = embed(old, test_images)
        # The old model is run over the new training set once: no method needs it in its training loop.
        stored = raw_embeddings(old, images)
        centers = ClassCenters.from_embeddings(stored, labels)
        system = OldSystem(FrozenClassifier.from_loss(old_loss).extend(centers), centers, stored, labels)
        for method in (name for name in methods if name in NETWORKS):
            torch.manual_seed(seed)
            progress.set_description(f"seed {seed}: {method}")
            model, loss = _train_new(method, system, images, found, progress.update)
            found.embeddings[method] = embed(model, test_images)
            if method == "independent":
                target = embed(model, images)
            if method == "lce_backward":
                found.embeddings["lce_backward_query"] = embed(loss.backward_transformation, found.embeddings[method])
        for method in (name for name in methods if name in SERVED):
            found.milliseconds[method] = found.held_mib[method] = 0.0
        if "blended" in methods:
            blend = QueryBlend().fit(stored, target, labels, seed=seed)
            found.embeddings["blended"] = blend.query_rows(found.embeddings["old"], found.embeddings["independent"])
        side_info = None
        if "fct_side" in methods:
            torch.manual_seed(seed)
            progress.set_description(f"seed {seed}: side-information")
            side = network(SIDE_CHANNELS, SIDE_WIDTH)
            train_without_labels(side, images, SIDE_EPOCHS, SIDE_BATCH, progress.update)
            found.embeddings["side_info"], side_info = embed(side, test_images), embed(side, images)
        for method in (name for name in methods if name in MAPS):
            torch.manual_seed(seed)
            progress.set_description(f"seed {seed}: {method}")
            _map_gallery(method, embed(old, images), target, side_info if method == "fct_side" else None, found, seed)
    return found


def _train_new(
    method: str, old: OldSystem, images: torch.Tensor, found: Upgrade, after_epoch: Callable[[], Any]
) -> tuple[torch.nn.Module, Any]:
    """Train a new network; return it and its loss."""
    loss: Any
    loss, width, reads_old = NETWORKS[method](old)
    model = network(NEW_CHANNELS, width)
    epochs = 0

    def follow_the_training() -> None:
        nonlocal epochs
        epochs += 1
        after_epoch()
        if method == "unibct" and epochs in PROTOTYPE_EPOCHS:
            loss.update_prototypes(old.embeddings, raw_embeddings(model, images), old.labels)
        if method == "advbct":
            loss.old_losses["old_loss"].set_progress(epochs / NEW_EPOCHS)

    start = time.perf_counter()
    old_embeddings = old.embeddings if reads_old else None
    train(model, loss, images, old.labels, NEW_EPOCHS, NEW_BATCH, follow_the_training, old_embeddings)
    found.milliseconds[method] = 1000 * (time.perf_counter() - start) / (NEW_EPOCHS * -(-len(images) // NEW_BATCH))
    held = _mib(loss) - _mib(task_loss(CLASSES, width))
    found.held_mib[method] = held + (old.embeddings.nbytes / 2**20 if reads_old else 0)
    return model, loss


def _map_gallery(
    method: str,
    source: torch.Tensor,
    target: torch.Tensor,
    side_info: torch.Tensor | None,
    found: Upgrade,
    seed: int,
) -> None:
    """Fit FCT's transformation of the old embeddings, and apply it to those of the test images."""
    transformation = FCTTransformation(OLD_WIDTH, NEW_WIDTH, None if side_info is None else SIDE_WIDTH, FCT_HIDDEN)
    start = time.perf_counter()
    history = fit_transformation(transformation, source, target, side_info, seed=seed, progress=False)
    found.milliseconds[method] = 1000 * (time.perf_counter() - start) / history["steps"]
    found.held_mib[method] = _mib(transformation)
    stored_side_info = None if side_info is None else found.embeddings["side_info"]
    mapped = transformation.apply_to(found.embeddings["old"], stored_side_info, normalize=True, progress=False)
    found.embeddings[f"{method}_gallery"] = torch.from_numpy(mapped)


def _mib(module: torch.nn.Module) -> float:
    return sum(tensor.nbytes for tensor in module.state_dict().values()) / 2**20


def network(channels: int, width: int) -> torch.nn.Module:
    """A small convolutional network from 8 x 8 images to ``width`` numbers."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, width),
    )


def train(
    model: torch.nn.Module,
    loss_func: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[], Any] = lambda: None,
    old_embeddings: torch.Tensor | None = None,
) -> None:
    """An ordinary PML training loop; the loss's own parameters are trained with the model's.

    ``old_embeddings`` of the same images go to losses that read them.
    """
    lr = LEARNING_RATE * batch_size / 64
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=lr)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            old = {} if old_embeddings is None else {"ref_emb": old_embeddings[index]}
            loss_func(model(images[index]), labels[index], **old).backward()
            optimizer.step()
            schedule.step()
        after_epoch()


def train_without_labels(
    model: torch.nn.Module,
    images: torch.Tensor,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[], Any] = lambda: None,
) -> None:
    """SimCLR by PML's own loss: two random views of an image are one class, and every other image is another."""
    loss_func = SelfSupervisedLoss(NTXentLoss(temperature=SIDE_TEMPERATURE))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss_func(model(augment(images[index])), model(augment(images[index]))).backward()
            optimizer.step()
            schedule.step()
        after_epoch()


def augment(images: torch.Tensor) -> torch.Tensor:
    """Turn, shear, scale, shift and brighten each image at random, and add noise."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    turn, shear, scale = uniform(-0.25, 0.25), uniform(-0.15, 0.15), uniform(0.9, 1.1)
    matrix = torch.stack(
        [scale * turn.cos(), -scale * turn.sin() + shear, scale * turn.sin(), scale * turn.cos()], dim=1
    )
    affine = torch.cat([matrix.reshape(n, 2, 2), uniform(-0.25, 0.25, 2, 1)], dim=2)
    grid = torch.nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    return moved * uniform(0.7, 1.3, 1, 1, 1) + 0.1 * torch.randn_like(moved)


@torch.no_grad()
def raw_embeddings(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return embeddings as the model gives them."""
    return model.eval()(images)


def embed(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return unit-length embeddings."""
    return torch.nn.functional.normalize(raw_embeddings(model, images), dim=1)
