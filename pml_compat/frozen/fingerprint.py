"""A name for a model's weights, so that embeddings are not mixed with those of another model."""

from __future__ import annotations

import hashlib

import torch

from .model import FrozenModel


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return 16 hex digits that name a model's weights: sha256 over the names and values of its ``state_dict``.

    The same on every device, and for a :class:`FrozenModel` and the network in it. It does not cover the code of
    ``forward`` nor how inputs and outputs are scaled. DistributedDataParallel and torch.compile rename the weights:
    give the network inside.

    Args:
        model: any module with at least one parameter or buffer.
    Raises:
        ValueError: no module, or one without weights.
    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> model_fingerprint(model) == model_fingerprint(FrozenModel(model))
        True
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tensors = _weights(model.model if isinstance(model, FrozenModel) else model, "")
    if not tensors:
        raise ValueError(f"model must have parameters or buffers, this {type(model).__name__} has none")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _weights(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {k: v for k, v in model.state_dict(prefix=prefix).items() if isinstance(v, torch.Tensor)}
    for name, module in model.named_modules():
        if isinstance(module, FrozenModel):  # its weights are in no state_dict but its own network's
            tensors |= _weights(module.model, f"{prefix}{name}.model.")
    return tensors
