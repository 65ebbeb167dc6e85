"""What the weight of each method's term does on digits, in the setting of the demo.

For every weight: new/old and new/new, P@1 / mAP in percent, means over seeds that the demo's results are not from. The
demo's weights are those with the highest mean of new/old's mAP and new/new's mAP.

    python benchmarks/method_weights.py --seeds 10 11 12
"""

import argparse

import torch
from frozen_classifier import hardware
from sklearn.datasets import load_digits
from tqdm import tqdm

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.cli import demo_methods, demo_models

METRICS = ("precision_at_1", "mean_average_precision")
GRID = {
    "bct": (1.0, 3.0, 10.0),
    "lce": (30.0, 100.0, 300.0),
    "unibct": (1.0, 3.0, 10.0),
    "cross_model": (0.3, 1.0, 3.0, 10.0),
    "ract": (0.3, 1.0, 3.0, 10.0),
    "point_alignment": (1.0, 3.0, 10.0),
    "lwf": (0.3, 1.0, 3.0, 10.0, 30.0),
    "focal_distillation": (1.0, 10.0, 100.0, 1000.0),
    "nccl": (0.3, 1.0, 3.0, 10.0),
    "advbct": (0.1, 0.3, 1.0, 3.0),
    "mixbct": (0.1, 0.3, 0.5, 0.7),
}


def measure(seed, methods, weight):
    """Return {method: accuracies of new/old and new/new}, each method at its own weight of that number."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = demo_models.split_in_half(labels, seed)
    demo_methods.WEIGHTS.update({method: GRID[method][weight] for method in methods})
    found = demo_models.upgrade(images[train], labels[train], images[test], seed, tqdm(disable=True), methods)
    accuracy = CrossModelAccuracyCalculator(include=METRICS)
    measured = {}
    for method in methods:
        new, out = found.embeddings[method], []
        for gallery in (found.embeddings["old"], new):
            got = accuracy.get_accuracy(new, labels[test], gallery, labels[test], ref_includes_query=True)
            out += [got[metric] for metric in METRICS]
        measured[method] = torch.tensor(out)
    return measured


def main(seeds, methods):
    print(f"{hardware('cpu')}; torch {torch.__version__}; seeds {' '.join(map(str, seeds))}.\n")
    print("| method | weight | new/old | new/new |\n|---|---:|---:|---:|")
    for place in range(max(len(GRID[method]) for method in methods)):
        at_hand = [method for method in methods if place < len(GRID[method])]
        runs = [measure(seed, at_hand, place) for seed in seeds]
        for method in at_hand:
            values = (100 * torch.stack([run[method] for run in runs]).mean(0)).tolist()
            cells = "{:.1f} / {:.1f} | {:.1f} / {:.1f}".format(*values)
            print(f"| {method} | {GRID[method][place]:g} | {cells} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID))
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.methods)
