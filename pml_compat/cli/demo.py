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

import numpy as np
import torch
from tqdm import tqdm

from .. import __version__
from ..accuracy import CrossModelAccuracyCalculator
from ..accuracy.matches import EqualCodes
from ..accuracy.ranking import nearest
from ..extras import import_extra
from ..files import whole_folder
from ..report import (
    Results,
    RetrievalExample,
    markdown_table,
    plot_compatibility,
    rich_cost_table,
    rich_table,
    title,
    verdict,
)
from ..report.results import COSTS, CROSS_PAIRS, METRICS
from ..serving import two_stage_accuracy
from ..width import fit_width
from .demo_models import MAPS, METHODS, OLD_CLASSES, OLD_IMAGES_PER_CLASS, SERVED, count_epochs, split_in_half, upgrade

_EXAMPLES, _DEPTH = 3, 5
_CANDIDATES = 10  # of a search in two stages


def run_demo(out: Path, seeds: Sequence[int], methods: Sequence[str] = METHODS) -> Results:
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
    calculator = CrossModelAccuracyCalculator(include=tuple(METRICS), fit_width=True)
    examples: list[RetrievalExample] = []
    start = time.perf_counter()
    with whole_folder(out) as folder, tqdm(total=len(seeds) * count_epochs(methods), unit="epoch") as progress:
        for seed in seeds:
            train, test = split_in_half(labels, seed)
            found = upgrade(images[train], labels[train], images[test], seed, progress, methods)
            models = found.embeddings
            for method, pair, query, gallery in searches(methods, models):
                if method == "two_stage":
                    rows = models["old"], models["independent"]
                    both = (labels[test],) * 2
                    accuracies = two_stage_accuracy(*rows, *rows, *both, depth=_CANDIDATES, same_items=True)[
                        _CANDIDATES
                    ]
                else:
                    accuracies = calculator.get_accuracy(
                        models[query], labels[test], models[gallery], labels[test], ref_includes_query=True
                    )
                results.add(method, pair, accuracies)
            if set(methods) - set(METHODS):
                for method in methods:
                    costs = found.milliseconds[method], found.held_mib[method]
                    results.add_costs(method, dict(zip(COSTS, costs, strict=True)))
            _save_embeddings(folder / "embeddings" / f"seed_{seed}", models, labels[test], test)
            examples = examples or _examples(methods, models, images[test, 0], labels[test])
        counts = torch.bincount(labels[test]).double()
        # A random ranking's precision is the positives' share of the gallery, at every place: so is its mAP, nearly.
        share = float((counts * (counts - 1)).sum() / (len(test) * (len(test) - 1)))
        results.chance = {"precision_at_1": share, "mean_average_precision": share}
        progress.close()
        _write(folder, results, examples, time.perf_counter() - start)
    console.print(rich_table(results))
    if results.costs:
        console.print(rich_cost_table(results))
    for method in methods:
        console.print(verdict(results, method), highlight=False)
    console.print(f"Written to {out}: metrics.json, report.md, compatibility.png, embeddings/", highlight=False)
    return results


def searches(methods: Sequence[str], embeddings: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Return what is measured: method, pair, and the names of the query's and the gallery's embeddings."""
    found = [("old", "old_to_old", "old", "old")]
    for method in methods:
        if method in MAPS:
            found.append((method, "new_to_transformed_old", "independent", f"{method}_gallery"))
            continue
        if method in SERVED:
            found.append((method, "new_to_old", "old" if method == "two_stage" else method, "old"))
            continue
        query = f"{method}_query" if f"{method}_query" in embeddings else method
        found += [(method, "new_to_old", query, "old"), (method, "new_to_new", method, method)]
    return found


def _examples(
    methods: Sequence[str], embeddings: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> list[RetrievalExample]:
    """One query each of the first digits that the old model never saw, and what it finds in the old gallery."""
    queries = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(OLD_CLASSES, OLD_CLASSES + _EXAMPLES)])

    itself = [EqualCodes(queries, torch.arange(len(labels)))]

    found = {}
    for method, pair, query_name, gallery in searches(methods, embeddings):
        if pair in CROSS_PAIRS:
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


def _write(folder: Path, results: Results, examples: list[RetrievalExample], seconds: float) -> None:
    plot_compatibility(results, folder / "compatibility.png", examples)
    lines = [
        "# Upgrade report",
        "",
        f"{title(results)}. The criterion: new/old above old/old, in P@1 and in mAP.",
        "",
        markdown_table(results),
        "",
        *(f"- {verdict(results, method)}" for method in results.new_methods()),
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
