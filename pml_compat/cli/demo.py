"""The demo: one upgrade from end to end on scikit-learn's digits, with nothing to download.

An old model has seen a few images of the digits 0 to 4. A new, larger model learns all ten:

- ``independent``: on its own;
- ``bct``: under the old classifier's influence;
- ``lce``: its class weights aligned with the old class centres, at the old width;
- ``lce_backward``: the same at its own width, with a map from new to old space, which its queries go through.

Or the new model stays ``independent``, and the stored old gallery is mapped into its space, without the images:

- ``fct``: by a transformation of the old embeddings;
- ``fct_side``: the same, given side-information that was stored beside them: the embeddings of a small network that
  learned from the images without any labels.

Or nothing is trained or mapped, and both models answer at query time:

- ``blended``: the independent model's query, rotated into the old space, blended with the old one;
- ``two_stage``: the old query's ten nearest, whose new vectors are made then, in the independent model's order.

More methods, all those of the library, are compared on request.

Then queries by one model search the other's gallery: the held-out images, all ten digits, each image left out of its
own ranking.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import __version__
from .._extras import import_extra
from .._files import whole_folder
from .._rows import fit_width
from ..accuracy.matches import EqualCodes
from ..accuracy.ranking import nearest
from ..report import comparison_table, plot_comparison, to_markdown
from ..report.comparison_plot import RetrievalExample
from ..report.comparison_table import cost_table
from ..report.comparison_words import method_in_words
from ..report.evaluation_table import to_rich
from ..upgrade import Comparison, Evaluation, evaluate
from ..upgrade.comparison import COSTS
from .demo_models import MAPS, METHODS, OLD_CLASSES, OLD_IMAGES_PER_CLASS, SERVED, count_epochs, split_in_half, upgrade

_EXAMPLES, _DEPTH = 3, 5
_CANDIDATES = 10  # of a search in two stages


def run_demo(out: Path, seeds: Sequence[int], methods: Sequence[str] = METHODS) -> Comparison:
    """Train, measure, print the table, and write metrics.json, report.md, compatibility.png and the embeddings.

    Args:
        out: the folder; its files appear together at the end, or not at all.
        seeds: all models are trained for each.
        methods: what to compare, of ``ALL_METHODS``; ``independent``, which the others are measured against, is always
            among them. Costs are in the table where there are others than the default ones.
    Raises:
        ImportError: the ``demo`` extra is not installed; raised before anything is computed.
        ValueError: a seed twice; ``out`` is a file.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must differ, got {list(seeds)}")
    methods = list(dict.fromkeys(["independent", *methods]))
    console = import_extra("rich.console", "demo").Console()
    import_extra("matplotlib.figure", "demo")
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    comparison = Comparison(
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
    examples: list[RetrievalExample] = []
    start = time.perf_counter()
    with whole_folder(out) as folder, tqdm(total=len(seeds) * count_epochs(methods), unit="epoch") as progress:
        for seed in seeds:
            train, test = split_in_half(labels, seed)
            found = upgrade(images[train], labels[train], images[test], seed, progress, methods)
            models = found.embeddings
            for method in methods:
                pair = f"two_stages_{_CANDIDATES}" if method == "two_stage" else None
                comparison.add(method, _evaluate(models, labels[test], method), pair)
            if set(methods) - set(METHODS):
                for method in methods:
                    costs = found.milliseconds[method], found.held_mib[method]
                    comparison.add_costs(method, dict(zip(COSTS, costs, strict=True)))
            _save_embeddings(folder / "embeddings" / f"seed_{seed}", models, labels[test], test)
            examples = examples or _examples(methods, models, images[test, 0], labels[test])
        progress.close()
        _write(folder, comparison, examples, time.perf_counter() - start)
    console.print(to_rich(comparison_table(comparison, narrow=True)))
    if comparison.costs:
        console.print(to_rich(cost_table(comparison)))
    for method in methods:
        console.print(method_in_words(comparison, method), highlight=False)
    console.print(f"Written to {out}: metrics.json, report.md, compatibility.png, embeddings/", highlight=False)
    return comparison


def _evaluate(models: dict[str, torch.Tensor], labels: torch.Tensor, method: str) -> Evaluation:
    """Evaluate a method's queries, on the old gallery and on its own; the held-out images are both."""
    old = models["old"]
    items: dict[str, Any] = {"same_items": True, "orders": 0, "blend": False}
    settings = {**items, "old_queries": old, "fit_width": True, "normalize": False, "depths": ()}
    if method in MAPS:
        query, settings["transformed_gallery"] = models["independent"], models[f"{method}_gallery"]
    elif method == "two_stage":
        query = settings["new_gallery"] = models["independent"]
        settings |= {"depths": [_CANDIDATES], "normalize": True}
    elif method == "blended" or f"{method}_query" in models:
        query = models.get(f"{method}_query", models[method])
    else:
        query = settings["new_gallery"] = models[method]
    found = evaluate(query, old, labels, labels, **settings)
    if method not in SERVED and f"{method}_query" in models:  # mapped back for the old gallery alone
        own = evaluate(models[method], models[method], labels, labels, normalize=False, **items)
        found.pairs["new_to_new"] = own.pairs["new_to_old"]
    return found


def searches(methods: Sequence[str], embeddings: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return how each method searches the old gallery: its name, and those of the query's and gallery's embeddings."""
    found = []
    for method in methods:
        if method in MAPS:
            found.append((method, "independent", f"{method}_gallery"))
        elif method == "two_stage":
            found.append((method, "old", "old"))
        else:
            found.append((method, f"{method}_query" if f"{method}_query" in embeddings else method, "old"))
    return found


def _examples(
    methods: Sequence[str], embeddings: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> list[RetrievalExample]:
    """One query each of the first digits that the old model never saw, and what it finds in the old gallery."""
    queries = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(OLD_CLASSES, OLD_CLASSES + _EXAMPLES)])

    itself = [EqualCodes(queries, torch.arange(len(labels)))]

    found = {}
    for method, query_name, gallery in searches(methods, embeddings):
        narrow = fit_width(embeddings[query_name][queries], embeddings[gallery].shape[1])
        depth = _CANDIDATES if method == "two_stage" else _DEPTH
        found[method] = torch.cat([rows for _, rows in nearest(narrow, embeddings[gallery], itself, depth)])
        if method == "two_stage":
            new = embeddings["independent"]
            distances = torch.linalg.vector_norm(new[found[method]] - new[queries][:, None], dim=2)
            found[method] = found[method].gather(1, distances.argsort(1))[:, :_DEPTH]
    return [
        RetrievalExample(
            images[query].numpy(),
            {m: [(images[g].numpy(), bool(labels[g] == labels[query])) for g in found[m][i]] for m in methods},
        )
        for i, query in enumerate(queries)
    ]


def _save_embeddings(
    folder: Path, embeddings: dict[str, torch.Tensor], labels: torch.Tensor, index: torch.Tensor
) -> None:
    folder.mkdir(parents=True)
    for name, array in {**embeddings, "labels": labels, "image_index": index}.items():
        np.save(folder / f"{name}.npy", array.numpy(), allow_pickle=False)


def _write(folder: Path, comparison: Comparison, examples: list[RetrievalExample], seconds: float) -> None:
    plot_comparison(comparison, folder / "compatibility.png", examples)
    table = comparison_table(comparison)
    lines = [
        "# Upgrade report",
        "",
        f"{table.title}. The criterion: new/old above old/old, in P@1 and in mAP; sure: the seeds in which the 95% "
        "intervals of both lie above.",
        "",
        to_markdown(table),
        "",
        *(f"- {method_in_words(comparison, method)}" for method in comparison.evaluations),
        "",
        "![new queries on the old gallery](compatibility.png)",
        "",
        f"Seeds {', '.join(map(str, comparison.seeds))}; {seconds:.0f} s on {torch.get_num_threads()} CPU threads "
        f"({platform.machine()}); pml-compat {__version__}, torch {torch.__version__}. "
        "The embeddings of the held-out images are in `embeddings/seed_*/`, one file a model.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    text = json.dumps(comparison.to_json(), indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
