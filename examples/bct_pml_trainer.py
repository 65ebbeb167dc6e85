"""Backward-compatible training (BCT) with PML's own trainer, tester and logging, and no training loop of our own.

``BCTLoss`` goes where any PML loss goes, ``loss_funcs["metric_loss"]``, and ``CrossModelTester``, which holds the old
model, where any PML tester goes. At each epoch PML's hooks then log both terms of the loss and the accuracy of every
pair of query and gallery model, and save the models that serve the old gallery best.

    pip install "pml-compat[demo]" record-keeper tensorboard
    python examples/bct_pml_trainer.py         # logs and models go to a temporary folder
    python examples/bct_pml_trainer.py --keep  # ... or to example_logs, example_models and example_tensorboard
"""

import argparse
import sys
import tempfile

import torch
from pytorch_metric_learning import losses, trainers
from pytorch_metric_learning.utils import logging_presets
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Subset, TensorDataset

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import BCTLoss
from pml_compat.testers import CrossModelTester

SEED = 0
OLD_WIDTH, NEW_WIDTH = 32, 64


def main(epochs, folder):
    record_keeper, _, tensorboard = logging_presets.get_record_keeper(
        f"{folder}/example_logs", f"{folder}/example_tensorboard"
    )
    if record_keeper is None:
        sys.exit("record-keeper and tensorboard are needed to log; run: pip install record-keeper tensorboard")
    torch.manual_seed(SEED)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=SEED)
    train_set = TensorDataset(images[train_index], labels[train_index])
    test_set = TensorDataset(images[test_index], labels[test_index])

    # What you already have: a model and the loss it was trained with, here on 100 images of the digits 0 to 4.
    few = torch.cat([(labels[train_index] == digit).nonzero()[:20, 0] for digit in range(5)])
    old_models = make_models(channels=8, width=OLD_WIDTH)
    old_loss = losses.NormalizedSoftmaxLoss(5, OLD_WIDTH)
    make_trainer(old_models, old_loss, Subset(train_set, few)).train(num_epochs=30)

    hooks = logging_presets.get_hook_container(
        record_keeper, primary_metric="new_to_old_mean_average_precision", log_freq=10
    )
    tester = CrossModelTester(
        torch.nn.Sequential(old_models["trunk"], old_models["embedder"]),
        end_of_testing_hook=hooks.end_of_testing_hook,
        dataloader_num_workers=0,
    )

    # The upgrade: the old classifier, with pseudo rows for the digits it never saw, judges the new model too.
    old_embeddings, old_labels = tester.get_all_embeddings(train_set, tester.old_model)
    centers = ClassCenters.from_embeddings(old_embeddings, old_labels[:, 0])
    old_classifier = FrozenClassifier.from_loss(old_loss).extend(centers)
    new_loss = losses.NormalizedSoftmaxLoss(10, NEW_WIDTH)
    loss_func = BCTLoss(new_loss, old_classifier, collect_stats=True)
    new_models = make_models(channels=32, width=NEW_WIDTH)
    make_trainer(
        new_models,
        loss_func,
        train_set,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": test_set}, f"{folder}/example_models"),
    ).train(num_epochs=epochs)
    tensorboard.close()

    terms = record_keeper.query("SELECT task_loss, influence_loss FROM metric_loss_BCTLoss", return_dict=True)
    for name, values in terms.items():
        print(f"{name}: {values[0]:.3f} at first, {values[-1]:.3f} at last, {len(values)} values logged")
    print("best epoch by new/old mAP: {} ({:.1%})".format(*hooks.get_best_epoch_and_accuracy(tester, "val")))

    accuracies = tester.all_accuracies["val"]  # of the last epoch
    print("query/gallery    P@1    mAP")
    for pair in ("old_to_old", "new_to_old", "new_to_new"):
        precision = accuracies[f"{pair}_precision_at_1_level0"]
        average_precision = accuracies[f"{pair}_mean_average_precision_level0"]
        print(f"{pair.replace('_to_', '/')}       {precision:7.1%}{average_precision:7.1%}")


def make_models(channels, width):
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
    )
    return {"trunk": trunk, "embedder": torch.nn.Linear(2 * channels * 16, width)}


def make_trainer(models, loss_func, dataset, **hooks):
    trained = {**models, "metric_loss": loss_func}
    return trainers.MetricLossOnly(
        models=models,
        optimizers={f"{name}_optimizer": torch.optim.Adam(m.parameters(), lr=2e-3) for name, m in trained.items()},
        loss_funcs={"metric_loss": loss_func},
        dataset=dataset,
        batch_size=64,
        dataloader_num_workers=0,
        **hooks,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the new model")
    parser.add_argument("--keep", action="store_true", help="keep logs and models, in the current folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.epochs, "." if arguments.keep else temporary)
