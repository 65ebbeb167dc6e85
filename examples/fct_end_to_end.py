"""FCT from the day the old model is deployed to the day the gallery has followed two newer ones, without its images.

1. The old model goes into service (five classes, few images). Beside it, a small network learns from unlabelled images
   (SimCLR, by PML's own loss); what it says of each image is stored with the old embedding: side-information.
2. A new model is trained, freely. A transformation learns from stored embeddings to take (old embedding,
   side-information) into the new space; the gallery is streamed through it, batch by batch, from file to file.
3. A third model comes. The gallery, which has never been embedded again, follows once more: a chain of two maps.

Side-information may be of any origin: here also pixels reduced by PCA, which cost no training at all.

    pip install "pml-compat[demo]"
    python examples/fct_end_to_end.py
"""

import tempfile
from pathlib import Path

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, NTXentLoss, SelfSupervisedLoss
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import FrozenEmbeddings, FrozenModel, model_fingerprint
from pml_compat.transformations import (
    FCTTransformation,
    TransformationChain,
    fit_transformation,
    load_transformation,
)

OLD_WIDTH, SIDE_WIDTH, NEW_WIDTH, NEWER_WIDTH = 32, 32, 64, 96
SMALL_DATA = {"epochs": 40, "batch_size": 128, "lr": 1e-3, "progress": False}  # the defaults are for 50,000 images


def network(channels, width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, width),
    )


def train(model, images, labels, epochs):
    loss_func = NormalizedSoftmaxLoss(int(labels.max()) + 1, model[-1].out_features)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index]).backward()
            optimizer.step()
    return FrozenModel(model, normalize=True)


def train_without_labels(model, images, epochs):
    """SimCLR: two random views of an image belong together, all other images do not."""
    loss_func = SelfSupervisedLoss(NTXentLoss(temperature=0.2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            loss_func(model(augment(images[index])), model(augment(images[index]))).backward()
            optimizer.step()
    return FrozenModel(model, normalize=True)


def augment(images):
    affine = torch.eye(2, 3) + torch.empty(len(images), 2, 3).uniform_(-0.25, 0.25)
    grid = torch.nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))


def show(what, query, gallery):
    accuracy = calculator.get_accuracy(query, labels[test_index], gallery, labels[test_index], ref_includes_query=True)
    print(f"{what:64} {accuracy['precision_at_1']:6.1%} {accuracy['mean_average_precision']:6.1%}", flush=True)


with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)

    # 1. The old model's day. It knows five classes; its owner also keeps what no label ever shaped.
    few = [i for digit in range(5) for i in [i for i in train_index if labels[i] == digit][:20]]
    old_model = train(network(8, OLD_WIDTH), images[few], labels[few], epochs=30)
    side_model = train_without_labels(network(16, SIDE_WIDTH), images[train_index], epochs=15)
    batches = ((old_model(images[i]), i, side_model(images[i])) for i in torch.arange(len(images)).split(256))
    stored = FrozenEmbeddings.write(folder / "old", batches, fingerprint=model_fingerprint(old_model))

    # 2. A year later: the new model, trained as if there had been no other.
    new_model = train(network(32, NEW_WIDTH), images[train_index], labels[train_index], epochs=30)
    new = new_model(images)
    stored = FrozenEmbeddings(folder / "old", fingerprint=model_fingerprint(old_model))  # refuses another model's
    old, side = stored[train_index], stored.side_info[train_index]
    without_side = FCTTransformation(OLD_WIDTH, NEW_WIDTH, hidden_features=512)
    fit_transformation(without_side, old, new[train_index], **SMALL_DATA)
    with_side = FCTTransformation(OLD_WIDTH, NEW_WIDTH, SIDE_WIDTH, hidden_features=512)
    fit_transformation(with_side, old, new[train_index], side, checkpoint=folder / "fit.safetensors", **SMALL_DATA)

    pixels = images.flatten(1).numpy()
    pca = torch.tensor(PCA(16, random_state=0).fit(pixels[train_index]).transform(pixels), dtype=torch.float32)
    with_pca = FCTTransformation(OLD_WIDTH, NEW_WIDTH, pca.shape[1], hidden_features=512)
    fit_transformation(with_pca, old, new[train_index], pca[train_index], **SMALL_DATA)

    with_side.save(folder / "old_to_new.safetensors")  # goes to where the gallery is
    old_to_new = load_transformation(folder / "old_to_new.safetensors")
    options = {"normalize": True, "progress": False}
    gallery = old_to_new.apply_to(stored, stored.side_info, out=folder / "gallery.npy", overwrite=True, **options)
    print(f"{'query / gallery':64} {'P@1':>6} {'mAP':>6}")
    show("old / old", stored[test_index], stored[test_index])
    show("new / new", new[test_index], new[test_index])
    show("new / old transformed", new[test_index], without_side.apply_to(stored, **options)[test_index])
    show("new / old transformed, side-information by SimCLR", new[test_index], gallery[test_index])
    show(
        "new / old transformed, side-information by PCA",
        new[test_index],
        with_pca.apply_to(stored, pca, **options)[test_index],
    )

    # 3. A third generation: old -> new -> newer. Only new embeddings are needed for the second map, no old ones.
    newer_model = train(network(48, NEWER_WIDTH), images[train_index], labels[train_index], epochs=30)
    newer = newer_model(images)
    new_to_newer = FCTTransformation(NEW_WIDTH, NEWER_WIDTH, hidden_features=512)
    fit_transformation(new_to_newer, new[train_index], newer[train_index], **SMALL_DATA)
    chain = TransformationChain(old_to_new, new_to_newer)
    show("newer / newer", newer[test_index], newer[test_index])
    show("newer / new transformed", newer[test_index], new_to_newer.apply_to(new, **options)[test_index])
    chained = chain.apply_to(stored, stored.side_info, **options)
    show("newer / old transformed twice, side-information by SimCLR", newer[test_index], chained[test_index])
