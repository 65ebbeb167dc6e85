"""How long class weights start, which says how fast they turn."""

from __future__ import annotations

import torch

from .._checks import check_number
from ..frozen.heads import rescale_class_weights_

CLASS_WEIGHT_LENGTH = 1.0


def shorten_class_weights(loss: torch.nn.Module, length: float = CLASS_WEIGHT_LENGTH) -> torch.nn.Module:
    """Give the class weights of a PML loss one length, in place, where it reads their directions alone; return it.

    PML draws their entries from N(0, 1), so they are sqrt(d) long, and the longer a class weight is, the slower it
    turns. Much shorter ones overshoot under SGD at the large scale of PML's margin losses. Every loss of this package
    that wraps a task loss shortens its class weights. Train the model that they are compared with, the independent one,
    from short class weights too.

    Args:
        loss: any PML loss, or a loss that wraps one; those without class weights, whose class weights' lengths count
            (``LargeMarginSoftmaxLoss``) or that regularise them are left as they are.
        length: above 0.
    Raises:
        ValueError: ``length`` is not above 0.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> loss_func = shorten_class_weights(ArcFaceLoss(num_classes=10, embedding_size=16))
        >>> loss_func.W.norm(dim=0).max().round(decimals=4).item()
        1.0
    """
    rescale_class_weights_(loss, check_class_weight_length(length))
    return loss


def check_class_weight_length(length: float) -> float:
    """Return ``length``; raise a ValueError where it is not above 0."""
    return check_number(length, "class_weight_length", minimum=0, exclusive=True)
