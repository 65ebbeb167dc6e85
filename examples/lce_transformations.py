"""LCE with transformations: while the new model is trained, and between two models that are finished.

An old model (64 wide, 200 images of the digits 0 to 4) and new ones (96 wide, all digits). Whether the gallery or the
queries are mapped is the choice of who serves them:

- forward: the stored gallery is mapped into the new space, once, and the queries stay as they are;
- backward: the queries are mapped into the old space, and gallery and index stay as they are.

First the new model learns with the maps (``LCELoss``), then both models are finished and only their stored embeddings
are left (``LCETransformationLoss``), beside two maps in closed form that need the same items embedded by both models.

    pip install "pml-compat[demo]"
    python examples/lce_transformations.py
"""

import tempfile
from pathlib import Path

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import ClassCenters
from pml_compat.losses import LCELoss, LCETransformationLoss
from pml_compat.transformations import (
    LinearTransformation,
    OrthogonalTransformation,
    ResidualBottleneckTransformation,
    load_transformation,
)

OLD_WIDTH, NEW_WIDTH = 64, 96


def network(channels, width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, width),
    )


def train(model, loss_func, inputs, labels, epochs, lr=2e-3):
    """Train whatever maps ``inputs`` to embeddings: a network on images, a transformation on stored embeddings."""
    parameters = {id(p): p for p in [*model.parameters(), *loss_func.parameters()]}
    optimizer = torch.optim.Adam(parameters.values(), lr=lr)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            loss_func(model(inputs[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def embed(model, inputs):
    return torch.nn.functional.normalize(model.eval()(inputs), dim=1)


def task_loss(classes, width):
    return NormalizedSoftmaxLoss(classes, width)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
train_images, train_labels, test_images = images[train_index], labels[train_index], images[test_index]
test_labels = labels[test_index]
calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))


def show(what, query, gallery):
    accuracy = calculator.get_accuracy(query, test_labels, gallery, test_labels, ref_includes_query=True)
    print(f"{what:52} {accuracy['precision_at_1']:6.1%} {accuracy['mean_average_precision']:6.1%}", flush=True)


# The old model, and what it makes of the new training set: a centre and a boundary for every digit.
few = torch.cat([(train_labels == digit).nonzero()[:40, 0] for digit in range(5)])
old_model = train(network(8, OLD_WIDTH), task_loss(5, OLD_WIDTH), train_images[few], train_labels[few], epochs=30)
old_train, old = embed(old_model, train_images), embed(old_model, test_images)
old_centers = ClassCenters.from_embeddings(old_train, train_labels)
print(f"The old class centres: {old_centers.summary()}\n")
print(f"{'query / gallery':52} {'P@1':>6} {'mAP':>6}")
show("old / old", old, old)

# A new model that learns with a map each way.
loss_func = LCELoss(
    task_loss(10, NEW_WIDTH),
    old_centers,
    forward_transformation=LinearTransformation(OLD_WIDTH, NEW_WIDTH),
    backward_transformation=OrthogonalTransformation(NEW_WIDTH, OLD_WIDTH),
)
model = train(network(32, NEW_WIDTH), loss_func, train_images, train_labels, epochs=30)
new = embed(model, test_images)
show("new / new", new, new)
with tempfile.TemporaryDirectory() as folder:  # the map goes to where the gallery is
    loss_func.forward_transformation.save(Path(folder) / "forward.safetensors")
    forward = load_transformation(Path(folder) / "forward.safetensors")
show("new / old, gallery mapped forward", new, embed(forward, old))
show("new / old, queries mapped backward", embed(loss_func.backward_transformation, new), old)

# Two finished models that know nothing of each other: the map alone is trained, on stored embeddings.
finished = train(network(32, NEW_WIDTH), task_loss(10, NEW_WIDTH), train_images, train_labels, epochs=30)
new_train, new = embed(finished, train_images), embed(finished, test_images)
new_centers = ClassCenters.from_embeddings(new_train, train_labels)
print("\nTwo finished models")
show("new / new", new, new)
for name, make in {"linear": LinearTransformation, "residual": ResidualBottleneckTransformation}.items():
    to_new, to_old = make(OLD_WIDTH, NEW_WIDTH), make(NEW_WIDTH, OLD_WIDTH)
    train(to_new, LCETransformationLoss(to_new, old_centers, new_centers), old_train, train_labels, epochs=30)
    train(to_old, LCETransformationLoss(to_old, new_centers, old_centers), new_train, train_labels, epochs=30)
    show(f"new / old, gallery mapped, {name} by LCE", new, embed(to_new, old))
    show(f"new / old, queries mapped, {name} by LCE", embed(to_old, new), old)
for name, make in {"linear": LinearTransformation, "orthogonal": OrthogonalTransformation}.items():
    to_new = make(OLD_WIDTH, NEW_WIDTH).fit(old_train, new_train)
    to_old = make(NEW_WIDTH, OLD_WIDTH).fit(new_train, old_train)
    show(f"new / old, gallery mapped, {name} in closed form", new, embed(to_new, old))
    show(f"new / old, queries mapped, {name} in closed form", embed(to_old, new), old)
