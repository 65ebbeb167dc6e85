"""Every loss of the library on one upgrade, side by side: how each is built, what it reaches, what it costs.

The old network has seen 20 images each of the digits 0 to 4; the new one learns all ten. ``new/old`` are new queries on
the old gallery, which no method here touches. Put your own images, models and task loss in their place: the methods
are in ``losses`` below, a line or two each.

    pip install "pml-compat[demo]"
    python examples/compare_methods.py                          # all of them, one seed
    python examples/compare_methods.py --seeds 0 1 2 --only BCT LCE
"""

import argparse
import time

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, SupConLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import (
    AdvBCTLoss,
    BCTLoss,
    CompatibleLoss,
    CrossModelLoss,
    FocalDistillationLoss,
    LCELoss,
    LwFLoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    RACTLoss,
    UniBCTLoss,
    shorten_class_weights,
)
from pml_compat.report import comparison_table, to_markdown
from pml_compat.upgrade import Comparison, evaluate

WIDTH, EPOCHS = 32, 30
READ_OLD_EMBEDDINGS = (CompatibleLoss, NCCLLoss, MixBCTLoss)  # called with ref_emb


def task():
    return NormalizedSoftmaxLoss(10, WIDTH)


def losses(old_loss, old_embeddings, labels):
    """Return what builds each method's loss from what is left of the old model: its classifier and its embeddings."""
    centers = ClassCenters.from_embeddings(old_embeddings, labels)
    classifier = FrozenClassifier.from_loss(old_loss).extend(centers)  # pseudo rows for the classes it never saw

    def nccl():
        loss_func = NCCLLoss(task(), embedding_size=WIDTH)
        loss_func.fill(old_embeddings, labels)
        return loss_func

    return {
        "independent": lambda: shorten_class_weights(task()),
        "BCT": lambda: BCTLoss(task(), classifier),
        "UniBCT": lambda: UniBCTLoss(task(), centers),
        "LCE": lambda: LCELoss(task(), centers),
        "cross-model SupCon": lambda: CompatibleLoss(task(), CrossModelLoss(SupConLoss())),
        "RACT": lambda: CompatibleLoss(task(), RACTLoss()),
        "point alignment": lambda: CompatibleLoss(task(), PointAlignmentLoss()),
        "LwF": lambda: CompatibleLoss(task(), LwFLoss(classifier)),
        "focal distillation": lambda: CompatibleLoss(task(), FocalDistillationLoss(centers)),
        "NCCL": nccl,
        "AdvBCT": lambda: CompatibleLoss(task(), AdvBCTLoss.from_embeddings(old_embeddings, labels)),
        "MixBCT": lambda: MixBCTLoss(task()),
        "BCT + point alignment": lambda: CompatibleLoss(BCTLoss(task(), classifier), PointAlignmentLoss()),
    }


def network(channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, WIDTH),
    )


def train(model, loss_func, images, labels, old_embeddings=None, batch_size=128):
    """Train; return the milliseconds of a step. ``old_embeddings`` go to losses that read them."""
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=3e-3)
    reads_old, steps, start = isinstance(loss_func, READ_OLD_EMBEDDINGS), 0, time.perf_counter()
    for epoch in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(images)).split(batch_size):
            old = {"ref_emb": old_embeddings[index]} if reads_old else {}
            optimizer.zero_grad()
            loss_func(model(images[index]), labels[index], **old).backward()
            optimizer.step()
            steps += 1
        # Two methods follow the training: UniBCT cleans its prototypes by the new model, AdvBCT turns its terms down.
        if isinstance(loss_func, UniBCTLoss) and epoch in (EPOCHS // 3, EPOCHS // 2):
            loss_func.update_prototypes(old_embeddings, embed(model, images), labels)
        for old_loss in getattr(loss_func, "old_losses", {}).values():
            if isinstance(old_loss, AdvBCTLoss):
                old_loss.set_progress((epoch + 1) / EPOCHS)
    return 1000 * (time.perf_counter() - start) / steps


@torch.no_grad()
def embed(model, images):
    return model.eval()(images)


def mebibytes(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values()) / 2**20


def run(seed, only, comparison):
    digits = load_digits()
    split = train_test_split(digits.images[:, None] / 16, digits.target, test_size=0.5, random_state=seed)
    images, test_images, labels, test_labels = (torch.tensor(array) for array in split)
    images, test_images = images.float(), test_images.float()
    torch.manual_seed(seed)
    few = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(5)])
    old, old_loss = network(8), NormalizedSoftmaxLoss(5, WIDTH)
    train(old, old_loss, images[few], labels[few])
    old_embeddings, old_gallery = embed(old, images), torch.nn.functional.normalize(embed(old, test_images))
    for method, build in losses(old_loss, old_embeddings, labels).items():
        if only and method not in [*only, "independent"]:
            continue
        torch.manual_seed(seed)
        model, loss_func = network(32), build()
        milliseconds = train(model, loss_func, images, labels, old_embeddings)
        new = torch.nn.functional.normalize(embed(model, test_images))
        # Queries and gallery are the same images; each is left out of its own ranking.
        galleries = {"gallery": old_gallery, "old_queries": old_gallery, "new_gallery": new}
        labels_twice = {"query_labels": test_labels, "gallery_labels": test_labels, "same_items": True}
        comparison.add(method, evaluate(new, **galleries, **labels_twice, orders=0, blend=False, depths=()))
        held = mebibytes(loss_func) - mebibytes(task())
        if isinstance(loss_func, READ_OLD_EMBEDDINGS):
            held += old_embeddings.nbytes / 2**20
        comparison.add_costs(method, {"milliseconds_per_step": milliseconds, "extra_mebibytes": held})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="these, and the independent model")
    arguments = parser.parse_args()
    found = Comparison({"name": "scikit-learn digits"}, arguments.seeds)
    for number in arguments.seeds:
        run(number, arguments.only, found)
    print(to_markdown(comparison_table(found)))
