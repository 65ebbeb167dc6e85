"""Does every method meet the criterion as it is dropped in, with nothing but its required arguments?

Each method is trained on each upgrade of ``upgrades.py`` as a user would: PML's task loss with its own defaults, our
loss around it with nothing set. One table a protocol, methods by task losses: P@1 / mAP of new/old by cosine, in
percent, mean of the seeds; in how many of them new queries find more in the old gallery than old ones do (P@1 and mAP
both); the gain, where at most two task losses are asked for; after the semicolon new/new. The independent model starts
from class weights as short as the methods'.

    python benchmarks/defaults.py --out runs/defaults --cifar data/cifar100
    python benchmarks/defaults.py --out runs/defaults --protocols digits digits_sgd --print

A run is kept in a file of its own and never made twice. ``--held-out`` takes its test images from the training set, to
choose settings by; such runs are kept apart. So are those of ``--other-start``: all models of a run start from the same
random weights, as two trainings by one script with one seed do; by it the old model, and that of the side-information,
start from others. Without ``--cifar`` torchvision downloads CIFAR-100 to ``data/cifar100``; Fashion-MNIST is Debian's
``dataset-fashion-mnist``, the fonts' packages are named by ``examples/open_set/glyphs.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import upgrades
from pytorch_metric_learning import losses as pml_losses
from upgrades import PROTOCOLS, Problem, Protocol

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import ClassCenters, FrozenClassifier, FrozenModel
from pml_compat.heads import CompatibleHead
from pml_compat.losses import (
    AdvBCTLoss,
    BCAlignerLoss,
    BCTLoss,
    CompatibleHeadLoss,
    CompatibleLoss,
    CrossModelLoss,
    CSDLoss,
    D3StillLoss,
    FocalDistillationLoss,
    LCELoss,
    LwFLoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    RACTLoss,
    RAMLLoss,
    SSPLoss,
    UniBCTLoss,
    shorten_class_weights,
)
from pml_compat.serving import QueryBlend, two_stage_accuracy
from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    OrthogonalTransformation,
    fit_transformation,
)

TASKS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "NormalizedSoftmax": pml_losses.NormalizedSoftmaxLoss,
    "ArcFace": pml_losses.ArcFaceLoss,
    "CosFace": pml_losses.CosFaceLoss,
    "SubCenterArcFace": lambda classes, width: pml_losses.SubCenterArcFaceLoss(
        num_classes=classes, embedding_size=width
    ),
    "ProxyAnchor": pml_losses.ProxyAnchorLoss,
    "MultiSimilarity": lambda classes, width: pml_losses.MultiSimilarityLoss(),
    "Triplet": lambda classes, width: pml_losses.TripletMarginLoss(),
}
WITH_CLASS_WEIGHTS = list(TASKS)[:5]
FEW_TASKS = ("NormalizedSoftmax", "ArcFace")
METRICS = ("precision_at_1", "mean_average_precision")
Accuracies = list[float]


@dataclass
class Old:
    """What is left of the old system: network, its task loss, and its embeddings of the new training set."""

    network: torch.nn.Module
    loss: torch.nn.Module
    labels: list[int]
    embeddings: torch.Tensor
    new_labels: torch.Tensor
    width: int

    def centers(self) -> ClassCenters:
        """Return the classes' centres."""
        return ClassCenters.from_embeddings(self.embeddings, self.new_labels)

    def classifier(self) -> FrozenClassifier:
        """The old classifier where there is one, with a row for every class; else class centres."""
        try:
            found = FrozenClassifier.from_loss(self.loss, labels=self.labels)
        except ValueError:
            return FrozenClassifier.from_centers(self.centers())
        return found.extend(self.centers())


@dataclass
class Training:
    """How a new model is trained.

    Args:
        loss: built of the task loss and the old system.
        reads: ``"stored"`` old embeddings, those of the ``"views"`` in the batch, or nothing.
        needs_class_weights: whether pair losses cannot be its task loss.
    """

    loss: Callable[[torch.nn.Module, Old], torch.nn.Module]
    reads: str = ""
    needs_class_weights: bool = False


def beside(old_loss: Callable[[Old], torch.nn.Module]) -> Training:
    return Training(lambda task, old: CompatibleLoss(task, old_loss(old)), "stored")


METHODS = {
    "BCT": Training(lambda task, old: BCTLoss(task, old.classifier())),
    "BCT, centres": Training(lambda task, old: BCTLoss(task, FrozenClassifier.from_centers(old.centers()))),
    "LCE": Training(lambda task, old: LCELoss(task, old.centers()), needs_class_weights=True),
    "LCE, backward": Training(
        lambda task, old: LCELoss(
            task, old.centers(), backward_transformation=OrthogonalTransformation(old.width, old.width)
        ),
        needs_class_weights=True,
    ),
    "BC-Aligner": Training(
        lambda task, old: BCAlignerLoss(task, LinearTransformation(old.width, old.width, bias=False)), "stored"
    ),
    "BC-Aligner, rotation": Training(
        lambda task, old: BCAlignerLoss(task, OrthogonalTransformation(old.width, old.width)), "stored"
    ),
    "UniBCT": Training(lambda task, old: UniBCTLoss(task, old.centers())),
    "MixBCT": Training(lambda task, old: MixBCTLoss(task), "stored", True),
    "CrossModel(SupCon)": beside(lambda old: CrossModelLoss(pml_losses.SupConLoss())),
    "RACT": beside(lambda old: RACTLoss()),
    "PointAlignment": beside(lambda old: PointAlignmentLoss()),
    "RAML": beside(lambda old: RAMLLoss()),
    "CSD": beside(lambda old: CSDLoss()),
    "SSP": beside(lambda old: SSPLoss.from_embeddings(old.embeddings)),
    "D3still": beside(lambda old: D3StillLoss()),
    "LwF": beside(lambda old: LwFLoss(FrozenClassifier.from_centers(old.centers()))),
    "FocalDistillation": beside(lambda old: FocalDistillationLoss(old.centers())),
    "NCCL": Training(lambda task, old: NCCLLoss(task, embedding_size=old.width), "stored"),
    "AdvBCT": beside(lambda old: AdvBCTLoss.from_embeddings(old.embeddings, old.new_labels)),
}
MAPPED_BACK = ("LCE, backward", "BC-Aligner", "BC-Aligner, rotation")
LABEL_FREE = ("PointAlignment", "RAML", "CSD", "SSP", "D3still")
HEAD = "CompatibleHead"
HEADS: dict[str, Callable[[], torch.nn.Module] | None] = {HEAD: None, "CompatibleHead, D3still": D3StillLoss}
OTHER_STARTS = {"old": 1000, "side": 2000}  # added to the seed
MAPS = ("linear map", "FCT", "FCT, side-information")
BLENDS = ("rotated query", "blended query", "blended query, no labels")
TWO_STAGES = {"two stages, 10": 10, "two stages, 50": 50}
AT_QUERY_TIME = (*BLENDS, *TWO_STAGES)  # of the two finished models, nothing trained
WHITENED = {"BCT, whitened query": "BCT"}  # ClassCenters.query_rows
KNOWN = {"BCT, known classes": "BCT", "CompatibleHead, known classes": HEAD}  # ClassCenters.known_class_rows
OLD_KNOWN = "old query, known classes"
NAMED = "blended query, known classes"  # named by the new model, nothing trained
STACKED = {
    "blended query on BCT": "BCT",
    "blended query on the head": HEAD,
    "blended query on BCT, no labels": "BCT",
    "blended query on the head, no labels": HEAD,
}
CLOSED_METHODS = [*METHODS, *WHITENED, *HEADS, *MAPS, *AT_QUERY_TIME, *STACKED, *KNOWN, OLD_KNOWN, NAMED]
OPEN_METHODS = ["BCT", "LCE", "UniBCT", *LABEL_FREE, *HEADS, *MAPS, *AT_QUERY_TIME, *STACKED, *KNOWN, OLD_KNOWN, NAMED]


def measure(queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor) -> Accuracies:
    """Return P@1 and mAP by cosine, each image left out of its own ranking."""
    calculator = CrossModelAccuracyCalculator(include=METRICS, fit_width=True)
    queries, gallery = (torch.nn.functional.normalize(rows, dim=1) for rows in (queries, gallery))
    found = calculator.get_accuracy(queries, labels, gallery, labels, ref_includes_query=True)
    return [found[metric] for metric in METRICS]


class Runs:
    """All runs of one protocol, task loss and seed; what is trained is kept in ``folder``."""

    def __init__(
        self, folder: Path, protocol: str, task: str, seed: int, held_out: bool, other_start: bool = False
    ) -> None:
        self.protocol: Protocol = PROTOCOLS[protocol]
        self.folder = folder / protocol / task / _name(seed, held_out, other_start)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task, self.seed, self.held_out, self.other_start = TASKS[task], seed, held_out, other_start
        self._problem: Problem | None = None

    @property
    def problem(self) -> Problem:
        """The data, read when they are first needed."""
        if self._problem is None:
            self._problem = self.protocol.problem(self.seed, self.held_out)
        return self._problem

    def run(self, method: str) -> None:
        """Measure a method, where that has not been done."""
        path = self.folder / f"{method}.json"
        if path.exists():
            return
        start = time.perf_counter()
        found = self.measure(method)
        path.with_suffix(".part").write_text(json.dumps(found | {"seconds": time.perf_counter() - start}))
        path.with_suffix(".part").rename(path)
        print(path.relative_to(self.folder.parents[2]), {k: _percent(v) for k, v in found.items() if v}, flush=True)

    def measure(self, method: str) -> dict[str, Accuracies]:
        """Return new/old and new/new; for the independent model old/old too."""
        old, labels = self.embeddings("old"), self.problem.test_labels
        if method == "independent":
            new = self.embeddings("independent")
            return {
                "old/old": measure(old, old, labels),
                "new/old": measure(new, old, labels),
                "new/new": measure(new, new, labels),
            }
        if method in MAPS:
            new = self.embeddings("independent")
            return {"new/old": measure(new, self.mapped(method), labels), "new/new": measure(new, new, labels)}
        if method in BLENDS:
            new = self.embeddings("independent")
            return {"new/old": measure(self.blended(method), old, labels), "new/new": measure(new, new, labels)}
        if method in TWO_STAGES:
            new, depth = self.embeddings("independent"), TWO_STAGES[method]
            found = two_stage_accuracy(old, new, old, new, labels, labels, depth=depth, same_items=True)[depth]
            return {"new/old": [found[metric] for metric in METRICS], "new/new": measure(new, new, labels)}
        if method in WHITENED:
            queries = self.old().centers().query_rows(self.queries(WHITENED[method])["test"])
            return {"new/old": measure(queries, old, labels)}
        if method in KNOWN or method == OLD_KNOWN:
            queries = self.queries(KNOWN[method])["test"] if method in KNOWN else old
            return {"new/old": measure(self.old().centers().known_class_rows(queries), old, labels)}
        if method == NAMED:
            known = ClassCenters.from_embeddings(self.embeddings("independent", "train"), self.problem.labels)
            named = known.nearest_labels(self.embeddings("independent"))
            return {"new/old": measure(self.old().centers().known_class_rows(self.blended(method), named), old, labels)}
        if method in STACKED:
            trained = self.queries(STACKED[method])
            known = None if method.endswith("no labels") else self.problem.labels
            blend = QueryBlend().fit(self.embeddings("old", "train"), trained["train"], known)
            return {"new/old": measure(blend.query_rows(old, trained["test"]), old, labels)}
        queries, new = self.new(method)
        return {"new/old": measure(queries, old, labels), "new/new": measure(new, new, labels)}

    def embeddings(self, which: str, part: str = "test") -> torch.Tensor:
        """Return a base model's embeddings of the test or the training images; it is trained where it is not there."""
        path = self.folder / f"{which}.pt"
        if not path.exists():
            model, extra = self._base(which)
            problem, embed = self.problem, self.protocol.embed
            saved = {"test": embed(model, problem.test_images), "train": embed(model, problem.images)}
            torch.save(saved | {"model": model.state_dict()} | extra, path)
        return torch.load(path, weights_only=True)[part]

    def _base(self, which: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        problem, protocol = self.problem, self.protocol
        torch.manual_seed(self.seed + (OTHER_STARTS.get(which, 0) if self.other_start else 0))
        network = protocol.network()
        if which == "side":
            upgrades.train_without_labels(protocol, network, problem.images[problem.old_rows])
            return network, {}
        rows = problem.old_rows if which == "old" else torch.arange(len(problem.labels))
        classes, labels = torch.unique(problem.labels[rows], return_inverse=True)
        loss = self.task(len(classes), protocol.width)
        protocol.train(network, loss if which == "old" else shorten_class_weights(loss), problem.images[rows], labels)
        return network, {"loss": loss.state_dict(), "labels": classes}

    def old(self) -> Old:
        """Return the old system."""
        embeddings = self.embeddings("old", "train")
        saved = torch.load(self.folder / "old.pt", weights_only=True)
        network, loss = self.protocol.network(), self.task(len(saved["labels"]), self.protocol.width)
        network.load_state_dict(saved["model"])
        loss.load_state_dict(saved["loss"])
        labels = saved["labels"].tolist()
        return Old(network.eval(), loss, labels, embeddings, self.problem.labels, self.protocol.width)

    def new(self, method: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Train a new model; return its test images as queries of the old gallery and as gallery of its own."""
        old, problem, protocol = self.old(), self.problem, self.protocol
        torch.manual_seed(self.seed)
        if method in HEADS:
            return self._with_head(old, method)
        training = METHODS[method]
        network = protocol.network()
        loss = training.loss(self.task(problem.classes, protocol.width), old)

        def after_epoch(epoch: int) -> None:
            if method == "UniBCT" and epoch in (protocol.epochs // 3, 2 * protocol.epochs // 3):
                loss.update_prototypes(old.embeddings, protocol.embed(network, problem.images), problem.labels)
            if method == "AdvBCT":
                loss.old_losses["old_loss"].set_progress(epoch / protocol.epochs)

        stored = old.embeddings if training.reads == "stored" else None
        protocol.train(network, loss, problem.images, problem.labels, stored, after_epoch=after_epoch)
        new = protocol.embed(network, problem.test_images)
        if method in STACKED.values():  # WHITENED and KNOWN ask for the same ones
            self._keep(method, protocol.embed(network, problem.images), new)
        with torch.no_grad():
            return loss.backward_transformation(new) if method in MAPPED_BACK else new, new

    def blended(self, method: str) -> torch.Tensor:
        """Return the test images as queries of both base models; everything is chosen on training images."""
        old, new, labels = (*(self.embeddings(which, "train") for which in ("old", "independent")), self.problem.labels)
        blend = QueryBlend().fit(old, new, None if method.endswith("no labels") else labels)
        if method == "rotated query":
            blend.share = 1.0
        return blend.query_rows(self.embeddings("old"), self.embeddings("independent"))

    def queries(self, method: str) -> dict[str, torch.Tensor]:
        """Return a trained model's queries of the old space, of the training and the test images, as :meth:`new` kept
        them."""
        path = self.folder / f"{method}.pt"
        if not path.exists():
            self.new(method)
        return torch.load(path, weights_only=True)

    def _keep(self, method: str, train: torch.Tensor, test: torch.Tensor) -> None:
        torch.save({"train": train, "test": test}, self.folder / f"{method}.pt")

    def _with_head(self, old: Old, method: str) -> tuple[torch.Tensor, torch.Tensor]:
        problem, protocol, old_loss = self.problem, self.protocol, HEADS[method]
        network = protocol.network(CompatibleHead(protocol.features, old.width, protocol.last_layer(), protocol.width))
        head = network[-1]
        task = self.task(problem.classes, protocol.width)
        if old_loss is None:
            loss = CompatibleHeadLoss(task, head, centers=old.centers())
        else:
            loss = CompatibleHeadLoss(task, head, old_loss())
        protocol.train(network, loss, problem.images, problem.labels, old_model=FrozenModel(old.network))
        new = protocol.embed(network, problem.test_images)
        with torch.no_grad():
            if method in STACKED.values():
                self._keep(method, head.old_part(protocol.embed(network, problem.images)), head.old_part(new))
            return head.old_part(new), head.whole(new)

    def mapped(self, method: str) -> torch.Tensor:
        """Return the old gallery in the independent model's space."""
        source, target, test = self.embeddings("old", "train"), self.embeddings("independent", "train"), None
        old, width = self.embeddings("old"), self.protocol.width
        side = None
        if method == "linear map":
            return LinearTransformation(width, width).fit(source, target)(old).detach()
        if method == "FCT, side-information":
            side, test = self.embeddings("side", "train"), self.embeddings("side")
        torch.manual_seed(self.seed)
        transformation = FCTTransformation(width, width, None if side is None else width)
        fit_transformation(transformation, source, target, side, seed=self.seed, progress=False)
        with torch.no_grad():
            return transformation(old, test)


def applicable(protocol: str, task: str) -> Iterable[str]:
    """Return the methods of a protocol that can be built on a task loss."""
    for method in OPEN_METHODS if PROTOCOLS[protocol].open else CLOSED_METHODS:
        if method in METHODS and METHODS[method].needs_class_weights and task not in WITH_CLASS_WEIGHTS:
            continue
        yield method


def _percent(values: Any) -> Any:
    return values if isinstance(values, float) else " / ".join(f"{100 * value:.1f}" for value in values)


def _name(seed: int, held_out: bool, other_start: bool) -> str:
    return f"{seed}{'_held_out' if held_out else ''}{'_other_start' if other_start else ''}"


def report(
    folder: Path, protocols: list[str], tasks: list[str], seeds: list[int], held_out: bool, other_start: bool = False
) -> str:
    """Return the matrix of what has been measured, a table a protocol: its methods by its task losses."""
    lines = []
    for protocol in protocols:
        columns = {}
        for task in tasks:
            runs = [folder / protocol / task / _name(seed, held_out, other_start) for seed in seeds]
            if column := _column(runs, gains=len(tasks) < 3):
                columns[task] = column
        if not columns:
            continue
        rows = [row for row in ("old/old", "independent", *CLOSED_METHODS) if any(row in c for c in columns.values())]
        lines += [f"\n**{protocol}**\n", f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        lines += [f"| {row} | {' | '.join(column.get(row, '') for column in columns.values())} |" for row in rows]
    return "\n".join(lines)


def _column(runs: list[Path], gains: bool) -> dict[str, str]:
    """Return each method's cell: new/old, in how many seeds the criterion is met, gains if asked for; new/new."""
    base = {run: json.loads(path.read_text()) for run in runs if (path := run / "independent.json").exists()}
    if not base:
        return {}
    cells = {
        "old/old": _percent(_mean([found["old/old"] for found in base.values()])),
        "independent": f"; {_percent(_mean([found['new/new'] for found in base.values()]))}",
    }
    for method in CLOSED_METHODS:
        found = {run: json.loads(path.read_text()) for run in base if (path := run / f"{method}.json").exists()}
        if not found:
            continue
        pairs = [(f["new/old"], base[run]["old/old"], base[run]["new/new"]) for run, f in found.items()]
        met = sum(all(reached > old for reached, old in zip(new, old, strict=True)) for new, old, _ in pairs)
        gains_of = zip(*([_gain(*values) for values in zip(*pair, strict=True)] for pair in pairs), strict=True)
        gain = [_mean([one for one in column if math.isfinite(one)] or [float("nan")]) for column in gains_of]
        cells[method] = f"{_percent(_mean([f['new/old'] for f in found.values()]))} ({met} of {len(found)})"
        if gains:
            cells[method] += f", gain {gain[0]:.2f} / {gain[1]:.2f}"
        if method in METHODS or method in HEADS:
            cells[method] += f"; {_percent(_mean([f['new/new'] for f in found.values()]))}"
    return cells


def _gain(reached: float, old: float, new: float) -> float:
    return (reached - old) / (new - old) if new > old else float("nan")


def _mean(values: Any) -> Any:
    if isinstance(values[0], float):
        return statistics.fmean(values)
    return [statistics.fmean(column) for column in zip(*values, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all on digits, two elsewhere")
    parser.add_argument("--methods", nargs="+", choices=["independent", *CLOSED_METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", action="store_true", help="test on held-out training images")
    parser.add_argument("--other-start", action="store_true", help="the old model starts from other random weights")
    parser.add_argument("--cifar", type=Path, default=upgrades.DATA["cifar"])
    parser.add_argument("--fonts", type=Path, default=upgrades.DATA["fonts"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    upgrades.DATA.update(cifar=options.cifar, fonts=options.fonts)
    for seed in () if options.print else options.seeds:
        for protocol in options.protocols:
            for task in options.tasks or (TASKS if protocol.startswith("digits") else FEW_TASKS):
                runs = Runs(options.out, protocol, task, seed, options.held_out, options.other_start)
                wanted = [*applicable(protocol, task)]
                for method in dict.fromkeys(["independent", *(options.methods or wanted)]):
                    if method == "independent" or method in wanted:
                        runs.run(method)
    apart = options.held_out, options.other_start
    print(report(options.out, options.protocols, options.tasks or list(TASKS), options.seeds, *apart))


if __name__ == "__main__":
    main()
