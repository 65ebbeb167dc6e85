"""The cost of a training step of BCT, LCE, FCT and point alignment against the bare formula: prints ratios.

One thread, B = 256, D = 128, C = 100, forward and backward, in processor time, which a busy machine hardly changes;
medians of rounds that take turns, and of their ratios.
``python benchmarks/loss_steps.py``
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from torch.nn.functional import normalize

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import BCTLoss, FCTLoss, LCELoss, PointAlignmentLoss

B, D, C = 256, 128, 100
ROUNDS, STEPS = 30, 20
Step = Callable[[], torch.Tensor]


def steps() -> dict[str, tuple[Step, Step]]:
    """Return of each loss its step, and that of its formula."""
    embeddings, old, labels = torch.randn(B, D, requires_grad=True), torch.randn(B, D), torch.randint(C, (B,))
    centers = ClassCenters.from_embeddings(torch.randn(1000, D), torch.arange(1000) % C)
    task, aims = NormalizedSoftmaxLoss(C, D), centers.directions
    bct = BCTLoss(task, FrozenClassifier.from_centers(centers))
    lce = LCELoss(task, centers)
    fct, points = FCTLoss(), PointAlignmentLoss()

    def bare_bct() -> torch.Tensor:
        return task(embeddings, labels) + (1 - (normalize(embeddings, dim=1) * aims[labels]).sum(1)).mean()

    def bare_lce() -> torch.Tensor:
        return bare_bct() + (normalize(task.W, dim=0) - aims.t()).square().mean()

    return {
        "BCTLoss": (lambda: bct(embeddings, labels), bare_bct),
        "LCELoss": (lambda: lce(embeddings, labels), bare_lce),
        "FCTLoss": (lambda: fct(embeddings, ref_emb=old), lambda: (embeddings - old).square().mean()),
        "PointAlignmentLoss": (
            lambda: points(embeddings, ref_emb=old),
            lambda: (normalize(embeddings, dim=1) - normalize(old, dim=1)).square().sum(1).mean(),
        ),
    }


def microseconds(step: Step) -> float:
    start = time.process_time()
    for _ in range(STEPS):
        step().backward()
    return (time.process_time() - start) / STEPS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, (ours, bare) in steps().items():
        for _ in range(2):  # the multipliers are measured at the first calls, and then seldom
            microseconds(ours), microseconds(bare)
        times = [(microseconds(ours), microseconds(bare)) for _ in range(ROUNDS)]
        one, other = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(ours / bare for ours, bare in times)
        print(f"{name:20} {one:7.0f} us, bare {other:7.0f} us, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
