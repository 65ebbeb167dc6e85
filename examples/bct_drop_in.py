"""What to change in a PML training script so that the new model's queries find the old model's vectors.

An ordinary script for scikit-learn's digits: a network, a PML loss, a plain PyTorch loop, PML's accuracies. The ten
lines that end in ``# upgrade`` are all there is to an upgrade by backward-compatible training (BCT): nine are new,
and the calculator's takes the place of PML's ``AccuracyCalculator``.

    pip install "pml-compat[demo]"
    python examples/bct_drop_in.py
"""

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pml_compat.accuracy import CrossModelAccuracyCalculator  # upgrade
from pml_compat.frozen import ClassCenters, FrozenClassifier  # upgrade
from pml_compat.losses import BCTLoss  # upgrade


def network(channels, width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, width),
    )


def train(model, loss_func, images, labels, epochs):
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=2e-3)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index]).backward()
            optimizer.step()


@torch.no_grad()
def embed(model, images):
    return torch.nn.functional.normalize(model.eval()(images), dim=1)


def show(name, accuracy):
    print(f"{name}  P@1 {accuracy['precision_at_1']:.1%}  mAP {accuracy['mean_average_precision']:.1%}")


def what_you_already_have(images, labels):
    """Stand for the old model and the loss it was trained with, which you load: 100 images of the digits 0 to 4."""
    few = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(5)])
    model, loss_func = network(channels=8, width=32), NormalizedSoftmaxLoss(5, embedding_size=32)
    train(model, loss_func, images[few], labels[few], epochs=30)
    return model, loss_func


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
train_images, train_labels = images[train_index], labels[train_index]
test_images, test_labels = images[test_index], labels[test_index]
old_model, old_loss = what_you_already_have(train_images, train_labels)  # upgrade

# Training: the old classifier, with pseudo rows for the digits it never saw, judges the new embeddings too.
model = network(channels=32, width=64)
loss_func = NormalizedSoftmaxLoss(num_classes=10, embedding_size=64)
centers = ClassCenters.from_embeddings(embed(old_model, train_images), train_labels)  # upgrade
loss_func = BCTLoss(loss_func, FrozenClassifier.from_loss(old_loss).extend(centers))  # upgrade
train(model, loss_func, train_images, train_labels, epochs=40)

# Evaluation, query model / gallery model: each held-out image searches all the others.
new = embed(model, test_images)
metrics = ("precision_at_1", "mean_average_precision")
calculator = CrossModelAccuracyCalculator(include=metrics, fit_width=True)  # upgrade
show("new/new", calculator.get_accuracy(new, test_labels))
old = embed(old_model, test_images)  # upgrade
show("new/old", calculator.get_accuracy(new, test_labels, old, test_labels, ref_includes_query=True))  # upgrade
show("old/old", calculator.get_accuracy(old, test_labels))  # upgrade
