"""Which knob governs LCE? New/old accuracy on digits by task loss, weights of the terms, and length of class weights.

Everything is as in `pml-compat demo`, on seeds the demo does not use. ``angle`` is what is left between class weights
and old centres after the training, in degrees.

    python benchmarks/lce_settings.py
"""

import argparse
import statistics

import torch
from pytorch_metric_learning.losses import ArcFaceLoss, NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from tqdm import tqdm

from pml_compat.accuracy import compatibility_matrix
from pml_compat.cli import demo_models as demo
from pml_compat.cli.demo_methods import task_loss
from pml_compat.frozen import ClassCenters, class_weights
from pml_compat.losses import LCELoss

WIDTH = demo.OLD_WIDTH
TASKS = {
    "softmax, scale 4": lambda: NormalizedSoftmaxLoss(10, WIDTH, temperature=1 / 4),
    "ArcFace, scale 16, margin 0.1 rad": lambda: ArcFaceLoss(10, WIDTH, scale=16, margin=5.73),
}
PAPER = {"class_weight_length": None}
SETTINGS = {  # the weights (align, boundary) as in the paper, but where a name says otherwise
    "paper": PAPER,
    "paper, align x 10": {**PAPER, "align_weight": 1000.0},
    "paper, align x 100": {**PAPER, "align_weight": 10000.0},
    "paper, boundary x 10": {**PAPER, "boundary_weight": 10.0},
    "length 1": {"class_weight_length": 1.0},
    "length 0.1 (default)": {},
    "length 0.1, align x 10": {"align_weight": 1000.0},
    "length 0.1, align 0": {"align_weight": 0.0},
    "length 0.1, boundary 0": {"boundary_weight": 0.0},
    "length 0.1, boundary x 10": {"boundary_weight": 10.0},
    "length 0.1, cosine boundary": {"boundary": "cosine"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    seeds = parser.parse_args().seeds
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    rows = {(task, name): [] for task in TASKS for name in SETTINGS}
    old_rows = []
    with tqdm(total=len(seeds) * len(rows)) as progress:
        for seed in seeds:
            torch.manual_seed(seed)
            train, test = demo.split_in_half(labels, seed)
            x, y = images[train], labels[train]
            few = torch.cat([(y == c).nonzero()[: demo.OLD_IMAGES_PER_CLASS, 0] for c in range(demo.OLD_CLASSES)])
            old = demo.network(demo.OLD_CHANNELS, WIDTH)
            old_loss = task_loss(demo.OLD_CLASSES, WIDTH)
            demo.train(old, old_loss, x[few], y[few], demo.OLD_EPOCHS, demo.OLD_BATCH)
            centers = ClassCenters.from_embeddings(demo.embed(old, x), y)
            embeddings = {"old": demo.embed(old, images[test])}
            for task, name in rows:
                torch.manual_seed(seed)
                loss_func = LCELoss(TASKS[task](), centers, **SETTINGS[name])
                model = demo.network(demo.NEW_CHANNELS, WIDTH)
                demo.train(model, loss_func, x, y, demo.NEW_EPOCHS, demo.NEW_BATCH)
                embeddings["new"] = demo.embed(model, images[test])
                matrix = compatibility_matrix(embeddings, labels[test])
                directions = torch.nn.functional.normalize(class_weights(loss_func).detach(), dim=1)
                angle = (directions * centers.centers).sum(1).clamp(-1, 1).arccos().rad2deg().mean().item()
                rows[task, name].append((matrix["new"]["old"], matrix["new"]["new"], angle))
                progress.update()
            old_rows.append(matrix["old"]["old"])

    def mean(accuracies):
        metrics = ("precision_at_1", "mean_average_precision")
        return " / ".join(f"{100 * statistics.fmean(a[metric] for a in accuracies):.1f}" for metric in metrics)

    print(f"P@1 / mAP in percent, mean of seeds {seeds}; old/old {mean(old_rows)}\n")
    print("| task loss | setting | new/old | new/new | angle |\n| --- | --- | ---: | ---: | ---: |")
    for (task, name), values in rows.items():
        to_old, to_new, angles = zip(*values, strict=True)
        print(f"| {task} | {name} | {mean(to_old)} | {mean(to_new)} | {statistics.fmean(angles):.0f} |")


if __name__ == "__main__":
    main()
