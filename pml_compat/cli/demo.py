"""The demo: one upgrade from end to end on scikit-learn's digits, with nothing to download.

An old model has seen a few images of the digits 0 to 4. A new, larger model learns all ten:

- ``independent``: on its own;
- ``bct``: under the old classifier's influence;
- ``lce``: its class weights aligned with the old class centres, at the old width;
- ``lce_backward``: the same at its own width, with a map from new to old space, which its queries go through.

Then queries by one model search the other's gallery: the held-out images, all ten digits, each image left out of its
own ranking.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from tqdm import tqdm

from .. import __version__
from ..accuracy import CrossModelAccuracyCalculator
from ..accuracy.ranking import nearest
from ..extras import import_extra
from ..files import whole_folder
from ..frozen import ClassCenters, FrozenClassifier
from ..losses import BCTLoss, LCELoss
from ..report import Results, RetrievalExample, markdown_table, plot_compatibility, rich_table, title, verdict
from ..report.results import METRICS
from ..transformations import OrthogonalTransformation
from ..width import fit_width

# Chosen on seeds 10 to 19; the results are those of seeds 0 to 4.
OLD_CLASSES, OLD_IMAGES_PER_CLASS = 5, 20
OLD_CHANNELS, OLD_WIDTH, OLD_EPOCHS, OLD_BATCH = 8, 32, 30, 64
NEW_CHANNELS, NEW_WIDTH, NEW_EPOCHS, NEW_BATCH = 32, 64, 40, 128
LEARNING_RATE = 2e-3  # of batches of 64
TEMPERATURE = 0.25  # soft enough that the influence goes on shaping classes it already tells apart
INFLUENCE_WEIGHT = 3.0
NEW_METHODS = ("independent", "bct", "lce", "lce_backward")
_EXAMPLES, _DEPTH = 3, 5


def run_demo(out: Path, seeds: Sequence[int]) -> Results:
    """Train, measure, print the table, and write metrics.json, report.md, compatibility.png and the embeddings.

    Args:
        out: the folder; its files appear together at the end, or not at all.
        seeds: one old and two new models are trained for each.
    Raises:
        ImportError: the ``demo`` extra is not installed; raised before anything is computed.
        ValueError: a seed twice; ``out`` is a file.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must differ, got {list(seeds)}")
    console = import_extra("rich.console", "demo").Console()
    import_extra("matplotlib.figure", "demo")
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    results = Results(
        data={
            "name": "scikit-learn digits",
            "images": len(images),
            "old_classes": list(range(OLD_CLASSES)),
            "old_images_per_class": OLD_IMAGES_PER_CLASS,
            "new_classes": list(range(10)),
            "query_and_gallery": "the held-out half, each image left out of its own ranking",
        },
        seeds=list(seeds),
    )
    calculator = CrossModelAccuracyCalculator(include=tuple(METRICS))
    examples: list[RetrievalExample] = []
    start = time.perf_counter()
    epochs = OLD_EPOCHS + len(NEW_METHODS) * NEW_EPOCHS
    with whole_folder(out) as folder, tqdm(total=len(seeds) * epochs, unit="epoch") as progress:
        for seed in seeds:
            train, test = split_in_half(labels, seed)
            models = upgrade(images[train], labels[train], images[test], seed, progress)
            for method, pair, query, gallery in searches(models):
                accuracies = calculator.get_accuracy(
                    models[query], labels[test], models[gallery], labels[test], ref_includes_query=True
                )
                results.add(method, pair, accuracies)
            _save_embeddings(folder / "embeddings" / f"seed_{seed}", models, labels[test], test)
            examples = examples or _examples(models, images[test, 0], labels[test])
        counts = torch.bincount(labels[test]).double()
        # A random ranking's precision is the positives' share of the gallery, at every place: so is its mAP, nearly.
        share = float((counts * (counts - 1)).sum() / (len(test) * (len(test) - 1)))
        results.chance = {"precision_at_1": share, "mean_average_precision": share}
        progress.close()
        _write(folder, results, examples, time.perf_counter() - start)
    console.print(rich_table(results))
    for method in NEW_METHODS:
        console.print(verdict(results, method), highlight=False)
    console.print(f"Written to {out}: metrics.json, report.md, compatibility.png, embeddings/", highlight=False)
    return results


def split_in_half(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of a training and a test half, with the same share of every class."""
    split = import_extra("sklearn.model_selection", "demo").train_test_split
    train, test = split(np.arange(len(labels)), test_size=0.5, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def upgrade(
    images: torch.Tensor, labels: torch.Tensor, test_images: torch.Tensor, seed: int, progress: tqdm
) -> dict[str, torch.Tensor]:
    """Train every model; return each one's embeddings of ``test_images``, by its name.

    ``lce_backward_query`` are those of ``lce_backward`` in the old space, by its backward transformation.
    """

    def new_loss(classes: int, width: int) -> NormalizedSoftmaxLoss:
        return NormalizedSoftmaxLoss(classes, width, temperature=TEMPERATURE)

    def step() -> None:
        progress.update()

    def fit(name: str, loss: torch.nn.Module, width: int) -> torch.nn.Module:
        progress.set_description(f"seed {seed}: {name}")
        model = network(NEW_CHANNELS, width)
        train(model, loss, images, labels, NEW_EPOCHS, NEW_BATCH, step)
        return model

    few = torch.cat([(labels == c).nonzero()[:OLD_IMAGES_PER_CLASS, 0] for c in range(OLD_CLASSES)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        progress.set_description(f"seed {seed}: old")
        old, old_loss = network(OLD_CHANNELS, OLD_WIDTH), new_loss(OLD_CLASSES, OLD_WIDTH)
        train(old, old_loss, images[few], labels[few], OLD_EPOCHS, OLD_BATCH, step)
        independent = fit("independent", new_loss(10, NEW_WIDTH), NEW_WIDTH)

        # The old model, run over the new training set: a centre for every digit, also for those it never saw.
        centers = ClassCenters.from_embeddings(embed(old, images), labels)
        # BCT: the old classifier, with pseudo rows for the new digits, judges the new model too.
        old_classifier = FrozenClassifier.from_loss(old_loss).extend(centers)
        bct = fit("bct", BCTLoss(new_loss(10, NEW_WIDTH), old_classifier, INFLUENCE_WEIGHT), NEW_WIDTH)
        # LCE: the new classes lie where the old ones lie; directly, or after a map from new to old space.
        lce = fit("lce", LCELoss(new_loss(10, OLD_WIDTH), centers), OLD_WIDTH)
        to_old = OrthogonalTransformation(NEW_WIDTH, OLD_WIDTH)
        lce_loss = LCELoss(new_loss(10, NEW_WIDTH), centers, backward_transformation=to_old)
        lce_backward = fit("lce_backward", lce_loss, NEW_WIDTH)
    models = {"old": old, "independent": independent, "bct": bct, "lce": lce, "lce_backward": lce_backward}
    embeddings = {name: embed(model, test_images) for name, model in models.items()}
    embeddings["lce_backward_query"] = embed(to_old, embeddings["lce_backward"])
    return embeddings


def searches(embeddings: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return what is measured: method, pair, and the names of the query's and the gallery's embeddings."""
    found = [("old", "old_to_old", "old", "old")]
    for method in NEW_METHODS:
        query = f"{method}_query" if f"{method}_query" in embeddings else method
        found += [(method, "new_to_old", query, "old"), (method, "new_to_new", method, method)]
    return found


def network(channels: int, width: int) -> torch.nn.Module:
    """A small convolutional network from 8 x 8 images to ``width`` numbers."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, width),
    )


def train(
    model: torch.nn.Module,
    loss_func: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    batch_size: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """An ordinary PML training loop; the loss's own parameters are trained with the model's."""
    lr = LEARNING_RATE * batch_size / 64
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=lr)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
        after_epoch()


@torch.no_grad()
def embed(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return unit-length embeddings."""
    return torch.nn.functional.normalize(model.eval()(images), dim=1)


def _examples(
    embeddings: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> list[RetrievalExample]:
    """One query each of the first digits that the old model never saw, and what it finds in the old gallery."""
    queries = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(OLD_CLASSES, OLD_CLASSES + _EXAMPLES)])

    def itself(rows: slice) -> torch.Tensor:
        return queries[rows, None] == torch.arange(len(labels))

    found = {}
    for method, pair, query_name, gallery in searches(embeddings):
        if pair == "new_to_old":
            narrow = fit_width(embeddings[query_name][queries], embeddings[gallery].shape[1])
            found[method] = torch.cat(list(nearest(narrow, embeddings[gallery], itself, _DEPTH)))
    return [
        RetrievalExample(
            images[query].numpy(),
            {m: [(images[g].numpy(), bool(labels[g] == labels[query])) for g in found[m][i]] for m in NEW_METHODS},
        )
        for i, query in enumerate(queries)
    ]


def _save_embeddings(
    folder: Path, embeddings: dict[str, torch.Tensor], labels: torch.Tensor, index: torch.Tensor
) -> None:
    folder.mkdir(parents=True)
    for name, array in {**embeddings, "labels": labels, "image_index": index}.items():
        np.save(folder / f"{name}.npy", array.numpy(), allow_pickle=False)


def _write(folder: Path, results: Results, examples: list[RetrievalExample], seconds: float) -> None:
    plot_compatibility(results, folder / "compatibility.png", examples)
    lines = [
        "# Upgrade report",
        "",
        f"{title(results)}. The criterion: new/old above old/old, in P@1 and in mAP.",
        "",
        markdown_table(results),
        "",
        *(f"- {verdict(results, method)}" for method in NEW_METHODS),
        "",
        "![new queries on the old gallery](compatibility.png)",
        "",
        f"Seeds {', '.join(map(str, results.seeds))}; {seconds:.0f} s on {torch.get_num_threads()} CPU threads "
        f"({platform.machine()}); pml-compat {__version__}, torch {torch.__version__}. "
        "The embeddings of the held-out images are in `embeddings/seed_*/`, one file a model.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(results.to_json(), indent=2) + "\n", encoding="utf-8")
