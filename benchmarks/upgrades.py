"""The upgrades that methods are measured on by ``defaults.py``: data, networks and trainings, each as a user's script.

Small on purpose: two CPU cores train all of them in an afternoon. Settings are chosen with ``held_out=True``, where the
test images are taken from the training set, and on seeds that are not reported.
"""

from __future__ import annotations

import dataclasses
import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path += [str(EXAMPLES / "cifar100"), str(EXAMPLES / "open_set")]

import data as cifar  # noqa: E402
from networks import resnet8  # noqa: E402
from training import bfloat16_is_faster, info_nce, recolor  # noqa: E402

from pml_compat.data import open_classes  # noqa: E402


@dataclass
class Problem:
    """What one upgrade has to learn and is tested on; images as the network takes them, or uint8.

    Args:
        images: of the new training set.
        labels: ``(N,)``, from 0.
        old_rows: rows of it that the old model is trained on.
        test_images: queries and gallery, each left out of its own ranking.
        test_labels: of the test images; in an open protocol they are of classes that no model learns.
    """

    images: torch.Tensor
    labels: torch.Tensor
    old_rows: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @property
    def classes(self) -> int:
        """How many classes the new model learns."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Protocol:
    """One kind of upgrade.

    Args:
        problem: called with a seed and whether to test on held-out training images.
        trunk: builds the network but for its last layer.
        features: what the trunk gives.
        width: of the embeddings; the last layer is linear, or none where ``features`` are the embeddings.
        epochs: of every training.
        batch_size: images a step.
        optimizer: ``"adam"`` or ``"sgd"``.
        lr: of the network.
        loss_lr: of the loss's own parameters.
        augment: of a batch of training images.
        one_cycle: whether the learning rate rises and falls to 0; it is constant otherwise.
        bfloat16: whether the network runs in bfloat16, where that is faster.
        open: whether the test classes are nobody's.
    """

    problem: Callable[[int, bool], Problem]
    trunk: Callable[[], torch.nn.Module]
    features: int
    width: int
    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    loss_lr: float = 1e-3
    old_epochs: int | None = None
    augment: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda images: images)
    one_cycle: bool = False
    bfloat16: bool = False
    open: bool = False

    def network(self, last: torch.nn.Module | None = None) -> torch.nn.Module:
        """Return trunk and last layer; a layer of the caller's own where one is given."""
        return torch.nn.Sequential(self.trunk(), self.last_layer() if last is None else last)

    def last_layer(self) -> torch.nn.Module:
        """Return the layer from features to embeddings."""
        return torch.nn.Identity() if self.features == self.width else torch.nn.Linear(self.features, self.width)

    def embed_batch(self, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Return float32 embeddings."""
        if images.ndim == 4 and images.shape[1] == 3:
            images = cifar.scaled(images, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 and bfloat16_is_faster("cpu")):
            return model(images).float()

    @torch.no_grad()
    def embed(self, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings in eval mode, as the model gives them."""
        model.eval()
        return torch.cat([self.embed_batch(model, part) for part in images.split(1000)])

    def train(
        self,
        model: torch.nn.Module,
        loss_func: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        stored: torch.Tensor | None = None,
        old_model: torch.nn.Module | None = None,
        after_epoch: Callable[[int], Any] = lambda epoch: None,
        epochs: int | None = None,
    ) -> None:
        """Train a model and its loss; the loss gets stored old embeddings, or the old model's of the same views."""
        groups = [{"params": list(model.parameters()), "lr": self.lr}]
        if own := list(loss_func.parameters()):
            groups.append({"params": own, "lr": self.loss_lr})
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(groups)
        else:
            momentum = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} if self.one_cycle else {}
            optimizer = torch.optim.SGD(groups, self.lr, **momentum)
        epochs = epochs or self.epochs
        steps = max(1, len(images) // self.batch_size)
        schedule = None
        if self.one_cycle:
            rates = [group["lr"] for group in groups]
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * steps, pct_start=0.2)
        for epoch in range(epochs):
            model.train()
            for index in torch.randperm(len(images)).tensor_split(steps):
                views = self.augment(images[index])
                embeddings = self.embed_batch(model, views)
                references = {}
                if stored is not None:
                    references["ref_emb"] = stored[index]
                elif old_model is not None:
                    with torch.no_grad():
                        references["ref_emb"] = self.embed_batch(old_model, views)
                loss = loss_func(embeddings, labels[index], **references)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            after_epoch(epoch + 1)
        model.eval()


def _mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU())


def _small_conv() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 49, 128),
        torch.nn.ReLU(),
    )


def _digits(seed: int, held_out: bool) -> Problem:
    """Half of the digits to learn, half to search; the old model has 20 images each of 0 to 4."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.5, stratify=labels.numpy(), random_state=seed)
    if held_out:
        train, test = train_test_split(train, test_size=0.4, stratify=labels.numpy()[train], random_state=seed)
    x, y = images[train], labels[train]
    few = torch.cat([(y == label).nonzero()[:20, 0] for label in range(5)])
    return Problem(x, y, few, images[test], labels[test])


@cache
def _fashion_part(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        raise FileNotFoundError("Fashion-MNIST is not there; on Debian: apt-get install dataset-fashion-mnist")
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels.astype(np.int64))


def _fashion(seed: int, held_out: bool, share: float | None) -> Problem:
    """12,000 images to learn, 5,000 to search; the old model has classes 0 to 4, or a share of the images."""
    images, labels = _fashion_part("train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:12000], order[12000:17000]
    x, y = images[train], labels[train]
    old = (y < 5).nonzero()[:, 0] if share is None else torch.arange(int(share * len(x)))
    if held_out:
        return Problem(x, y, old, images[test], labels[test])
    images, labels = _fashion_part("t10k")
    test = torch.randperm(len(images), generator=generator)[:5000]
    return Problem(x, y, old, images[test], labels[test])


@cache
def _cifar(part: str) -> cifar.Images:
    return cifar.load(DATA["cifar"], part)


def _cifar_closed(seed: int, held_out: bool) -> Problem:
    """50 old classes of 100, in the published order; all test images are searched."""
    train, test = (_cifar("train"), None) if held_out else (_cifar("train"), _cifar("test"))
    if test is None:
        train, test = cifar.hold_out(train, 50, seed)
    old = torch.isin(train.labels, torch.tensor(cifar.LEXICOGRAPHIC)).nonzero()[:, 0]
    return Problem(train.images, train.labels, old, test.images, test.labels)


def _cifar_open(seed: int, held_out: bool) -> Problem:
    """40 old classes of 80; the 20 others are searched. Held out: 32 of 64, and 16 others."""
    train, test = _cifar("train"), _cifar("test")
    split = cifar.search_split(train.labels) if held_out else cifar.open_split(train.labels, seed)
    upgrade = cifar.open_upgrade(train, test, split)
    old = torch.isin(upgrade.train.labels, upgrade.old_classes).nonzero()[:, 0]
    return Problem(upgrade.train.images, upgrade.train.labels, old, upgrade.test.images, upgrade.test.labels)


def _fashion_open(seed: int, held_out: bool) -> Problem:
    """Four classes are old, seven are new, and the other three are searched: 12,000 images to learn, 3,000 to search.

    So few classes say little of others: what holds new queries to them loses.
    """
    images, labels = _fashion_part("train")
    generator = torch.Generator().manual_seed(seed + 1000 * held_out)
    classes = torch.randperm(10, generator=generator)
    place = torch.empty_like(classes)
    place[classes] = torch.arange(10)
    order = torch.randperm(len(images), generator=generator)
    train, test = (order[mask[order]] for mask in (place[labels] < 7, place[labels] >= 7))
    if not held_out:
        test_images, test_labels = _fashion_part("t10k")
        test = (place[test_labels] >= 7).nonzero()[:, 0]
    else:
        test_images, test_labels, test = images, labels, test[:3000]
    y = place[labels[train[:12000]]]
    return Problem(images[train[:12000]], y, (y < 4).nonzero()[:, 0], test_images[test], test_labels[test])


@cache
def _glyphs() -> Any:
    from glyphs import load_glyphs

    return load_glyphs((DATA["fonts"],))


def _fonts(seed: int, held_out: bool) -> Problem:
    """A tenth of the characters is old, four fifths are new, a fifth is searched, each in a hundred fonts and more."""
    glyphs = _glyphs()
    images = cifar.Images(glyphs.images.expand(-1, 3, -1, -1), glyphs.labels)
    apart = glyphs.font % 10 == 0
    split = open_classes(glyphs.labels, old_classes=0.1, seed=seed + 1000 * held_out)
    upgrade = cifar.open_upgrade(images[~apart], images[apart], split)
    old = torch.isin(upgrade.train.labels, upgrade.old_classes).nonzero()[:, 0]
    return Problem(upgrade.train.images, upgrade.train.labels, old, upgrade.test.images, upgrade.test.labels)


DATA = {"cifar": Path("data/cifar100"), "fonts": Path("/usr/share/fonts")}

_CIFAR: dict[str, Any] = {
    "trunk": resnet8,
    "features": 128,
    "width": 128,
    "epochs": 6,
    "optimizer": "sgd",
    "lr": 0.1,
    "loss_lr": 0.1,
    "augment": cifar.augment,
    "one_cycle": True,
    "bfloat16": True,
}
_DIGITS: dict[str, Any] = {"problem": _digits, "trunk": _mlp, "features": 128, "width": 32, "epochs": 60}
_FASHION: dict[str, Any] = {"trunk": _small_conv, "features": 128, "width": 64, "epochs": 4, "loss_lr": 1e-2}

PROTOCOLS = {
    "digits": Protocol(**_DIGITS),
    "digits_sgd": Protocol(**_DIGITS, optimizer="sgd", lr=0.1, loss_lr=0.1),
    "fashion_classes": Protocol(lambda seed, held_out: _fashion(seed, held_out, None), **_FASHION),
    "fashion_images": Protocol(lambda seed, held_out: _fashion(seed, held_out, 0.2), **_FASHION),
    "fashion_open": Protocol(_fashion_open, **_FASHION, open=True),
    "cifar_closed": Protocol(_cifar_closed, **_CIFAR),
    "cifar_open": Protocol(_cifar_open, **_CIFAR, open=True),
    "fonts": Protocol(_fonts, **{**_CIFAR, "augment": lambda images: cifar.augment(images, flip=False)}, open=True),
}


def train_without_labels(protocol: Protocol, network: torch.nn.Module, images: torch.Tensor) -> None:
    """Train a network for side-information: SimCLR, as long as the models that learn from labels."""

    def loss_of(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return info_nce(embeddings)

    views = SideViews(protocol)
    protocol = dataclasses.replace(protocol, augment=views, batch_size=protocol.batch_size)
    protocol.train(network, _Function(loss_of), images, torch.zeros(len(images), dtype=torch.long))


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.function(*arguments)


@dataclass(frozen=True)
class SideViews:
    """Two random views of each image, one below the other."""

    protocol: Protocol

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the views, twice as many as the images."""
        if images.ndim == 4 and images.dtype == torch.uint8:
            return torch.cat([recolor(cifar.crop(images, flip=True)) for _ in range(2)])
        return torch.cat([_noisy(images) for _ in range(2)])


def _noisy(images: torch.Tensor) -> torch.Tensor:
    """Shift a grey image by a tenth of its size, brighten it and add noise."""
    square = images if images.ndim == 4 else images.view(-1, 1, 8, 8)
    n = len(square)
    shift = torch.empty(n, 2, 1).uniform_(-0.2, 0.2)
    turn = torch.empty(n).uniform_(-0.25, 0.25)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(n, 2, 2)
    grid = torch.nn.functional.affine_grid(torch.cat([rotation, shift], 2), list(square.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(square, grid, align_corners=False)
    moved = moved * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3) + 0.1 * torch.randn_like(moved)
    return moved.view_as(images)
