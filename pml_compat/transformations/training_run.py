"""One training of a transformation: its start, its epochs, and which state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .alignment import Alignment, neighborhood_temperature
from .base import Transformation
from .fastfill import gaussian_losses
from .paired_rows import PairedRows
from .pairs import moments_of
from .selection import has_classes_to_spare, hold_out, is_better, retrieval_scores

_SOME_ROWS = 8192  # of the target, for its mean
_KEPT = 2 / 3  # of what mapped rows differ by from that mean
_STANDARD_ERRORS = 1.0  # by which what was trained has to be better than the closed form

History = dict[str, Any]


class TrainingRun:
    """The parts of :func:`fit_transformation` that change from epoch to epoch.

    Args:
        transformation: trained in place.
        loss: the caller's, or None for what suits the transformation.
        rows: what it is trained on.
        settings: of the run, of types that JSON has.
        autocast: the dtype of mixed precision, or None.
    """

    def __init__(
        self,
        transformation: Transformation,
        loss: Callable[..., torch.Tensor] | None,
        rows: PairedRows,
        settings: dict[str, Any],
        autocast: torch.dtype | None,
    ) -> None:
        self.transformation, self.loss, self.rows, self.settings = transformation, loss, rows, settings
        self.autocast = autocast
        self.device = rows.weight.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.generator = torch.Generator().manual_seed(settings["seed"])
        # Maps without a place for the closed form leave the method of the base: no pass over the data for them.
        self.can_start = "target" in rows.arrays and (type(transformation).start_from is not Transformation.start_from)
        self.training, self.validation = self._split()
        self.history: History = {"train_loss": [], "validation_loss": [], "lr": []}
        self.best: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}  # of a map that was trained before, and may be better as it was
        self.started = False
        self.alignment: Alignment | None = None
        self.scores: dict[str, torch.Tensor] = {}  # of the start and of the best epoch, one a held-out row
        self.first_loss = math.inf

    def start(self) -> None:
        """Put the map onto the closed form, and see what that is worth; once, before the first epoch."""
        if self.can_start:
            moments = moments_of(self.rows.blocks())
            self.started = self.transformation.start_from(moments)
            if self.loss is None and not hasattr(self.transformation, "with_log_variance"):
                self.alignment = self._alignment(moments.target_energy / moments.rows)
        if self._judges() and not self.started:
            self.first = self._state()
        if self.alignment is not None:
            self.transformation.unshrink()
        if self._judges():
            self.scores["start"] = self._scores()
            self.history["validation_score"] = [float(self.scores["start"].mean())]
        elif self.started and len(self.validation):
            self.first_loss = self._validation_loss()
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """Make the optimiser, when the transformation has all its parameters."""
        parameters = {id(p): p for p in self.transformation.parameters()}
        if isinstance(self.loss, torch.nn.Module):
            parameters |= {id(p): p for p in self.loss.parameters()}
        rates = {name: self.settings[name] for name in ("lr", "weight_decay")}
        self.optimizer = torch.optim.Adam(list(parameters.values()), **rates)

    def epoch(self, epoch: int) -> None:
        """Train on every row once, and look at the rows that are held out."""
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
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(settings["seed"] * 2**20 + epoch)  # for what draws inside the transformation or the loss
            total = self._steps(order)
        if not bool(torch.isfinite(total)):
            raise ValueError(f"lr must let the training converge, at {lr:g} the loss of epoch {epoch} is {total:g}")
        self.history["train_loss"].append(float(total) / len(order))
        self.history["lr"].append(lr)
        if self._judges():
            self._keep_the_best_score()
        elif len(self.validation):
            loss = self._validation_loss()
            if not self.best or loss < min(self.history["validation_loss"]):
                self.best = self._state()
            self.history["validation_loss"].append(loss)

    def finish(self) -> History:
        """Keep the best state, where one was looked for; the start, where nothing is surely better."""
        losses = self.history["validation_loss"]
        best_epoch = self.settings["epochs"] - 1
        keeps_start = self.started and self.settings["validation"] is None and not self._judges()
        if self._judges():
            best_epoch = int(np.argmax(self.history["validation_score"][1:]))
            keeps_start = not is_better(self.scores["best"], self.scores["start"], _STANDARD_ERRORS)
        elif losses:
            best_epoch = int(np.argmin(losses))
            keeps_start = self.started and self.first_loss <= losses[best_epoch]
        if not keeps_start and self.best:
            self.transformation.load_state_dict(self.best)
        elif keeps_start and self.started:
            self.transformation.back_to_start()
        elif keeps_start:
            self.transformation.load_state_dict(self.first)
        if not keeps_start and self.alignment is not None:
            self._shrink()
        best_epoch = -1 if keeps_start else best_epoch
        self.history["best_epoch"] = best_epoch
        steps = math.ceil(len(self.training) / self.settings["batch_size"])
        self.history["steps"] = steps * len(self.history["train_loss"])
        self.transformation.eval()
        return self.history

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return what has a state: the transformation, and the loss where it is a module."""
        modules: dict[str, torch.nn.Module] = {"transformation": self.transformation}
        if isinstance(self.loss, torch.nn.Module):
            modules["loss"] = self.loss
        return modules

    def _split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows to train on and the rows that are held out."""
        share, length = self.settings["validation"], self.rows.length
        if share is None and self.can_start:
            labels = self._labels_of_spare_classes()
            return hold_out(length, None if labels is None else labels.cpu(), self.generator)
        order = torch.randperm(length, generator=self.generator)
        held_out = math.ceil((share or 0.0) * length)
        if held_out == length:
            raise ValueError(f"validation must leave samples to train on, got {share} of {length}")
        return order[held_out:].sort().values, order[:held_out].sort().values

    def _labels_of_spare_classes(self) -> torch.Tensor | None:
        """Return the labels to hold out and judge by; None where rows are held out, and the new model judges.

        Of a few classes that were trained on nearly all that is found is right. A loss of the caller's own may be for
        just these classes, as a contrast by labels.
        """
        labels = self.rows.labels
        return labels if self.loss is None and has_classes_to_spare(labels) else None

    def _judges(self) -> bool:
        """Whether the state to keep is chosen by what the held-out rows retrieve, and not by their loss."""
        return self.can_start and self.settings["validation"] is None and len(self.validation) > 0

    def _alignment(self, variance: float) -> Alignment:
        target = self._some_targets(self.settings["batch_size"])
        return Alignment(variance if variance > 0 else 1.0, neighborhood_temperature(target))

    def _some_targets(self, count: int) -> torch.Tensor:
        """Return evenly spaced rows of the target."""
        index = torch.linspace(0, self.rows.length - 1, min(self.rows.length, count), dtype=torch.float64).long()
        target = self.rows.read("target", index, torch.zeros_like(index))
        assert target is not None
        return target

    def _shrink(self) -> None:
        """Draw mapped rows towards their mean.

        A row that the map knows little about lies near the mean, and so near all queries: it is found by those that
        are nothing like it. The less rows differ from their mean, the less being near it counts in a cosine.
        """
        self.transformation.shrink(self._some_targets(_SOME_ROWS).mean(0), _KEPT)

    def _steps(self, order: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        # In equal parts: a last batch of a few rows would spoil batch norm's statistics, and step as far as a whole.
        for index in order.tensor_split(math.ceil(len(order) / self.settings["batch_size"])):
            loss = self._loss(index)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach() * len(index)
        return total

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
                return _default_loss(self.alignment, mapped, **given)
            labels = None if rows.labels is None else rows.labels[index].to(self.device)
            return self.loss(mapped, labels, **given)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.transformation.eval()
        batches = self.validation.split(self.settings["batch_size"])
        return sum(float(self._loss(index)) * len(index) for index in batches) / len(self.validation)

    @torch.no_grad()
    def _scores(self) -> torch.Tensor:
        self.transformation.eval()
        rows, view = self.rows, torch.zeros(len(self.validation), dtype=torch.long)
        source, target, side_info = (
            rows.read(name, self.validation, view) for name in ("source", "target", "side_info")
        )
        assert target is not None
        labels = self._labels_of_spare_classes()
        labels = None if labels is None else labels[self.validation].to(self.device)
        return retrieval_scores(target, self.transformation(source, side_info), labels)

    def _keep_the_best_score(self) -> None:
        scores, seen = self._scores(), self.history["validation_score"]
        if len(seen) == 1 or float(scores.mean()) > max(seen[1:]):
            self.best, self.scores["best"] = self._state(), scores
        seen.append(float(scores.mean()))

    def _state(self) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in self.transformation.state_dict().items()}


def _default_loss(
    alignment: Alignment | None, mapped: torch.Tensor, ref_emb: torch.Tensor, log_var: torch.Tensor | None = None
) -> torch.Tensor:
    if log_var is not None:
        return gaussian_losses(mapped, ref_emb, log_var).mean()
    return torch.nn.functional.mse_loss(mapped, ref_emb) if alignment is None else alignment(mapped, ref_emb=ref_emb)


def _schedule(epoch: int, epochs: int, warmup: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0."""
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))
