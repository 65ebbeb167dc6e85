"""Time of the compatible head's parts, each against the matrix products that no exact implementation does without.

- **whitening**: ``WithinClassWhitening.from_embeddings`` of N rows, against one float64 product X^T X of them;
- **loss step**: forward and backward of ``CompatibleHeadLoss``'s added terms at batch B, against three products:
  whitening the batch's old embeddings, a B x B contrast, its gradient;
- **calibration**: ``MixedGallery.fit`` on M items, against its two M x M score matrices;
- **rows**: ``MixedGallery.new_rows``, against a copy of what it writes;
- **backfill scores**: ``backfill_scores`` by margin of a gallery, against the product of its rows with the centres.

Every time is a median of repeats that take turns in one process.

    python benchmarks/compatible_head.py --repeats 7
"""

import argparse
import statistics
import time

import torch
from frozen_classifier import hardware
from torch.nn.functional import normalize

from pml_compat.frozen import ClassCenters, WithinClassWhitening
from pml_compat.gallery import backfill_scores
from pml_compat.heads import CompatibleHead
from pml_compat.losses import CompatibleHeadLoss
from pml_compat.serving import MixedGallery

WIDTH, CLASSES = 512, 1000


class NoTask(torch.nn.Module):
    """A task loss that costs nothing: what is left are the added terms."""

    def forward(self, embeddings, labels, *others):
        """Return 0, with a gradient."""
        return embeddings[0, 0] * 0


def pairs(device, rows, batch, items):
    """Yield what is measured: its name, size, ours and the peer."""
    torch.manual_seed(0)
    labels = torch.arange(rows, device=device) % CLASSES
    old = torch.randn(CLASSES, WIDTH, device=device)[labels] + torch.randn(rows, WIDTH, device=device)
    double = normalize(old.double(), dim=1)
    yield (
        "whitening",
        f"{rows} x {WIDTH}",
        lambda: WithinClassWhitening.from_embeddings(old, labels),
        lambda: double.t() @ double,
    )

    whitening = WithinClassWhitening.from_embeddings(old, labels)
    head = CompatibleHead(WIDTH, WIDTH, whitening=whitening).to(device)
    loss_func = CompatibleHeadLoss(NoTask(), head)
    z = torch.randn(batch, head.out_features, device=device)
    some = old[:batch]

    def step():
        loss_func(z.clone().requires_grad_(), labels[:batch], ref_emb=some).backward()

    part = z[:, :WIDTH].contiguous()

    def products():
        whitened = some @ head.whitening.matrix
        scores = part @ whitened.t()
        return scores @ whitened

    yield "loss step", f"B = {batch}, D = {WIDTH}", step, products

    new = old[:items] + torch.randn(items, WIDTH, device=device)
    unit, stored = normalize(new, dim=1), normalize(old[:items], dim=1)
    yield (
        "calibration",
        f"{items} items",
        lambda: MixedGallery.fit(new, old[:items], labels[:items], new, max_rows=items),
        lambda: (unit @ stored.t(), unit @ unit.t()),
    )

    mixed = MixedGallery(WIDTH, WIDTH, (10.0, -5.0), (12.0, -8.0))
    written = mixed.new_rows(old)
    yield "rows", f"{rows} x {mixed.width}", lambda: mixed.new_rows(old), written.clone

    centers = ClassCenters.from_embeddings(old, labels, boundary=None).centers
    yield (
        "backfill scores",
        f"{rows} x {WIDTH}, {CLASSES} classes",
        lambda: backfill_scores(old, labels),
        lambda: [block @ centers.t() for block in old.split(8192)],
    )


def measure(steps, repeats, device):
    """Return the median seconds of each step."""
    times = [[] for _ in steps]
    for repeat in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def main(rows, batch, items, repeats, device):
    print(f"{hardware(device)}; torch {torch.__version__}; D = {WIDTH}; medians of {repeats} repeats.\n")
    print("| what | size | ms | products or copy, ms | ratio |")
    print("|---|---|---:|---:|---:|")
    for name, size, ours, peer in pairs(device, rows, batch, items):
        mine, bare = measure([ours, peer], repeats, device)
        print(f"| {name} | {size} | {1000 * mine:.2f} | {1000 * bare:.2f} | {mine / bare:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    main(arguments.rows, arguments.batch, arguments.items, arguments.repeats, arguments.device)
