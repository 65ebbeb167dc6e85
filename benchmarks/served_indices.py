"""Does the served index survive a gallery that is mapped? Fashion-MNIST, an old gallery of 40,000 images, FAISS.

The old model learns 5 of the 10 classes, the new one all; the stored gallery is mapped by FCT. For each kind of index:
P@1 of old queries in the old gallery, of new queries in the mapped one and in one embedded anew, and how many of the
ten nearest by exact search the index finds. Its lists and codes are trained on what it holds; in the last column on the
old vectors, as if the index had been kept and only its vectors changed.

    python benchmarks/served_indices.py
"""

from __future__ import annotations

import argparse

import faiss
import numpy as np
import torch
import upgrades
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

from pml_compat.transformations import FCTTransformation, fit_transformation

INDICES = ("Flat", "HNSW32,Flat", "SQ8", "SQ4", "IVF200,Flat", "PQ16x8", "IVF200,PQ16x8")


def embeddings(seed: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Train both models; return the embeddings of training images, gallery and queries, and their labels."""
    protocol = upgrades.PROTOCOLS["fashion_classes"]
    images, labels = upgrades._fashion_part("train")
    others, other_labels = upgrades._fashion_part("t10k")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, gallery = order[:12000], order[12000:52000]
    parts = {"train": images[train], "gallery": images[gallery], "queries": others[:2000]}
    known = {"train": labels[train], "gallery": labels[gallery], "queries": other_labels[:2000]}
    found = {}
    for name, rows in (("old", train[labels[train] < 5]), ("new", train)):
        torch.manual_seed(seed)
        network = protocol.network()
        protocol.train(network, NormalizedSoftmaxLoss(10, protocol.width), images[rows], labels[rows])
        found[name] = {part: torch.nn.functional.normalize(protocol.embed(network, own)) for part, own in parts.items()}
    return found, known


def searched(kind: str, gallery: np.ndarray, queries: np.ndarray, trained_on: np.ndarray) -> np.ndarray:
    """Return the ten nearest rows by an index."""
    index = faiss.index_factory(gallery.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(trained_on)
    index.add(gallery)
    if hasattr(index, "nprobe"):
        index.nprobe = 16
    return index.search(queries, 10)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    cells: dict[str, list[list[float]]] = {kind: [] for kind in INDICES}
    for seed in options.seeds:
        found, known = embeddings(seed)
        width = found["old"]["train"].shape[1]
        old_to_new = FCTTransformation(width, width)
        fit_transformation(old_to_new, found["old"]["train"], found["new"]["train"], seed=seed, progress=False)
        mapped = old_to_new.apply_to(found["old"]["gallery"], normalize=True, progress=False)
        old, new = ({part: rows.numpy() for part, rows in found[name].items()} for name in ("old", "new"))
        cases = (
            (old["queries"], old["gallery"], old["gallery"]),
            (new["queries"], mapped, mapped),
            (new["queries"], new["gallery"], new["gallery"]),
            (new["queries"], mapped, old["gallery"]),
        )
        labels, right = known["gallery"].numpy(), known["queries"].numpy()
        for kind in INDICES:
            row = []
            for queries, gallery, trained_on in cases:
                nearest = searched(kind, gallery, queries, trained_on)
                exact = searched("Flat", gallery, queries, gallery)
                same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(nearest, exact, strict=True)])
                first = nearest[:, 0]
                row += [100 * float(np.mean((labels[first] == right) & (first >= 0))), 100 * float(same)]
            cells[kind].append(row)
    print("P@1 / share of the ten nearest that are found, percent\n")
    print("| index | old/old | new/mapped | new/new | new/mapped, trained on old vectors |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, rows in cells.items():
        means = np.mean(rows, axis=0).reshape(-1, 2)
        print(f"| {kind} | " + " | ".join(f"{first:.1f} / {same:.1f}" for first, same in means) + " |")


if __name__ == "__main__":
    main()
