"""What LCE's two terms add to a classification step, and how that grows with the classes.

A step is a forward and a backward pass to the embeddings and the class weights, B = 256, D = 512, direct mode:

- ``task`` alone: PML's ``ArcFaceLoss`` or ``NormalizedSoftmaxLoss``, or a bare ``F.linear`` and ``cross_entropy``;
- ``LCELoss`` around it, with both terms, and with each term alone.

For the bare linear layer, which is no PML loss, the terms' time is that of ``LCELoss`` around a task that does nothing
with the weights. Every ratio is one of medians of repeats that take turns in one process.

    python benchmarks/lce_terms.py --classes 10000 100000 --repeats 9
"""

import argparse

import torch
from frozen_classifier import BATCH, WIDTH, hardware, measure_times
from pytorch_metric_learning.losses import ArcFaceLoss, NormalizedSoftmaxLoss

from pml_compat.frozen import ClassCenters
from pml_compat.losses import LCELoss

GOAL = 0.15  # of the task step


class BareLinear(torch.nn.Module):
    """The least that a classifier can do."""

    def __init__(self, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, WIDTH) * 0.05)

    def forward(self, embeddings, labels):
        """Return the mean cross-entropy."""
        logits = torch.nn.functional.linear(embeddings, self.weight)
        return torch.nn.functional.cross_entropy(logits, labels)


class Nothing(NormalizedSoftmaxLoss):
    """Class weights, and a loss that does not use them: what is left is the cost of the terms."""

    def compute_loss(self, embeddings, *_):
        """Return 0."""
        return self.zero_losses()


def main(class_counts, repeats, device):
    print(f"{hardware(device)}; torch {torch.__version__}; B = {BATCH}, D = {WIDTH}; medians of {repeats} repeats.")
    print(f"Goal: both terms add at most {GOAL:.0%} to the classification step.\n")
    print("| C | step | ms | added, of ArcFace | of NormalizedSoftmax | of bare linear |")
    print("|---:|---|---:|---:|---:|---:|")
    for classes in class_counts:
        torch.manual_seed(0)
        embeddings = torch.randn(BATCH, WIDTH, device=device)
        labels = torch.randint(classes, (BATCH,), device=device)
        boundaries = torch.full((classes,), 0.5)
        centers = ClassCenters(torch.randn(classes, WIDTH), torch.arange(classes), boundaries).to(device)
        tasks = {
            "ArcFaceLoss": ArcFaceLoss(classes, WIDTH).to(device),
            "NormalizedSoftmaxLoss": NormalizedSoftmaxLoss(classes, WIDTH).to(device),
            "F.linear + cross_entropy": BareLinear(classes).to(device),
        }
        nothing = Nothing(classes, WIDTH).to(device)
        whole = {
            **tasks,
            "LCELoss(ArcFaceLoss)": LCELoss(ArcFaceLoss(classes, WIDTH).to(device), centers),
            "LCELoss(NormalizedSoftmaxLoss)": LCELoss(NormalizedSoftmaxLoss(classes, WIDTH).to(device), centers),
        }
        nothing = Nothing(classes, WIDTH).to(device)
        terms = {
            "both terms": LCELoss(nothing, centers),
            "alignment": LCELoss(nothing, centers, boundary_weight=0.0),
            "boundary": LCELoss(nothing, centers, align_weight=0.0),
        }
        times = measure(whole, embeddings, labels, repeats)
        for name, loss in terms.items():  # beside nothing else, as the others would empty the caches
            found = measure({"nothing": nothing, name: loss}, embeddings, labels, 3 * repeats)
            times[name] = found[name] - found["nothing"]
        for name in (*tasks, "LCELoss(ArcFaceLoss)", "LCELoss(NormalizedSoftmaxLoss)"):
            task = name.removeprefix("LCELoss(").removesuffix(")")
            added = "" if task == name else f"{times[name] / times[task] - 1:.3f}"
            cells = [added if task.startswith(kind) else "" for kind in ("Arc", "Normalized", "F.")]
            print(f"| {classes} | {name} | {1000 * times[name]:.1f} | {' | '.join(cells)} |")
        for name in terms:
            cells = [f"{times[name] / times[task]:.3f}" for task in tasks]
            print(f"| {classes} | {name} alone | {1000 * times[name]:.2f} | {' | '.join(cells)} |", flush=True)


def measure(losses, embeddings, labels, repeats):
    steps = {name: (loss, list(loss.parameters())) for name, loss in losses.items()}
    return measure_times(steps, embeddings, labels, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    main(arguments.classes, arguments.repeats, arguments.device)
