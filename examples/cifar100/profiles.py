"""What the comparison is run with: on a CPU in an afternoon, on a GPU in minutes, or as the papers did."""

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
        bfloat16: whether networks run in bfloat16, or in float32, which is faster on processors without it.
        flip: whether half of the training images are mirrored.
        temperature: of the task loss, a softmax over cosines.
        fct_epochs: of FCT's transformation.
        fct_hidden: its hidden features.
        fct_lr: its learning rate.
        fct_squared: train it by the squared error of unit-length embeddings, in place of their cosine.
        fct_contrast: weight of FCT's contrast by labels, and
        fct_temperature: its temperature, of cosines.
        fct_instance: weight of FCT's contrast in which each embedding has to find its own image's alone, and
        fct_instance_temperature: its temperature.
        fct_mixtures: mixtures of images beside each image, for the methods that train a map on these too.
    """

    network: Callable[[], torch.nn.Module]
    size: int | None
    epochs: int
    side_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    bfloat16: bool = True
    flip: bool = True
    temperature: float = 1 / 16
    fct_epochs: int = 80
    fct_hidden: int = 2048
    fct_lr: float = 2e-3
    fct_squared: bool = False
    fct_contrast: float = 0.3
    fct_temperature: float = 0.02
    fct_instance: float = 1.0
    fct_instance_temperature: float = 0.05
    fct_mixtures: int = 3


PROFILES = {
    "cpu": Profile(
        resnet8, None, 6, side_epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4, fct_epochs=30, fct_hidden=512
    ),
    "gpu": Profile(resnet18, None, 30, side_epochs=100, batch_size=256, lr=0.2, weight_decay=5e-4),
    "paper": Profile(resnet50, 224, 100, side_epochs=200, batch_size=1024, lr=1.024, weight_decay=2**-15),
}

# Multipliers of the methods' terms, chosen by search.py with the cpu profile; those that it does not vary are the
# demo's, from benchmarks/method_weights.py, but for lce_backward.
WEIGHTS = {
    "pseudo_scale": 16.0,
    "supcon_temperature": 0.1,
    "bct": 10.0,
    "bct_beside_cross_model": 3.0,
    "unibct": 10.0,
    "lce": 10000.0,
    "lce_beside_cross_model": 1000.0,
    "lce_backward": 1000.0,
    "cross_model": 3.0,
    "ract": 1.0,
    "ract_temperature": 0.1,
    "point_alignment": 10.0,
    "lwf": 3.0,
    "focal_distillation": 100.0,
    "nccl": 3.0,
    "nccl_temperature": 0.1,
    "advbct": 1.0,
    "head_point": 10.0,
    "head_contrast": 5.0,
    "head_shrinkage": 0.1,
    "head_trunk_gradient": 0.1,
}
