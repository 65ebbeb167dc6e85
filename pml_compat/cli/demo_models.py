"""The models of the demo, and the settings they are trained with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, NTXentLoss, SelfSupervisedLoss
from tqdm import tqdm

from ..extras import import_extra
from ..frozen import ClassCenters, FrozenClassifier
from ..losses import BCTLoss, LCELoss
from ..transformations import FCTTransformation, OrthogonalTransformation, fit_transformation

# Chosen on seeds 10 to 19; the results are those of seeds 0 to 4.
OLD_CLASSES, OLD_IMAGES_PER_CLASS = 5, 20
OLD_CHANNELS, OLD_WIDTH, OLD_EPOCHS, OLD_BATCH = 8, 32, 30, 64
NEW_CHANNELS, NEW_WIDTH, NEW_EPOCHS, NEW_BATCH = 32, 64, 40, 128
LEARNING_RATE = 2e-3  # of batches of 64
TEMPERATURE = 0.25  # soft enough that the influence goes on shaping classes it already tells apart
INFLUENCE_WEIGHT = 3.0
SIDE_CHANNELS, SIDE_WIDTH, SIDE_EPOCHS, SIDE_BATCH, SIDE_TEMPERATURE = 16, 32, 10, 32, 0.2
FCT_HIDDEN, FCT_EPOCHS, FCT_BATCH, FCT_LEARNING_RATE = 512, 40, 128, 1e-3
NEW_METHODS = ("independent", "bct", "lce", "lce_backward")  # a network each
METHODS = (*NEW_METHODS, "fct", "fct_side")


def count_epochs() -> int:
    """Return the epochs that one seed takes, for a progress bar."""
    return OLD_EPOCHS + len(NEW_METHODS) * NEW_EPOCHS + SIDE_EPOCHS


def split_in_half(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of a training and a test half, with the same share of every class."""
    split = import_extra("sklearn.model_selection", "demo").train_test_split
    train, test = split(np.arange(len(labels)), test_size=0.5, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def upgrade(
    images: torch.Tensor, labels: torch.Tensor, test_images: torch.Tensor, seed: int, progress: tqdm
) -> dict[str, torch.Tensor]:
    """Train every model; return each one's embeddings of ``test_images``, by its name.

    ``lce_backward_query`` are those of ``lce_backward`` in the old space, by its backward transformation;
    ``fct_gallery`` and ``fct_side_gallery`` those of ``old`` in the independent model's space, by theirs.
    """

    def step() -> None:
        progress.update()

    def fit(name: str, loss: torch.nn.Module, width: int) -> torch.nn.Module:
        progress.set_description(f"seed {seed}: {name}")
        model = network(NEW_CHANNELS, width)
        train(model, loss, images, labels, NEW_EPOCHS, NEW_BATCH, step)
        return model

    few = torch.cat([(labels == c).nonzero()[:OLD_IMAGES_PER_CLASS, 0] for c in range(OLD_CLASSES)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        progress.set_description(f"seed {seed}: old")
        old, old_loss = network(OLD_CHANNELS, OLD_WIDTH), task_loss(OLD_CLASSES, OLD_WIDTH)
        train(old, old_loss, images[few], labels[few], OLD_EPOCHS, OLD_BATCH, step)
        independent = fit("independent", task_loss(10, NEW_WIDTH), NEW_WIDTH)

        # The old model, run over the new training set: a centre for every digit, also for those it never saw.
        centers = ClassCenters.from_embeddings(embed(old, images), labels)
        # BCT: the old classifier, with pseudo rows for the new digits, judges the new model too.
        old_classifier = FrozenClassifier.from_loss(old_loss).extend(centers)
        bct = fit("bct", BCTLoss(task_loss(10, NEW_WIDTH), old_classifier, INFLUENCE_WEIGHT), NEW_WIDTH)
        # LCE: the new classes lie where the old ones lie; directly, or after a map from new to old space.
        lce = fit("lce", LCELoss(task_loss(10, OLD_WIDTH), centers), OLD_WIDTH)
        to_old = OrthogonalTransformation(NEW_WIDTH, OLD_WIDTH)
        lce_loss = LCELoss(task_loss(10, NEW_WIDTH), centers, backward_transformation=to_old)
        lce_backward = fit("lce_backward", lce_loss, NEW_WIDTH)

        # FCT: side-information made beside the old model, and a map from what was stored into the new space.
        progress.set_description(f"seed {seed}: side-information")
        side = network(SIDE_CHANNELS, SIDE_WIDTH)
        train_without_labels(side, images, SIDE_EPOCHS, SIDE_BATCH, step)
        fct = {
            "fct": FCTTransformation(OLD_WIDTH, NEW_WIDTH, None, FCT_HIDDEN),
            "fct_side": FCTTransformation(OLD_WIDTH, NEW_WIDTH, SIDE_WIDTH, FCT_HIDDEN),
        }
    stored = {name: (embed(old, part), embed(side, part)) for name, part in (("train", images), ("test", test_images))}
    models = {"old": old, "independent": independent, "bct": bct, "lce": lce, "lce_backward": lce_backward}
    embeddings = {name: embed(model, test_images) for name, model in models.items()}
    embeddings["lce_backward_query"] = embed(to_old, embeddings["lce_backward"])
    embeddings["side_info"] = stored["test"][1]
    for name, transformation in fct.items():
        progress.set_description(f"seed {seed}: {name}")
        source, side_info = stored["train"]
        fit_transformation(
            transformation,
            source,
            embed(independent, images),
            side_info if transformation.side_features else None,
            epochs=FCT_EPOCHS,
            batch_size=FCT_BATCH,
            lr=FCT_LEARNING_RATE,
            seed=seed,
            progress=False,
        )
        source, side_info = stored["test"]
        mapped = transformation.apply_to(
            source, side_info if transformation.side_features else None, normalize=True, progress=False
        )
        embeddings[f"{name}_gallery"] = torch.from_numpy(mapped)
    return embeddings


def task_loss(classes: int, width: int) -> NormalizedSoftmaxLoss:
    """The loss of every model that learns from labels."""
    return NormalizedSoftmaxLoss(classes, width, temperature=TEMPERATURE)


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
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """An ordinary PML training loop; the loss's own parameters are trained with the model's."""
    lr = LEARNING_RATE * batch_size / 64
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=lr)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
        after_epoch()


def train_without_labels(
    model: torch.nn.Module,
    images: torch.Tensor,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[], None] = lambda: None,
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
def embed(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return unit-length embeddings."""
    return torch.nn.functional.normalize(model.eval()(images), dim=1)
