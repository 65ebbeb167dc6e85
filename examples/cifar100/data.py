"""CIFAR-100 in memory: from torchvision, or from a folder of one picture a class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pml_compat.data import open_classes
from pml_compat.data.splits import UpgradeSplit

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# ImageFolder sorts folders named "0" to "99" as strings: the published "first 50 classes" are these fine labels.
LEXICOGRAPHIC = [*range(6), *range(10, 54)]
SPLITS = {"lexicographic": LEXICOGRAPHIC, "numeric": list(range(50))}
# Classes that settings are chosen on: never among the open test classes, whatever the seed.
SEARCH_CLASSES = [12, 19, 22, 35, 44, 47, 56, 58, 59, 63, 67, 68, 75, 85, 96, 97]


@dataclass
class Images:
    """``(N, 3, 32, 32)`` uint8 images and ``(N,)`` fine labels."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Images:
        return Images(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        """Return them on a device."""
        return Images(self.images.to(device), self.labels.to(device))


def load(folder: Path, part: str) -> Images:
    """Return the 50,000 images of ``train`` or the 10,000 of ``test``; torchvision downloads what is not there."""
    if (folder / part).is_dir():
        return _read_strips(folder / part)
    from torchvision.datasets import CIFAR100

    found = CIFAR100(folder, train=part == "train", download=True)
    return Images(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))


def _read_strips(folder: Path) -> Images:
    """Read one lossless strip a class, images 32 pixels high below each other; classes in the order of their names."""
    from PIL import Image

    strips = [np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3) for path in sorted(folder.iterdir())]
    labels = np.repeat(np.arange(len(strips)), [len(strip) for strip in strips])
    return Images(torch.from_numpy(np.concatenate(strips)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


@dataclass
class Upgrade:
    """What an upgrade is measured on.

    Args:
        train: the new model's images; labels count its classes from 0.
        old_classes: sorted labels of ``train`` that the old model is trained on.
        test: queries and gallery.
        calibration: images of the training classes that no model is trained on, for mixed galleries; None where there
            are none.
    """

    train: Images
    old_classes: torch.Tensor
    test: Images
    calibration: Images | None = None


def open_upgrade(train: Images, test: Images, split: UpgradeSplit) -> Upgrade:
    """Return the upgrade of a split of classes: what is tested are all images of classes that no model learns."""

    def learned(part: Images) -> Images:
        rows = torch.isin(part.labels, split.new_classes)
        return Images(part.images[rows], torch.searchsorted(split.new_classes, part.labels[rows]))

    unseen = [part[torch.isin(part.labels, split.test_classes)] for part in (train, test)]
    found = Images(torch.cat([part.images for part in unseen]), torch.cat([part.labels for part in unseen]))
    return Upgrade(learned(train), torch.searchsorted(split.new_classes, split.old_classes), found, learned(test))


def open_split(labels: torch.Tensor, seed: int) -> UpgradeSplit:
    """Draw 20 test classes that no model learns, and of the 80 that the new one learns 40 for the old one."""
    others = torch.tensor([label for label in range(100) if label not in SEARCH_CLASSES])
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    test, rest = drawn[:20].tolist(), sorted([*drawn[20:].tolist(), *SEARCH_CLASSES])
    return open_classes(labels, old_classes=40, new_classes=rest, test_classes=test, seed=seed)


def search_split(labels: torch.Tensor) -> UpgradeSplit:
    """Return the split that open-set settings are chosen on."""
    others = [label for label in range(100) if label not in SEARCH_CLASSES]
    drawn = torch.tensor(others)[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))][:64].tolist()
    return open_classes(labels, old_classes=32, new_classes=sorted(drawn), test_classes=SEARCH_CLASSES, seed=0)


def hold_out(part: Images, per_class: int, seed: int) -> tuple[Images, Images]:
    """Split off ``per_class`` images of every class, to choose settings on: never on the test images."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(part.labels[order], stable=True)]
    place = torch.cat([torch.arange(int(count)) for count in torch.bincount(part.labels)])
    return part[order[place >= per_class]], part[order[place < per_class]]


def augment(images: torch.Tensor, flip: bool = True) -> torch.Tensor:
    """Shift each image by up to 4 pixels and flip half of them, or none."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="constant", value=120)
    rows = torch.randint(9, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    columns = torch.randint(9, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    if flip:
        columns = torch.where(torch.rand(n, 1, device=images.device) < 0.5, columns, columns.flip(1))
    batch = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop(images: torch.Tensor, flip: bool = True) -> torch.Tensor:
    """Enlarge a part of each image, a quarter to all of its area and up to a third longer one way, and flip half."""
    n, device = len(images), images.device
    area = torch.empty(n, device=device).uniform_(0.25, 1)
    ratio = torch.empty(n, device=device).uniform_(-math.log(4 / 3), math.log(4 / 3)).exp()
    size = torch.stack([area * ratio, area / ratio], dim=1).sqrt().clamp(max=1)  # of the whole image's width, height
    center = (1 - size) * torch.empty(n, 2, device=device).uniform_(-1, 1)
    maps = torch.cat([torch.diag_embed(size), center[:, :, None]], dim=2)
    if flip:
        maps[:, 0, 0] *= 2 * torch.randint(2, (n,), device=device) - 1
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def mix(images: torch.Tensor) -> torch.Tensor:
    """Return mixtures of each image and another: of no class, but a model can be asked about them all the same."""
    others = images[torch.randperm(len(images), device=images.device)]
    share = 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1, device=images.device)
    return share * images + (1 - share) * others


def scaled(images: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Return what a network takes: channels of zero mean and unit deviation, enlarged to ``size`` if that is given."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] * 255 for values in (MEAN, STD))
    values = (images.float() - mean) / std
    if size is not None:
        values = torch.nn.functional.interpolate(values, size=size, mode="bilinear", antialias=True)
    return values.contiguous(memory_format=torch.channels_last)
