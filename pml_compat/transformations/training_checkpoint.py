"""Checkpoints of a training: it goes on from one and ends as if it had not been interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import torch

from .._files import load_tensors, save_tensors
from .alignment import Alignment
from .training_run import TrainingRun

_FORMAT = "pml_compat.fit_transformation/1"


def save_run(run: TrainingRun, path: str | os.PathLike[str]) -> None:
    """Write all that a run needs to go on."""
    tensors = {"generator": run.generator.get_state()}
    for name, module in run.modules().items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    for name, kept in (("best", run.best), ("first", run.first), ("scores", run.scores)):
        tensors |= {f"{name}.{key}": tensor for key, tensor in kept.items()}
    start = {
        "started": run.started,
        "first_loss": run.first_loss,
        "alignment": None if run.alignment is None else dataclasses.asdict(run.alignment),
    }
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(run.settings),
        "history": json.dumps(run.history),
        "scaler": json.dumps(run.scaler.state_dict()),
        "start": json.dumps(start),
    }
    save_tensors(path, tensors, metadata)


def resume_run(run: TrainingRun, path: str | os.PathLike[str]) -> None:
    """Take the state of the run that wrote ``path``, in place of :meth:`TrainingRun.start`.

    Raises:
        ValueError: a truncated file, one of something else, or of a run with other data or settings.
    """
    tensors, metadata = load_tensors(path, _FORMAT, "fit_transformation")
    settings = json.loads(metadata["settings"])
    for name, value in run.settings.items():
        if name not in settings or settings[name] != value:
            raise ValueError(
                f"checkpoint must be of this run, {os.fspath(path)!r} has {name} = {settings.get(name)}, not {value}; "
                "delete it to start afresh"
            )
    for name, module in run.modules().items():
        module.load_state_dict(_with_prefix(tensors, name))
    run.make_optimizer()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _with_prefix(tensors, "optimizer").items():
        number, _, entry = key.partition(".")
        state.setdefault(int(number), {})[entry] = tensor
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.scaler.load_state_dict(json.loads(metadata["scaler"]))
    run.generator.set_state(tensors["generator"])
    for name, kept in (("best", run.best), ("first", run.first), ("scores", run.scores)):
        kept |= {key: tensor.to(run.device) for key, tensor in _with_prefix(tensors, name).items()}
    run.history = json.loads(metadata["history"])
    start = json.loads(metadata["start"])
    run.started, run.first_loss = start["started"], start["first_loss"]
    run.alignment = None if start["alignment"] is None else Alignment(**start["alignment"])


def describe_loss(loss: Any) -> dict[str, Any]:
    """Return how a loss and its parts are set, of types that JSON has; empty where it is no module.

    A setting is what a PML module records of itself, and whether a distance normalises. Tensors are no settings, they
    are in the state; nor is what a loss of one's own counts.
    """
    if not isinstance(loss, torch.nn.Module):
        return {}
    names = [*getattr(loss, "_record_these", []), "normalize_embeddings", "is_inverted", "embedding_reg_weight"]
    values = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    settings = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    parts = {name: {"class": type(part).__name__, **describe_loss(part)} for name, part in loss.named_children()}
    return {**settings, **parts}


def _with_prefix(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
