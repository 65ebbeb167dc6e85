"""What the comparison is run with: on a CPU in an afternoon or in days, on a GPU in minutes, or as the papers did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from networks import resnet8, resnet18, resnet50


@dataclass(frozen=True)
class Profile:
    """Settings of every training; the learning rate rises for a fifth of the steps and then falls to zero.

    Args:
        network: builds a model, old and new alike.
        size: what images are enlarged to; None leaves their 32 pixels.
        epochs: of every model.
        side_epochs: of the side-information's network, over the old training images, without labels.
        batch_size: images a step.
        lr: of SGD with momentum 0.9 and Nesterov's step.
        weight_decay: of every parameter.
        bfloat16: whether networks run in bfloat16, or in float32; None: in the one that is faster here.
        flip: whether half of the training images are mirrored.
        fct_mixtures: mixtures of images beside each image, for the methods that train a map on these too.
    """

    network: Callable[[], torch.nn.Module]
    size: int | None
    epochs: int
    side_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    bfloat16: bool | None = None
    flip: bool = True
    fct_mixtures: int = 3


PROFILES = {
    "cpu": Profile(resnet8, None, 6, side_epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4),
    "cpu-long": Profile(resnet8, None, 30, side_epochs=60, batch_size=128, lr=0.1, weight_decay=5e-4),
    "gpu": Profile(resnet18, None, 30, side_epochs=100, batch_size=256, lr=0.2, weight_decay=5e-4),
    "paper": Profile(resnet50, 224, 100, side_epochs=200, batch_size=1024, lr=1.024, weight_decay=2**-15),
}
