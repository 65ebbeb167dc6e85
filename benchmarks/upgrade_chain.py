"""A chain of five models on a growing number of classes: which of them search the galleries of those before?

Two digits more at each step, or by ``--data cifar`` 20 classes of CIFAR-100 more, as in the chains of CoReS (Biondi et
al., TPAMI 2023; theirs is a SENet-18, tested on pairs of CIFAR-10). Each model starts anew and learns all classes so
far; a fine-tuned one goes on from the model before it, and sees the new classes and 20 images of each earlier one.

It prints each method's compatibility matrix, row t the queries of model t, column k the gallery of model k, P@1 / mAP
in percent by cosine, each image left out of its own ranking, and AC and AM of it, mean of the seeds. Three times: of
all test images, also those of classes that neither model has learned; of the classes that the gallery's model has
learned; and by 1:N identification of all, where a gallery is one template a class, the mean of the unit embeddings of
half of the test images, and the other half is searched for.

    python benchmarks/upgrade_chain.py --out runs/chain
    python benchmarks/upgrade_chain.py --out runs/chain --data cifar --cifar data/cifar100 --seeds 0

Every model is kept in a file of its own, so that a run that was stopped goes on where it was. ``--held-out`` tests on
images taken from the training set, to choose settings by.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import upgrades
from pytorch_metric_learning import losses as pml_losses
from torch.nn.functional import normalize
from upgrades import PROTOCOLS

from pml_compat.frozen import ClassCenters
from pml_compat.losses import BCAlignerLoss, BCTLoss, CoReSLoss, HOCLoss, shorten_class_weights
from pml_compat.transformations import (
    LinearTransformation,
    OrthogonalTransformation,
    Transformation,
    TransformationChain,
    load_transformation,
)
from pml_compat.upgrade import average_multimodel_accuracy, compatibility_matrix
from pml_compat.upgrade.chain import average_compatibility

DATA = {"digits": "digits", "cifar": "cifar_closed"}
STEPS, REHEARSED = 5, 20
METRICS = ("precision_at_1", "mean_average_precision")
KINDS = {
    "all": "all test images",
    "learned": "of classes that the gallery's model learned",
    "1:N": "one template a class",
}
Matrix = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Step:
    """What a loss is built of.

    Args:
        task: the task loss, for the classes so far.
        total: how many classes there will be at the end.
        width: of the embeddings.
        old: the model before's embeddings of the training images, and their labels; None at the first.
        maps: from the model before down to the first, newest first; empty where there are none.
    """

    task: torch.nn.Module
    total: int
    width: int
    old: tuple[torch.Tensor, torch.Tensor] | None
    maps: list[Transformation]


@dataclass(frozen=True)
class Method:
    """How the models of a chain are trained.

    Args:
        loss: of every model, or of all but the first.
        first: of the first model.
        stationary: whether embeddings are as wide as a simplex of all classes.
        reads: whether the loss is called with the stored embeddings of the model before.
        fine_tuned: whether a model goes on from the one before it, with a rehearsal.
    """

    loss: Callable[[Step], torch.nn.Module]
    first: Callable[[Step], torch.nn.Module] = lambda step: shorten_class_weights(step.task)
    stationary: bool = False
    reads: bool = False
    fine_tuned: bool = False


def alone(step: Step) -> torch.nn.Module:
    return shorten_class_weights(step.task)


def simplex(step: Step) -> torch.nn.Module:
    return CoReSLoss(step.total)


def aligned(step: Step) -> torch.nn.Module:
    return aligned_by(step, LinearTransformation(step.width, step.width, bias=False))


def aligned_by(step: Step, to_previous: Transformation) -> torch.nn.Module:
    return BCAlignerLoss(step.task, to_previous, previous_maps=TransformationChain(*step.maps) if step.maps else None)


METHODS = {
    "independent": Method(alone),
    "BCT": Method(lambda step: BCTLoss(step.task, ClassCenters.from_embeddings(*step.old))),
    "CoReS": Method(simplex, simplex, stationary=True),
    "HOC": Method(lambda step: HOCLoss(step.total), simplex, stationary=True, reads=True),
    "BC-Aligner": Method(aligned, reads=True),
    "BC-Aligner, rotation": Method(
        lambda step: aligned_by(step, OrthogonalTransformation(step.width, step.width)), reads=True
    ),
    "fine-tuned": Method(alone, fine_tuned=True),
    "fine-tuned CoReS": Method(simplex, simplex, stationary=True, fine_tuned=True),
    "fine-tuned HOC": Method(lambda step: HOCLoss(step.total), simplex, stationary=True, reads=True, fine_tuned=True),
}


class Chain:
    """The models of one method and seed; each is kept in ``folder``."""

    def __init__(self, folder: Path, data: str, method: str, seed: int, held_out: bool) -> None:
        self.protocol, self.method, self.seed = PROTOCOLS[DATA[data]], METHODS[method], seed
        self.folder = folder / data / f"{seed}{'_held_out' if held_out else ''}" / method
        self.folder.mkdir(parents=True, exist_ok=True)
        self.problem = self.protocol.problem(seed, held_out)
        self.total = self.problem.classes
        self.width = self.total - 1 if self.method.stationary else self.protocol.width

    def model(self, step: int) -> dict[str, Any]:
        """Return a model's state, that of its loss, and its embeddings; it is trained where it is not there."""
        path = self.folder / f"{step}.pt"
        if not path.exists():
            self._train(step, path)
        return torch.load(path, weights_only=True)

    def _train(self, step: int, path: Path) -> None:
        problem, protocol = self.problem, self.protocol
        before = self.model(step - 1) if step else None
        torch.manual_seed(self.seed)
        last = torch.nn.Linear(protocol.features, self.width) if self.width != protocol.width else None
        network = protocol.network(last)
        classes = self.total * (step + 1) // STEPS
        rows = (problem.labels < classes).nonzero()[:, 0]
        task = pml_losses.NormalizedSoftmaxLoss(classes, self.width)
        old = None if before is None else (before["train"][rows], problem.labels[rows])
        found = Step(
            task, self.total, self.width, old, [self.map(k) for k in range(step - 1, 0, -1) if self.has_map(k)]
        )
        loss = (self.method.loss if step else self.method.first)(found)
        if self.method.fine_tuned and before is not None:
            rows = self._rehearsal(self.total * step // STEPS, classes)
            network.load_state_dict(before["model"])
            if "W" in before["loss"]:  # a classifier that grows
                task.W.data[:, : before["loss"]["W"].shape[1]] = before["loss"]["W"]
        stored = before["train"][rows] if before is not None and self.method.reads else None
        protocol.train(network, loss, problem.images[rows], problem.labels[rows], stored)
        if isinstance(loss, BCAlignerLoss):
            loss.backward_transformation.save(self._map_path(step))
        embed = protocol.embed
        part = path.with_suffix(".part")
        states = {"model": network.state_dict(), "loss": loss.state_dict()}
        torch.save(
            states | {"train": embed(network, problem.images), "test": embed(network, problem.test_images)}, part
        )
        part.rename(path)
        print(*path.parts[-4:-1], f"model {step + 1} of {STEPS}, {classes} classes", flush=True)

    def _rehearsal(self, known: int, classes: int) -> torch.Tensor:
        labels = self.problem.labels
        earlier = [(labels == label).nonzero()[:REHEARSED, 0] for label in range(known)]
        return torch.cat([*earlier, ((labels >= known) & (labels < classes)).nonzero()[:, 0]])

    def _map_path(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"

    def has_map(self, step: int) -> bool:
        """Whether model ``step``, which is there, came with a map to the one before it."""
        return self._map_path(step).exists()

    def map(self, step: int) -> Transformation:
        """Return the map from the embeddings of model ``step`` to those of the one before it."""
        return load_transformation(self._map_path(step))

    def queries(self, step: int, gallery: int) -> torch.Tensor:
        """Return the test images by model ``step``, as queries of the gallery of an earlier model."""
        rows = self.model(step)["test"]
        maps = [self.map(k) for k in range(step, gallery, -1) if self.has_map(k)]
        return TransformationChain(*maps)(rows).detach() if maps else rows

    def measured(self) -> dict[str, Matrix]:
        """Return the matrix of each kind of test, up to the diagonal."""
        path = self.folder / "matrices.json"
        if not path.exists():
            names = [str(step + 1) for step in range(STEPS)]
            found: dict[str, Matrix] = {kind: {name: {} for name in names} for kind in KINDS}
            for step in range(STEPS):
                for gallery in range(step + 1):
                    for kind, cell in self._cells(step, gallery).items():
                        found[kind][names[step]][names[gallery]] = cell
            path.with_suffix(".part").write_text(json.dumps(found))
            path.with_suffix(".part").rename(path)
        return json.loads(path.read_text())

    def _cells(self, step: int, gallery: int) -> dict[str, dict[str, Any]]:
        labels = self.problem.test_labels
        queries, stored = normalize(self.queries(step, gallery)), normalize(self.model(gallery)["test"])
        known = labels < self.total * (gallery + 1) // STEPS
        half, other = halves(labels)
        templates = ClassCenters.from_embeddings(stored[half], labels[half])
        return {
            "all": _accuracy(queries, stored, labels),
            "learned": _accuracy(queries[known], stored[known], labels[known]),
            "1:N": _accuracy(queries[other], templates.centers, labels[other], templates.labels),
        }


def _accuracy(
    queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor, gallery_labels: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return a cell of the matrix; without labels of the gallery, row i of both is the same image."""
    same = gallery_labels is None
    of = labels if same else gallery_labels
    return compatibility_matrix({"t": queries}, labels, {"k": gallery}, of, ref_includes_query=same)["t"]["k"]


def halves(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of every other image of each class, and those of the rest."""
    order = torch.argsort(labels, stable=True)
    place = torch.cat([torch.arange(int(count)) for count in torch.bincount(labels)])
    return order[place % 2 == 0], order[place % 2 == 1]


def report(found: dict[str, list[dict[str, Matrix]]]) -> str:
    """Return the matrices, and a table of the methods for each kind of test."""
    lines = []
    for kind, what in KINDS.items():
        for method, runs in found.items():
            lines += [f"\n**{method}**, {what}\n", f"| | {' | '.join(map(str, range(1, STEPS + 1)))} |"]
            lines += [f"| --- |{' ---: |' * STEPS}"]
            for t in range(1, STEPS + 1):
                cells = [_percent([run[kind][str(t)][str(k)] for run in runs]) for k in range(1, t + 1)]
                lines.append(f"| {t} | {' | '.join(cells)} |{' |' * (STEPS - t)}")
    lines += [f"\n| | {' | '.join(f'{kind}: AC | AM | {STEPS} alone' for kind in KINDS)} |", f"| --- |{' ---: |' * 9}"]
    for method, runs in found.items():
        cells = []
        for kind in KINDS:
            matrices, last = [run[kind] for run in runs], str(STEPS)
            cells.append(" / ".join(f"{_mean(average_compatibility, matrices, m):.2f}" for m in METRICS))
            cells.append(" / ".join(f"{100 * _mean(average_multimodel_accuracy, matrices, m):.1f}" for m in METRICS))
            cells.append(_percent([matrix[last][last] for matrix in matrices]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(cells: list[dict[str, Any]]) -> str:
    return " / ".join(f"{100 * statistics.fmean(cell[metric] for cell in cells):.1f}" for metric in METRICS)


def _mean(score: Callable[..., float], matrices: list[Matrix], metric: str) -> float:
    return statistics.fmean(score(matrix, metric=metric) for matrix in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", action="store_true", help="test on held-out training images")
    parser.add_argument("--cifar", type=Path, default=upgrades.DATA["cifar"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    upgrades.DATA.update(cifar=options.cifar)
    found: dict[str, list[dict[str, Matrix]]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        for method in options.methods:
            found[method].append(Chain(options.out, options.data, method, seed, options.held_out).measured())
    print(report(found))


if __name__ == "__main__":
    main()
