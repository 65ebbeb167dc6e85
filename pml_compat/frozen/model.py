"""The old network, held still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FrozenModel(torch.nn.Module):
    """An old network that is only ever looked through: never trained, never optimised, not saved twice.

    It can sit inside anything: a loss, a trainer's ``models``, another module. ``.train()`` on the holder leaves
    it in eval mode, ``.to()`` and ``.half()`` reach it, ``parameters()`` does not list it and no gradient flows.

    Args:
        model: the old network; ``(N, ...) -> (N, D)``. It is held, not copied: to start the new model from the old
            weights, train ``copy.deepcopy(model)``.
        normalize: scale each embedding to length 1.
        save: put the network's tensors into ``state_dict()``; by default the old checkpoint stays the only copy.
    Shape:
        - input: whatever ``model`` takes
        - output: ``(N, D)``, without a gradient
    Raises:
        ValueError: ``model`` is no module, or does not return an ``(N, D)`` tensor.
        RuntimeError: parameters or buffers (BatchNorm's) of the network were changed in place between two calls, so it
            is not the old one any more. What is changed past autograd, by ``.data`` or under ``inference_mode``, is not
            noticed: compare :func:`~pml_compat.frozen.model_fingerprint` where that has to be ruled out.
    Example:
        >>> old = FrozenModel(torch.nn.Linear(4, 2))
        >>> old(torch.ones(3, 4)).shape, list(old.parameters()), old.train().model.training
        (torch.Size([3, 2]), [], False)
    """

    model: torch.nn.Module

    def __init__(self, model: torch.nn.Module, *, normalize: bool = False, save: bool = False) -> None:
        super().__init__()
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.normalize = normalize
        self.save = save
        # Past nn.Module's registration, so that parameters(), train() and state_dict() do not find it.
        self.__dict__["model"] = model
        self._versions: int | None = None
        model.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the ``(N, D)`` embeddings of the old network, in eval mode and without a gradient."""
        self._check_unchanged()
        self.model.eval()
        embeddings = self.model(*args, **kwargs)
        self._versions = self._count_versions()  # a network may count its own calls
        if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 2:
            got = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
            raise ValueError(f"model must return a tensor of shape (N, D), got {got}; wrap what picks the embedding")
        return torch.nn.functional.normalize(embeddings, dim=1) if self.normalize else embeddings

    def _check_unchanged(self) -> None:
        """Every in-place update of a tensor raises its version: an optimiser that got hold of us shows here."""
        versions = self._count_versions()
        if self._versions not in (None, versions):
            raise RuntimeError(
                "FrozenModel: the old model's buffers or parameters changed since its last call; is it being trained "
                "as the new model? Train copy.deepcopy(model), or load weights before the first call"
            )
        self._versions = versions

    def _count_versions(self) -> int:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(int(tensor._version) for tensor in tensors if not tensor.is_inference())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenModel:
        super()._apply(fn, recurse)
        self.model._apply(fn)
        self._versions = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.save:
            self.model.state_dict(destination=destination, prefix=prefix + "model.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        prefix += "model."
        ours = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if not self.save:
            unexpected_keys.extend(prefix + key for key in ours)
            return
        try:
            result = self.model.load_state_dict(ours, strict=False)
        except RuntimeError as error:  # shapes that do not fit; the caller lists them with its own
            error_msgs.append(str(error))
            return
        missing_keys.extend(prefix + key for key in result.missing_keys)
        unexpected_keys.extend(prefix + key for key in result.unexpected_keys)
        self._versions = None
