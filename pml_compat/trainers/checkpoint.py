"""The whole state of a training in one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._checks import check_integer
from .._files import whole_file
from .._host import CrossBatchMemory

_FORMAT = "pml_compat.checkpoint/1"
_GROUPS = ("modules", "optimizers", "lr_schedulers", "others", "generators")


class Progress(NamedTuple):
    """How far a training was when its checkpoint was written."""

    epoch: int
    step: int


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, Any] | None = None,
    lr_schedulers: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    epoch: int = 0,
    step: int = 0,
) -> None:
    """Write the state of a training: what is given, and the random generators of torch, CUDA, NumPy and Python.

    The file appears whole or not at all; a process killed while writing leaves the last one (and a ``.NAME-...``
    beside it, to delete). Training that goes on from it is bit-identical on a CPU, also from the middle of an epoch,
    with a :class:`~pml_compat.trainers.ResumableSampler` among ``others`` and two things heeded:

    - A DataLoader draws from torch's generator each time it is iterated: give it one of its own,
      ``DataLoader(..., generator=torch.Generator())``.
    - What DataLoader workers draw for augmentation begins anew with each iteration of the DataLoader. At the end of an
      epoch that is no difference; within one, augment in the training process (``num_workers=0``), or by a seed made of
      sample and epoch.

    With PML's trainers, save at the end of an epoch, in ``end_of_epoch_hook``: ``end_of_iteration_hook`` runs before
    the schedulers step. ``save_checkpoint(path, epoch=trainer.epoch, **trainer.checkpoint_parts())``, for
    :class:`~pml_compat.trainers.CompatibleMetricLossOnly`, and after ``load_checkpoint``
    ``trainer.train(start_epoch=progress.epoch + 1, ...)``.

    Args:
        path: the file; what stands there is replaced.
        modules: networks, losses and miners, by names of your choice: all that is trained or keeps a queue.
        optimizers: by name.
        lr_schedulers: by name.
        others: by name, anything with ``state_dict`` and ``load_state_dict``: samplers, ``GradScaler``.
        generators: by name, torch's generators beside the default ones.
        epoch: how many epochs are done.
        step: how many steps are done.
    Raises:
        ValueError: a part that is not what its argument holds; a state that only ``torch.load(weights_only=False)``
            could read; ``epoch`` or ``step`` negative.
    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.pt", modules={"model": model}, step=100)
        ...     load_checkpoint(f"{folder}/last.pt", modules={"model": model})
        Progress(epoch=0, step=100)
    """
    parts = _parts(modules, optimizers, lr_schedulers, others, generators)
    state = {
        "format": _FORMAT,
        "epoch": check_integer(epoch, "epoch", minimum=0),
        "step": check_integer(step, "step", minimum=0),
        "forms": {group: {name: _form(part) for name, part in named.items()} for group, named in parts.items()},
        "states": {group: {name: _state(part) for name, part in named.items()} for group, named in parts.items()},
        "memories": _memories(parts["modules"]),
        "random": _random_state(),
    }
    with whole_file(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            torch.load(temporary, weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"the states must be tensors, numbers, strings and containers of these, which can be read without "
                f"running code: {error}"
            ) from error


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, Any] | None = None,
    lr_schedulers: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> Progress:
    """Put a training into the state that :func:`save_checkpoint` wrote, and return how far it was.

    Give what was given there, built with the same arguments, on any device. Nothing changes before all of it is seen
    to fit. Random states of GPUs that are not there are left out.

    Args:
        path: the file.
        modules: see :func:`save_checkpoint`; so are the others.
        optimizers: built on the parameters of ``modules``.
        lr_schedulers: built on ``optimizers``.
        others: see there.
        generators: see there.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no whole checkpoint; other names, types, tensors or shapes than those saved.
    """
    parts = _parts(modules, optimizers, lr_schedulers, others, generators)
    saved = _read(Path(path))
    for group, named in parts.items():
        forms = saved["forms"][group]
        if forms.keys() != named.keys():
            raise ValueError(f"{group} must be those of the checkpoint, {sorted(forms)}, got {sorted(named)}")
        for name, part in named.items():
            _check_form(f"{group}[{name!r}]", forms[name], _form(part))

    memories = _cross_batch_memories(parts["modules"])
    if memories.keys() != saved["memories"].keys():
        raise ValueError(f"modules must have the memories {sorted(saved['memories'])}, got {sorted(memories)}")

    states = saved["states"]
    _load_or_keep(parts["others"], states["others"])  # the only ones that may still refuse
    for group in ("modules", "optimizers", "lr_schedulers"):
        for name, part in parts[group].items():
            part.load_state_dict(states[group][name])
    for name, memory in memories.items():
        memory.queue_idx, memory.has_been_filled = saved["memories"][name]
    for name, generator in parts["generators"].items():
        generator.set_state(states["generators"][name])
    _set_random_state(saved["random"])
    return Progress(saved["epoch"], saved["step"])


def _parts(*given: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    parts = {}
    for group, named in zip(_GROUPS, given, strict=True):
        if named is not None and not isinstance(named, Mapping):
            raise ValueError(f"{group} must be a mapping of names, got {type(named).__name__}")
        parts[group] = dict(named or {})
        for name, part in parts[group].items():
            kind = {"modules": torch.nn.Module, "generators": torch.Generator}.get(group, object)
            if not isinstance(part, kind) or (group != "generators" and not hasattr(part, "load_state_dict")):
                rule = "a torch.Generator" if group == "generators" else "a module"
                rule = rule if kind is not object else "an object with state_dict and load_state_dict"
                raise ValueError(f"{group}[{name!r}] must be {rule}, got {type(part).__name__}")
    return parts


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _form(part: Any) -> dict[str, Any]:
    """Return what a part must have in common with the one that was saved: its type, and tensors with their shapes."""
    form: dict[str, Any] = {"type": type(part).__name__}
    if isinstance(part, torch.nn.Module):
        form["tensors"] = {key: _shape(value) for key, value in part.state_dict().items()}
    elif isinstance(part, torch.optim.Optimizer):
        form["tensors"] = {
            f"parameter {row} of group {number}": _shape(parameter)
            for number, group in enumerate(part.param_groups)
            for row, parameter in enumerate(group["params"])
        }
    return form


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if isinstance(value, torch.Tensor) else None


def _check_form(name: str, saved: dict[str, Any], own: dict[str, Any]) -> None:
    if own["type"] != saved["type"]:
        raise ValueError(f"{name} must be a {saved['type']}, as in the checkpoint, got a {own['type']}")
    tensors, expected = own.get("tensors", {}), saved.get("tensors", {})
    if tensors == expected:
        return
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        raise ValueError(
            f"{name} must have the tensors of the checkpoint: without {', '.join(missing[:5]) or 'none'} of it, with "
            f"{', '.join(surplus[:5]) or 'none'} beside it ({len(missing)} and {len(surplus)})"
        )
    first = next(key for key in expected if expected[key] != tensors[key])
    raise ValueError(
        f"{name} must have the shapes of the checkpoint: {first} is {expected[first]} there, got {tensors[first]}"
    )


def _load_or_keep(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except Exception:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        raise


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint, {os.fspath(path)!r} is not there")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"path must be a whole checkpoint, {os.fspath(path)!r} is not: {error}") from error
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ValueError(f"path must be a file written by save_checkpoint, {os.fspath(path)!r} is not")
    return saved


def _cross_batch_memories(modules: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    return {
        f"{name}.{inner}": module
        for name, part in modules.items()
        for inner, module in part.named_modules()
        if isinstance(module, CrossBatchMemory)
    }


def _memories(modules: Mapping[str, torch.nn.Module]) -> dict[str, list[Any]]:
    """Return how far PML's memories are filled, which they do not put into their ``state_dict`` themselves."""
    return {
        name: [int(memory.queue_idx), bool(memory.has_been_filled)]
        for name, memory in _cross_batch_memories(modules).items()
    }


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (PML's samplers draw from it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda_state, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
