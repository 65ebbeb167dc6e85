"""One row a class, out of any PML loss that has classes."""

from __future__ import annotations

import torch

from .._host import losses as pml_losses


def class_weights(loss: torch.nn.Module) -> torch.Tensor:
    r"""Return a PML classification or proxy loss's class weights, one row a class.

    PML keeps them in three layouts; here they have one. The rows keep the graph, so a loss on them trains the
    original parameter, and they keep their lengths (most of these losses use only the directions).

    =============================================================  ==================  ============================
    loss                                                           parameter           row of a class
    =============================================================  ==================  ============================
    ArcFace, CosFace, LargeMarginSoftmax, SphereFace,              ``W (D, C)``        its column
    NormalizedSoftmax
    P2SGrad                                                        ``weight (D, C)``   its column
    ProxyAnchor, ProxyNCA                                          ``proxies (C, D)``  its row
    SubCenterArcFace                                               ``W (D, C K)``      mean of its K unit columns
    SoftTriple                                                     ``fc (D, C K)``     mean of its K unit columns
    =============================================================  ==================  ============================

    The mean of unit columns is our choice, no paper defines one row for several centres: it is the direction that
    the class's centres share, and its length, at most 1, falls as they spread.

    Args:
        loss: one of the losses above or of their subclasses, or a wrapper with it in ``.loss``
            (``BCTLoss``, ``DistributedLossWrapper``).
    Shape:
        - output: ``(C, D)``
    Raises:
        ValueError: the loss has no class weights.
    Example:
        >>> class_weights(pml_losses.ArcFaceLoss(num_classes=10, embedding_size=4)).shape
        torch.Size([10, 4])
    """
    loss = unwrap_loss(loss)
    centers_per_class = sub_centers_of(loss)
    if isinstance(loss, pml_losses.SoftTripleLoss):
        return _mean_direction(loss.fc.t(), centers_per_class)
    if isinstance(loss, pml_losses.SubCenterArcFaceLoss):
        return _mean_direction(loss.W.t(), centers_per_class)
    return all_centers(loss)


def all_centers(loss: torch.nn.Module) -> torch.Tensor:
    """Return every centre of an unwrapped loss, ``(C * K, D)``; the K of one class stand together."""
    if isinstance(loss, pml_losses.LargeMarginSoftmaxLoss | pml_losses.NormalizedSoftmaxLoss):
        return loss.W.t()  # ArcFace, CosFace, SphereFace and SubCenterArcFace are LargeMarginSoftmaxLosses
    if isinstance(loss, pml_losses.ProxyAnchorLoss | pml_losses.ProxyNCALoss):
        return loss.proxies
    if isinstance(loss, pml_losses.SoftTripleLoss):
        return loss.fc.t()
    if isinstance(loss, pml_losses.P2SGradLoss):
        return loss.weight.t()
    raise ValueError(
        f"loss must have one weight vector a class, {type(loss).__name__} has none; "
        "build the classifier from class centres instead: FrozenClassifier.from_centers(ClassCenters.from_embeddings("
        "old_embeddings, labels)), or from your own matrix: FrozenClassifier(weight)"
    )


def class_weight_parameter(loss: torch.nn.Module) -> tuple[torch.Tensor, int]:
    """Return the parameter that holds a loss's class weights, as it lies there, and its dimension of classes."""
    rows = all_centers(unwrap_loss(loss))
    return (rows, 0) if rows._base is None else (rows._base, 1)


def sub_centers_of(loss: torch.nn.Module) -> int:
    """Return how many centres an unwrapped loss keeps for each class."""
    return int(getattr(loss, "sub_centers", getattr(loss, "centers_per_class", 1)))


def unwrap_loss(loss: torch.nn.Module) -> torch.nn.Module:
    """Follow ``.loss`` to the innermost loss."""
    while isinstance(inner := getattr(loss, "loss", None), torch.nn.Module):
        loss = inner
    return loss


def _mean_direction(centers: torch.Tensor, centers_per_class: int) -> torch.Tensor:
    return torch.nn.functional.normalize(centers, dim=1).unflatten(0, (-1, centers_per_class)).mean(1)
