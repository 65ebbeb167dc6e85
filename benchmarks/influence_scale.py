"""How soft should the old classifier be? New/old accuracy on digits by cosine scale and influence weight.

Everything is as in `pml-compat demo`, on seeds the demo does not use, but for the old classifier: class centres as
cosine rows (`FrozenClassifier.from_centers`) at several scales, under several influence weights; with `--fit`,
directions fitted to the old embeddings at the same scale in their place.

    python benchmarks/influence_scale.py
    python benchmarks/influence_scale.py --fit
"""

import argparse
import statistics

import torch
from sklearn.datasets import load_digits
from tqdm import tqdm

from pml_compat.accuracy import compatibility_matrix
from pml_compat.cli import demo_models as demo
from pml_compat.cli.demo_methods import task_loss
from pml_compat.frozen import ClassCenters, FrozenClassifier, fit_centers
from pml_compat.losses import BCTLoss


def fit(channels, width, loss_func, images, labels, epochs, batch_size):
    model = demo.network(channels, width)
    demo.train(model, loss_func, images, labels, epochs, batch_size)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--fit", action="store_true", help="fit_centers at each scale, in place of class means")
    options = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    settings = [(scale, weight) for weight in options.weights for scale in options.scales]
    rows = {setting: [] for setting in ["old/old", *settings]}
    with tqdm(total=len(options.seeds) * len(settings)) as progress:
        for seed in options.seeds:
            torch.manual_seed(seed)
            train, test = demo.split_in_half(labels, seed)
            x, y = images[train], labels[train]
            few = torch.cat([(y == c).nonzero()[: demo.OLD_IMAGES_PER_CLASS, 0] for c in range(demo.OLD_CLASSES)])
            old_loss = task_loss(demo.OLD_CLASSES, demo.OLD_WIDTH)
            old = fit(demo.OLD_CHANNELS, demo.OLD_WIDTH, old_loss, x[few], y[few], demo.OLD_EPOCHS, demo.OLD_BATCH)
            old_train = demo.embed(old, x)
            means = ClassCenters.from_embeddings(old_train, y)
            embeddings = {"old": demo.embed(old, images[test])}
            for scale, weight in settings:
                centers = fit_centers(old_train, y, scale=scale, progress=False) if options.fit else means
                torch.manual_seed(seed)
                classifier = FrozenClassifier.from_centers(centers, scale=scale)
                loss_func = BCTLoss(task_loss(10, demo.NEW_WIDTH), classifier, weight)
                model = fit(demo.NEW_CHANNELS, demo.NEW_WIDTH, loss_func, x, y, demo.NEW_EPOCHS, demo.NEW_BATCH)
                embeddings["new"] = demo.embed(model, images[test])
                matrix = compatibility_matrix(embeddings, labels[test])
                rows[scale, weight].append((matrix["new"]["old"], matrix["new"]["new"]))
                progress.update()
            rows["old/old"].append((matrix["old"]["old"], None))

    def mean(accuracies):
        metrics = ("precision_at_1", "mean_average_precision")
        return " / ".join(f"{100 * statistics.fmean(a[metric] for a in accuracies):.1f}" for metric in metrics)

    print(f"P@1 / mAP in percent, mean of seeds {options.seeds}; old/old {mean([o for o, _ in rows['old/old']])}\n")
    print("| scale | influence weight | new/old | new/new |\n| ---: | ---: | ---: | ---: |")
    for scale, weight in settings:
        to_old, to_new = zip(*rows[scale, weight], strict=True)
        print(f"| {scale:g} | {weight:g} | {mean(to_old)} | {mean(to_new)} |")


if __name__ == "__main__":
    main()
