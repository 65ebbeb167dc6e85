"""Three generations of a model, each of which searches the galleries of all that came before it.

v1 knows five digits, v2 eight, v3 all ten. v2 is trained to be compatible with v1, and v3 with v2 and v1 at once: each
old model runs beside the new one, on the same augmented batch, and has a loss and a weight of its own. PML's trainer
with old models in the loop is ``CompatibleMetricLossOnly``. The same generations are trained freely, too.

The tables show every model's queries on every model's gallery, mAP over the test half of all ten digits. AC is the
share of upgrades, from any generation to any later one, after which the old gallery serves better than before; AM is
the mean over every model's own and all earlier galleries. With other seeds the gallery of v2, which is nearly as good
as v3's, may serve v3 a point better or worse than v2.

    pip install "pml-compat[demo]"
    python examples/three_generations.py
"""

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, SupConLoss
from pytorch_metric_learning.trainers import MetricLossOnly
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from pml_compat.frozen import FrozenModel
from pml_compat.losses import CompatibleLoss, CrossModelLoss, RACTLoss
from pml_compat.trainers import CompatibleMetricLossOnly
from pml_compat.upgrade import average_multimodel_accuracy, compatibility_matrix
from pml_compat.upgrade.chain import average_compatibility

WIDTH, METRIC = 32, "mean_average_precision"
GENERATIONS = {"v1": (8, 5, 20, 40), "v2": (16, 8, 40, 40), "v3": (32, 10, 90, 20)}  # channels, digits, images, epochs


def loss_against(old_model):
    """Each image near its own old embedding, where few classes are old; near all old ones of its class, where many."""
    return RACTLoss() if old_model == "v1" else CrossModelLoss(SupConLoss())


class Shifted(TensorDataset):
    """Moves each image by up to a pixel at random: another view each time."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(1, 2)), label


def network(channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, WIDTH),
    )


def train(generation, images, labels, old_models):
    channels, digits, images_per_digit, epochs = GENERATIONS[generation]
    few = torch.cat([(labels == digit).nonzero()[:images_per_digit, 0] for digit in range(digits)])
    torch.manual_seed(0)
    model = network(channels)
    loss_func = NormalizedSoftmaxLoss(digits, WIDTH)
    trainer, options = MetricLossOnly, {}
    if old_models:
        terms = {name: loss_against(name) for name in old_models}
        loss_func = CompatibleLoss(loss_func, terms)
        trainer, options = CompatibleMetricLossOnly, {"old_model": old_models}
    trained = {"trunk": model, "metric_loss": loss_func}
    trainer(
        models={"trunk": model},
        optimizers={f"{name}_optimizer": torch.optim.Adam(m.parameters(), lr=2e-3) for name, m in trained.items()},
        batch_size=64,
        loss_funcs={"metric_loss": loss_func},
        dataset=Shifted(images[few], labels[few]),
        dataloader_num_workers=0,
        **options,
    ).train(num_epochs=epochs)
    return FrozenModel(model, normalize=True)


def main():
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train_index, test_index = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    for chain, compatible in (("each compatible with all before it", True), ("each trained freely", False)):
        models = {}
        for generation in GENERATIONS:
            old_models = dict(models) if compatible else {}
            models[generation] = train(generation, images[train_index], labels[train_index], old_models)
        show(chain, {name: model(images[test_index]) for name, model in models.items()}, labels[test_index])


def show(chain, embeddings, labels):
    matrix = compatibility_matrix(embeddings, labels)
    print(f"{chain}\nquery \\ gallery" + "".join(f"{name:>8}" for name in matrix))
    for query, galleries in matrix.items():
        print(f"{query:15}" + "".join(f"{accuracy[METRIC]:8.1%}" for accuracy in galleries.values()))
    compatibility = average_compatibility(matrix, metric=METRIC)
    print(f"AC {compatibility:.2f}, AM {average_multimodel_accuracy(matrix, metric=METRIC):.1%}\n", flush=True)


if __name__ == "__main__":
    main()
