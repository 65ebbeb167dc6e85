"""An epoch of fit_centers, against the same fit written with PML's loss, and against the bare matrix products.

*PML* is what a user would write: NormalizedSoftmaxLoss with all stored embeddings in memory, Adam, the same batches.
*products* are the two of each step that any exact fit needs, the logits and the gradient of the directions. Medians of
repeats that take turns.

    python benchmarks/fit_centers.py --classes 100 10000 --repeats 5
"""

import argparse
import statistics
import time

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

from pml_compat.frozen import fit_centers

BATCH, WIDTH = 1024, 128


def main(class_counts, rows, repeats):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; N = {rows}, D = {WIDTH}, batch {BATCH}")
    print("| C | fit_centers, s an epoch | / PML | / products |")
    print("|---:|---:|---:|---:|")
    for classes in class_counts:
        torch.manual_seed(0)
        labels = torch.arange(rows) % classes
        embeddings = torch.randn(classes, WIDTH)[labels] + torch.randn(rows, WIDTH)
        ways = {"ours": ours, "pml": pml, "products": products}
        seconds = {name: [] for name in ways}
        for _ in range(repeats + 1):  # the first warms up
            for name, way in ways.items():
                start = time.perf_counter()
                way(embeddings, labels, classes)
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        ratios = " | ".join(f"{median['ours'] / median[name]:.2f}" for name in ("pml", "products"))
        print(f"| {classes} | {median['ours']:.2f} | {ratios} |", flush=True)


def ours(embeddings, labels, classes):
    fit_centers(embeddings, labels, epochs=1, batch_size=BATCH, boundary=None, progress=False)


def pml(embeddings, labels, classes):
    loss_func = NormalizedSoftmaxLoss(classes, WIDTH, temperature=1 / 16)
    optimizer = torch.optim.Adam(loss_func.parameters(), 1e-2)
    for index in torch.randperm(len(labels)).split(BATCH):
        optimizer.zero_grad()
        loss_func(embeddings[index], labels[index]).backward()
        optimizer.step()


def products(embeddings, labels, classes):
    weight = torch.randn(classes, WIDTH)
    for index in torch.randperm(len(labels)).split(BATCH):
        rows = embeddings[index]
        (rows @ weight.t()).t() @ rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    main(options.classes, options.rows, options.repeats)
