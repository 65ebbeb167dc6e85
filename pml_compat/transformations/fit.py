"""Training a transformation on stored embeddings; the networks that made them ran once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..checks import check_integer, check_labels, check_number
from ..files import load_tensors, save_tensors
from ..stored_rows import stored_rows
from .base import Transformation, describe
from .fastfill import gaussian_losses

_FORMAT = "pml_compat.fit_transformation/1"
History = dict[str, Any]


def fit_transformation(
    transformation: Transformation,
    source: Any,
    target: Any,
    side_info: Any = None,
    *,
    labels: Any = None,
    loss: Callable[..., torch.Tensor] | None = None,
    epochs: int = 80,
    batch_size: int = 1024,
    lr: float = 5e-4,
    weight_decay: float = 2**-15,
    warmup_epochs: int = 5,
    freeze_norm_at: float = 0.5,
    validation: float = 0.0,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    r"""Train ``transformation``, in place, to map stored embeddings onto the embeddings of another model.

    Adam with a learning rate that rises linearly over ``warmup_epochs`` and then falls as half a cosine, by epochs;
    from ``freeze_norm_at`` of the epochs on, batch normalisation uses the statistics gathered so far. Everything random
    comes from ``seed``. The transformation is trained on its device and left in eval mode.

    Args:
        transformation: any; FCT trains an :class:`FCTTransformation`.
        source: ``(N, in_features)`` tensor, array, memory map (rows are read by batches) or ``FrozenEmbeddings``; or a
            list of several, each with the embeddings of another augmented view: every sample draws one of them in
            every epoch, the same one in ``source``, ``target`` and ``side_info``.
        target: ``(N, out_features)``, row i of the same item as row i of ``source``; a list of as many views, or one
            for all of them. None where ``loss`` needs none.
        side_info: ``(N, side_features)``, stored with ``source``; as ``target``. None where there is none.
        labels: ``(N,)``, for a ``loss`` that uses them.
        loss: a PML loss, called as ``loss(mapped, labels, ref_emb=target)`` with what is there, and with ``log_var``
            where the transformation has ``with_log_variance``; its parameters are trained too. None: the mean squared
            error over all entries, as :class:`pml_compat.losses.FCTLoss`, or :class:`pml_compat.losses.FastFillLoss`.
        epochs: passes over the data, 1 or more.
        batch_size: rows a step, at most: an epoch is split into steps of equal size.
        lr: the highest learning rate.
        weight_decay: of Adam.
        warmup_epochs: epochs of rising learning rate, 0 or more.
        freeze_norm_at: fraction of the epochs in [0, 1] after which batch norm's statistics are frozen; 1 for never.
        validation: fraction of the samples in [0, 1) that is held out; if above 0, the state of the epoch with the
            lowest validation loss is kept.
        seed: of the order, the views and the split.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for mixed precision; None for float32.
        checkpoint: a file, written after every epoch; where it exists, training goes on from it and ends with the
            same result as without the interruption.
        progress: show a progress bar.
    Returns:
        ``{"train_loss": [...], "validation_loss": [...], "lr": [...], "best_epoch": int}``, one entry an epoch.
    Raises:
        ValueError: lengths that differ, other widths, NaN or infinity (which array and row), views that do not match,
            a fraction out of range, a checkpoint of another run or a truncated one.

    Example:
        >>> from pml_compat.transformations import LinearTransformation
        >>> old = torch.randn(200, 4)
        >>> history = fit_transformation(LinearTransformation(4, 4), old, 2 * old, epochs=3, progress=False)
        >>> len(history["train_loss"])
        3

    Reference:
        Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022, CIFAR
        settings. Differs from the public code in: embeddings are stored and not computed again in every epoch.
    """
    rows = _Rows(transformation, source, target, side_info, labels, loss)
    run = _Run(
        transformation,
        loss,
        rows,
        {
            "transformation": describe(transformation),
            "loss": None if loss is None else type(loss).__name__,
            "rows": rows.length,
            "views": rows.views,
            "epochs": check_integer(epochs, "epochs", minimum=1),
            "batch_size": check_integer(batch_size, "batch_size", minimum=1),
            "lr": check_number(lr, "lr", minimum=0, exclusive=True),
            "weight_decay": check_number(weight_decay, "weight_decay", minimum=0),
            "warmup_epochs": check_integer(warmup_epochs, "warmup_epochs", minimum=0),
            "freeze_norm_at": _check_fraction(freeze_norm_at, "freeze_norm_at", "[0, 1]"),
            "validation": _check_fraction(validation, "validation", "[0, 1)"),
            "seed": check_integer(seed, "seed", minimum=0),
            "autocast": None if autocast is None else str(autocast),
        },
        autocast,
    )
    if checkpoint is not None and Path(checkpoint).exists():
        run.resume(checkpoint)
    done = len(run.history["train_loss"])
    with tqdm(total=epochs, initial=done, desc="fit", unit="epoch", disable=not progress) as bar:
        for epoch in range(done, epochs):
            run.epoch(epoch)
            if checkpoint is not None:
                run.save(checkpoint)
            bar.set_postfix(loss=f"{run.history['train_loss'][-1]:.3g}")
            bar.update()
    return run.finish()


class _Rows:
    """The stored arrays, row-aligned, in one or several views."""

    def __init__(
        self, transformation: Transformation, source: Any, target: Any, side_info: Any, labels: Any, loss: Any
    ) -> None:
        if target is None and loss is None:
            raise ValueError("target must be given, got None; without a loss of your own, rows are regressed onto it")
        if (side_info is None) != (transformation.side_features is None):
            wanted = "None" if transformation.side_features is None else f"(N, {transformation.side_features})"
            raise ValueError(
                f"side_info must be {wanted} for this {type(transformation).__name__}, got {side_info!r:.40}"
            )
        arrays = {"source": source, "target": target, "side_info": side_info}
        widths = {
            "source": transformation.in_features,
            "target": transformation.out_features,
            "side_info": transformation.side_features,
        }
        self.arrays = {name: _as_views(value, name) for name, value in arrays.items() if value is not None}
        self.length = len(self.arrays["source"][0])
        self.views = len(self.arrays["source"])
        if self.length == 0:
            raise ValueError("source must not be empty, got 0 rows")
        for name, views in self.arrays.items():
            if len(views) not in (1, self.views):
                raise ValueError(f"{name} must have 1 or {self.views} views like source, got {len(views)}")
            for view in views:
                if len(view.shape) != 2 or view.shape[1] != widths[name]:
                    raise ValueError(f"{name} must be (N, {widths[name]}), got shape {tuple(view.shape)}")
                if len(view) != self.length:
                    raise ValueError(
                        f"{name} must have one row for each row of source, in the same order: expected {self.length}, "
                        f"got {len(view)}"
                    )
        self.labels = None if labels is None else check_labels(labels, length=self.length)
        self.weight = next(transformation.parameters())

    def read(self, name: str, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor | None:
        """Return rows ``index``, each of its view, on the transformation's device."""
        views = self.arrays.get(name)
        if views is None:
            return None
        if len(views) == 1:
            rows = stored_rows(views[0], index, name)
        else:
            parts = [(view == v).nonzero()[:, 0] for v in range(len(views))]
            rows = torch.cat([stored_rows(views[v], index[part], name) for v, part in enumerate(parts) if len(part)])
            rows = rows[torch.argsort(torch.cat(parts))]
        return rows.to(self.weight.device, self.weight.dtype)


class _Run:
    def __init__(
        self,
        transformation: Transformation,
        loss: Any,
        rows: _Rows,
        settings: dict[str, Any],
        autocast: torch.dtype | None,
    ) -> None:
        self.transformation, self.loss, self.rows, self.settings = transformation, loss, rows, settings
        self.autocast = autocast
        self.device = rows.weight.device
        parameters = {id(p): p for p in transformation.parameters()}
        if isinstance(loss, torch.nn.Module):
            parameters |= {id(p): p for p in loss.parameters()}
        self.optimizer = torch.optim.Adam(
            list(parameters.values()), lr=settings["lr"], weight_decay=settings["weight_decay"]
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.generator = torch.Generator().manual_seed(settings["seed"])
        order = torch.randperm(rows.length, generator=self.generator)
        held_out = math.ceil(settings["validation"] * rows.length)
        self.validation, self.training = order[:held_out].sort().values, order[held_out:].sort().values
        if len(self.training) == 0:
            raise ValueError(
                f"validation must leave samples to train on, got {settings['validation']} of {rows.length}"
            )
        self.history: History = {"train_loss": [], "validation_loss": [], "lr": []}
        self.best: dict[str, torch.Tensor] = {}

    def epoch(self, epoch: int) -> None:
        settings = self.settings
        lr = settings["lr"] * _schedule(epoch, settings["epochs"], settings["warmup_epochs"])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.transformation.train()
        if epoch >= settings["freeze_norm_at"] * settings["epochs"]:
            for module in self.transformation.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.eval()
        order = self.training[torch.randperm(len(self.training), generator=self.generator)]
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        # In equal parts: a last batch of a few rows would spoil batch norm's statistics, and step as far as a whole.
        for index in order.tensor_split(math.ceil(len(order) / settings["batch_size"])):
            loss = self._loss(index)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach() * len(index)
        if not bool(torch.isfinite(total)):
            raise ValueError(f"lr must let the training converge, at {lr:g} the loss of epoch {epoch} is {total:g}")
        self.history["train_loss"].append(float(total) / len(order))
        self.history["lr"].append(lr)
        if len(self.validation):
            self._validate()

    def _loss(self, index: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        view = torch.zeros(len(index), dtype=torch.long)
        if rows.views > 1 and self.transformation.training:
            view = torch.randint(rows.views, (len(index),), generator=self.generator)
        source, target, side_info = (rows.read(name, index, view) for name in ("source", "target", "side_info"))
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            predict = getattr(self.transformation, "with_log_variance", None)
            mapped, log_var = predict(source, side_info) if predict else (self.transformation(source, side_info), None)
            given = {name: value for name, value in (("ref_emb", target), ("log_var", log_var)) if value is not None}
            if self.loss is None:
                return _default_loss(mapped, **given)
            labels = None if rows.labels is None else rows.labels[index].to(self.device)
            return self.loss(mapped, labels, **given)

    @torch.no_grad()
    def _validate(self) -> None:
        self.transformation.eval()
        batches = self.validation.split(self.settings["batch_size"])
        total = sum(float(self._loss(index)) * len(index) for index in batches)
        loss = total / len(self.validation)
        if not self.best or loss < min(self.history["validation_loss"]):
            self.best = {key: tensor.clone() for key, tensor in self.transformation.state_dict().items()}
        self.history["validation_loss"].append(loss)

    def finish(self) -> History:
        """Keep the best state, where one was looked for."""
        losses = self.history["validation_loss"]
        self.history["best_epoch"] = int(np.argmin(losses)) if losses else self.settings["epochs"] - 1
        if self.best:
            self.transformation.load_state_dict(self.best)
        self.transformation.eval()
        return self.history

    def _modules(self) -> dict[str, torch.nn.Module]:
        modules: dict[str, torch.nn.Module] = {"transformation": self.transformation}
        if isinstance(self.loss, torch.nn.Module):
            modules["loss"] = self.loss
        return modules

    def save(self, path: str | os.PathLike[str]) -> None:
        tensors = {"generator": self.generator.get_state()}
        for name, module in self._modules().items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors |= {f"best.{key}": tensor for key, tensor in self.best.items()}
        metadata = {
            "format": _FORMAT,
            "settings": json.dumps(self.settings),
            "history": json.dumps(self.history),
            "scaler": json.dumps(self.scaler.state_dict()),
        }
        save_tensors(path, tensors, metadata)

    def resume(self, path: str | os.PathLike[str]) -> None:
        tensors, metadata = load_tensors(path, _FORMAT, "fit_transformation")
        settings = json.loads(metadata["settings"])
        for name, value in self.settings.items():
            if settings[name] != value:
                raise ValueError(
                    f"checkpoint must be of this run, {os.fspath(path)!r} has {name} = {settings[name]}, not {value}; "
                    "delete it to start afresh"
                )
        for name, module in self._modules().items():
            module.load_state_dict(_with_prefix(tensors, name))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in _with_prefix(tensors, "optimizer").items():
            number, _, entry = key.partition(".")
            state.setdefault(int(number), {})[entry] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.scaler.load_state_dict(json.loads(metadata["scaler"]))
        self.generator.set_state(tensors["generator"])
        self.best = {key: tensor.to(self.device) for key, tensor in _with_prefix(tensors, "best").items()}
        self.history = json.loads(metadata["history"])


def _default_loss(mapped: torch.Tensor, ref_emb: torch.Tensor, log_var: torch.Tensor | None = None) -> torch.Tensor:
    if log_var is None:
        return torch.nn.functional.mse_loss(mapped, ref_emb)
    return gaussian_losses(mapped, ref_emb, log_var).mean()


def _with_prefix(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _as_views(value: Any, name: str) -> list[Any]:
    views = list(value) if isinstance(value, list | tuple) else [value]
    if not views or not all(hasattr(view, "shape") and hasattr(view, "__getitem__") for view in views):
        raise ValueError(f"{name} must be an (N, D) array or a list of them, got {[type(v).__name__ for v in views]}")
    return views


def _schedule(epoch: int, epochs: int, warmup: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0."""
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))


def _check_fraction(value: Any, name: str, interval: str) -> float:
    number = check_number(value, name, minimum=0)
    if number > 1 or (number == 1 and interval.endswith(")")):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")
    return number
