"""What ``fit_best`` chooses and reaches, against each map that it tries: a mapped gallery, searched by the new model.

Maps are fitted to training images, old and new model trained apart, and measured on test images that no map has seen.

    python benchmarks/best_map.py digits fashion_classes --seeds 0 1 2 --threads 1

With ``--deviations`` the other way round: new queries mapped into the old space, by a rotation, by linear maps that are
held to a deviation from one, and by a free one; and what the mapped queries find among themselves.

    python benchmarks/best_map.py digits fashion_classes --deviations 0.5 1 2 4 12

What is trained is kept in ``--folder``, in the form of ``defaults.py``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from defaults import Runs, measure
from frozen_classifier import hardware
from torch.nn.functional import normalize

from pml_compat.transformations import LinearTransformation, OrthogonalTransformation, Transformation, fit_best
from pml_compat.transformations.best import candidates, fitted


def percent(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values)


def measured(runs: Runs, labelled: bool) -> dict[str, tuple[list[float], str]]:
    """Return P@1 and mAP on test images, and a note, of each map and of what ``fit_best`` returns."""
    source, target = (runs.embeddings(which, "train") for which in ("old", "independent"))
    old, new, test_labels = runs.embeddings("old"), runs.embeddings("independent"), runs.problem.test_labels
    labels = runs.problem.labels if labelled else None

    @torch.no_grad()
    def on_test_images(transformation: Transformation) -> list[float]:
        return measure(new, transformation(old), test_labels)

    start = time.process_time()
    best = fit_best(source, target, labels, seed=runs.seed, progress=False)
    seconds = time.process_time() - start
    tried = best.tried
    chosen = tried.best
    found = {
        "old/old": (measure(old, old, test_labels), ""),
        "new/new": (measure(new, new, test_labels), ""),
        "fit_best": (on_test_images(best), f"{chosen}, {seconds:.0f} s of the processor"),
    }
    arrays, maps = {"source": source, "target": target}, candidates(source.shape[1], target.shape[1], None)
    for name in maps:
        transformation = best if name == chosen else fitted(name, maps, arrays, runs.seed)
        held_out = percent([tried[name][key] for key in ("precision_at_1", "mean_average_precision")])
        found[name] = (on_test_images(transformation), f"held out {held_out}")
    return found


@torch.no_grad()
def deviating(runs: Runs, deviations: list[float]) -> dict[str, tuple[list[float], str]]:
    """Return P@1 and mAP of mapped queries in the old gallery, and among themselves as a note."""
    (source, target), (new, old) = (
        [normalize(runs.embeddings(which, part), dim=1) for which in ("independent", "old")]
        for part in ("train", "test")
    )
    labels, widths = runs.problem.test_labels, (source.shape[1], target.shape[1])
    maps = {"rotation": OrthogonalTransformation(*widths).fit(source, target)}
    for deviation in deviations:
        linear = LinearTransformation(*widths, bias=False)
        maps[f"deviation {deviation:g}"] = linear.fit(source, target, deviation=deviation)
    maps["linear"] = LinearTransformation(*widths, bias=False).fit(source, target)
    found = {"old/old": (measure(old, old, labels), ""), "new/new": (measure(new, new, labels), "")}
    for name, transformation in maps.items():
        mapped = transformation(new)
        found[name] = (measure(mapped, old, labels), f"among themselves {percent(measure(mapped, mapped, labels))}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="+")
    parser.add_argument("--task", default="ArcFace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-labels", action="store_true", help="give fit_best no labels")
    parser.add_argument("--deviations", type=float, nargs="+", help="of mapped queries, in place of fit_best")
    parser.add_argument("--folder", type=Path, default=Path("runs/defaults"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{hardware('cpu')}; torch {torch.__version__}; P@1 / mAP in percent, by cosine\n")
    for protocol in options.protocols:
        every = []
        for seed in options.seeds:
            runs = Runs(options.folder, protocol, options.task, seed, held_out=False)
            deviations = options.deviations
            every.append(deviating(runs, deviations) if deviations else measured(runs, not options.without_labels))
        print(f"| {protocol} | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | mean |")
        print("| --- |" + " ---: |" * (len(every) + 1))
        for name in every[0]:
            values = [found[name][0] for found in every]
            cells = [f"{percent(value)} {note and f'({note})'}" for value, note in (found[name] for found in every)]
            mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
            print(f"| {name} | " + " | ".join(cells) + f" | {percent(mean)} |", flush=True)
        print()
