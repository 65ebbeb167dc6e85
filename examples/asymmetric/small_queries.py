"""Asymmetric search: a large network embedded the gallery, a small and fast one asks.

The large network is what the losses call the old model: it stays, and so does every vector that it stored. The small
one is trained from scratch to find them, by each method below; it reads the vectors that the large one stored of the
training images, and never the large network itself. Both are timm's, without pretrained weights.

A part of the classes is learned, by both networks. ``closed`` are other images of these, ``open`` are all images of the
other classes. Queries and gallery are the same images; each query leaves its own image out.

    pip install "pml-compat[demo,timm]"
    python examples/asymmetric/small_queries.py --epochs 15                 # scikit-learn's digits
    python examples/asymmetric/small_queries.py --cifar DATA --images 150   # CIFAR-100, as in examples/cifar100
    python examples/asymmetric/small_queries.py --cifar DATA --methods BCT "PointAlignment alone"
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pml_compat import embed
from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.data import open_classes
from pml_compat.frozen import FrozenModel
from pml_compat.losses import (
    BCTLoss,
    CompatibleLoss,
    CSDLoss,
    D3StillLoss,
    PointAlignmentLoss,
    RAMLLoss,
    SSPLoss,
    shorten_class_weights,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar100"))

from data import Images, augment, hold_out, load, open_upgrade, scaled

WIDTH, BATCH = 128, 64
SAMPLE = 10_000  # stored vectors that neighbours and anchors are taken from
LABEL_FREE = ("PointAlignment", "CSD", "SSP", "D3still", "RAML")
BESIDE = ("independent", "BCT", *LABEL_FREE)  # with the task loss
ALONE = tuple(f"{name} alone" for name in LABEL_FREE)  # without it, and so without any label


def loss_of(method, classes, stored, labels):
    """Return a method's loss, built from what the large network stored of the training images."""
    task_loss = NormalizedSoftmaxLoss(classes, WIDTH)
    if method == "independent":
        return shorten_class_weights(task_loss)
    if method == "BCT":
        return BCTLoss(task_loss, (stored, labels))
    sample = stored[torch.randperm(len(stored))[:SAMPLE]]  # in practice: of the gallery itself, of any images
    label_free = {
        "PointAlignment": lambda: PointAlignmentLoss(),
        "CSD": lambda: CSDLoss(sample),
        "SSP": lambda: SSPLoss.from_embeddings(sample),
        "D3still": lambda: D3StillLoss(sample),
        "RAML": lambda: RAMLLoss(),
    }[method.removesuffix(" alone")]()
    return label_free if method in ALONE else CompatibleLoss(task_loss, label_free)


class Network(torch.nn.Module):
    """A timm network, from uint8 images to embeddings."""

    def __init__(self, name, size):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError('timm is not installed; run: pip install "pml-compat[timm]"') from error
        self.size = size
        self.trunk = timm.create_model(name, pretrained=False, num_classes=WIDTH)
        self.trunk.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Return ``(N, WIDTH)``."""
        return self.trunk(scaled(images, self.size))


def train(network, loss_func, data, views, epochs, lr, stored=None):
    """Train; a loss that reads stored vectors gets those of the batch's images, embedded as they are."""
    network.train()
    steps = len(data) // BATCH  # whole batches
    optimizer = torch.optim.AdamW([*network.parameters(), *loss_func.parameters()], lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    for _ in range(epochs):
        for index in torch.randperm(len(data))[: steps * BATCH].split(BATCH):
            reads = {"ref_emb": stored[index]} if getattr(loss_func, "needs_ref_emb", False) else {}
            optimizer.zero_grad()
            loss_func(network(views(data.images[index])), data.labels[index], **reads).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def milliseconds(network, images, repeats=50):
    """Return the least time an image takes, of a batch on one thread."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(repeats):
        start = time.perf_counter()
        network(images)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1000 * min(times) / len(images)


def digits(seed):
    """Return training and test images, half of scikit-learn's digits each, enlarged to 32 x 32."""
    found = load_digits()
    images = torch.nn.functional.interpolate(torch.tensor(found.images[:, None]) * 15, size=32, mode="bilinear")
    images = images.expand(-1, 3, -1, -1).to(torch.uint8)
    halves = train_test_split(range(len(images)), test_size=0.5, stratify=found.target, random_state=seed)
    return [Images(images[half], torch.tensor(found.target)[half]) for half in halves]


def row(name, network, test_sets, queries, galleries):
    """Return a line of the table: what a network costs, and what its queries find in each gallery, if there is one."""
    calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))
    cells = [name, f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} M"]
    images = next(iter(test_sets.values())).images
    cells += [f"{milliseconds(network, images[:batch]):.2f}" for batch in (1, 64)]
    for kind, part in test_sets.items():
        for references in galleries:
            if references is None:
                cells.append("")
                continue
            found = calculator.get_accuracy(
                queries[kind], part.labels, references[kind], part.labels, ref_includes_query=True
            )
            percent = [100 * found[metric] for metric in ("precision_at_1", "mean_average_precision")]
            cells.append("{:.1f} / {:.1f}".format(*percent))
    return f"| {' | '.join(cells)} |"


def main(options):
    whole = [load(options.cifar, part) for part in ("train", "test")] if options.cifar else digits(options.seed)
    views = augment if options.cifar else lambda images: images
    split = open_classes(whole[0].labels, old_classes=1, new_classes=options.classes, seed=options.seed)
    parts = open_upgrade(*whole, split)
    data = hold_out(parts.train, options.images, options.seed)[1] if options.images else parts.train
    test_sets, classes = {"closed": parts.calibration, "open": parts.test}, int(data.labels.max()) + 1
    print(f"{len(data)} training images of {classes} classes, tested on", end=" ")
    print(f"{len(test_sets['closed'])} (closed) and {len(test_sets['open'])} (open); P@1 / mAP in percent\n")
    columns = ["query network", "parameters", "ms an image, batch 1", "batch 64"]
    columns += [f"{kind}, {whose} gallery" for kind in test_sets for whose in ("large", "its own")]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}", flush=True)

    def embedded(network):
        return {kind: embed(network, part.images, progress=False) for kind, part in test_sets.items()}

    # What there is: a large network, and what it stored. It is not trained any more, and asked only to be compared.
    torch.manual_seed(options.seed)
    large, task_loss = Network(options.large, options.size), NormalizedSoftmaxLoss(classes, WIDTH)
    train(large, shorten_class_weights(task_loss), data, views, options.epochs, options.lr)
    frozen = FrozenModel(large, normalize=True)
    gallery, stored = embedded(frozen), embed(frozen, data.images, progress=False)
    print(row(options.large, large, test_sets, gallery, (gallery, None)), flush=True)

    for method in options.methods:
        torch.manual_seed(options.seed)
        small, loss_func = Network(options.small, options.size), loss_of(method, classes, stored, data.labels)
        train(small, loss_func, data, views, options.epochs, options.lr, stored)
        queries = embedded(small)
        print(row(f"{options.small}, {method}", small, test_sets, queries, (gallery, queries)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-100, in place of the digits")
    parser.add_argument("--large", default="resnet18", help="timm's name of the network that fills the gallery")
    parser.add_argument("--small", default="test_resnet", help="timm's name of the network that asks")
    parser.add_argument("--methods", nargs="+", choices=[*BESIDE, *ALONE], default=BESIDE, metavar="METHOD")
    parser.add_argument("--classes", type=int, default=0.8, help="classes that are learned; by default 0.8 of them")
    parser.add_argument("--images", type=int, help="training images a class; by default all")
    parser.add_argument("--size", type=int, help="pixels that images are enlarged to; by default 32, as they are")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the networks, and of the classes that are learned")
    main(parser.parse_args())
