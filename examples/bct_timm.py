"""Swap one timm backbone for another, of another family and with a wider embedding, and keep the stored vectors.

The old system is a ConvNeXt, trained with cross-entropy on 100 images of the digits 0 to 4; the new one is a ResNet,
trained on all ten. ``FrozenModel`` is the network that filled the gallery; the class centres of its embeddings are the
old classifier of the backward-compatible training (BCT). The data is scikit-learn's digits, enlarged to 32 x 32; no
weights are downloaded.

    pip install "pml-compat[demo,timm]"
    python examples/bct_timm.py
"""

import argparse

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, interpolate, normalize

from pml_compat.frozen import ClassCenters, FrozenClassifier, FrozenModel
from pml_compat.losses import BCTLoss
from pml_compat.upgrade import compatibility_matrix

try:
    import timm
except ImportError as error:
    raise ImportError('timm is not installed; run: pip install "pml-compat[timm]"') from error

SEED = 0
OLD_BACKBONE, OLD_WIDTH = "convnext_atto", 64
NEW_BACKBONE, NEW_WIDTH = "resnet10t", 128


def main(epochs):
    torch.manual_seed(SEED)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    images = interpolate(images, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)
    train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=SEED)
    train_images, train_labels = images[train_index], labels[train_index]

    # What you already have: a network and its linear classifier.
    few = torch.cat([(train_labels == digit).nonzero()[:20, 0] for digit in range(5)])
    old_network, old_layer = make_network(OLD_BACKBONE, OLD_WIDTH), torch.nn.Linear(OLD_WIDTH, 5)

    def old_loss(embeddings, labels):
        return cross_entropy(old_layer(embeddings), labels)

    train([old_network, old_layer], old_loss, train_images[few], train_labels[few], epochs=30)

    # The upgrade: the old class centres judge the first 64 of the new embedding's 128 numbers.
    frozen_network = FrozenModel(old_network)
    centers = ClassCenters.from_embeddings(embed(frozen_network, train_images), train_labels)
    old_classifier = FrozenClassifier.from_centers(centers)
    new_network = make_network(NEW_BACKBONE, NEW_WIDTH)
    new_loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=NEW_WIDTH)
    loss_func = BCTLoss(new_loss, old_classifier)
    train([new_network, loss_func], loss_func, train_images, train_labels, epochs)

    networks = {"old": frozen_network, "new": new_network.eval()}
    embeddings = {name: embed(network, images[test_index]) for name, network in networks.items()}
    matrix = compatibility_matrix(embeddings, labels[test_index])
    print(f"old: {OLD_BACKBONE}, {OLD_WIDTH} wide; new: {NEW_BACKBONE}, {NEW_WIDTH} wide")
    print("query/gallery    P@1    mAP")
    for query, gallery in (("old", "old"), ("new", "old"), ("new", "new")):
        accuracy = matrix[query][gallery]
        print(f"{query}/{gallery}       {accuracy['precision_at_1']:7.1%}{accuracy['mean_average_precision']:7.1%}")


def make_network(backbone, width):
    trunk = timm.create_model(backbone, pretrained=False, num_classes=0)
    return torch.nn.Sequential(trunk, torch.nn.Linear(trunk.num_features, width))


def train(modules, loss_func, images, labels, epochs, batch_size=64, lr=1e-3):
    network = modules[0].train()
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=lr)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            loss_func(network(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def embed(network, images):
    return normalize(torch.cat([network(batch) for batch in images.split(256)]), dim=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the new network")
    main(parser.parse_args().epochs)
