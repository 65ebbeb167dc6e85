"""Train a compatible model on several GPUs, or processes, with the gradient of one on the whole batch.

Losses that compare the rows of a batch with each other learn less from R batches of N rows than from one of R N.
``GatheredLoss`` gathers the rows of all processes, with their gradients, and DistributedDataParallel (DDP) averages
the result to the gradient of one process on the whole batch: no factor, no other learning rate. Run by torchrun or as
one process, this script goes through the same batches and ends at the same accuracies, but for rounding. The lines
that end in ``# ddp`` are what makes it a distributed one.

    pip install "pml-compat[demo]"
    torchrun --nproc-per-node 2 examples/ddp_torchrun.py  # NCCL where each process has a GPU, else gloo on the CPU
    python examples/ddp_torchrun.py                       # one process
"""

import os

import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.losses import CompatibleLoss, GatheredLoss, RACTLoss

SEED, WIDTH, EPOCHS = 0, 32, 15
BATCH = 64  # rows of all processes together


def main(device):
    images, labels, test_images, test_labels = digits()
    old_model = what_you_already_have(images, labels)
    old, old_test = embed(old_model, images), embed(old_model, test_images)

    torch.manual_seed(SEED)  # the same first weights on every rank, of the loss too
    model = network(channels=32).to(device)
    task_loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=WIDTH)
    # Each image against its own old embedding, and against the old and new ones of every other digit in the batch.
    loss_func = CompatibleLoss(task_loss, RACTLoss()).to(device)
    trained = DistributedDataParallel(model)  # ddp
    loss_func = DistributedDataParallel(GatheredLoss(loss_func))  # ddp

    dataset = TensorDataset(images, labels, old)
    sampler = DistributedSampler(dataset, seed=SEED)  # ddp
    loader = DataLoader(dataset, BATCH // dist.get_world_size(), sampler=sampler)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=2e-3)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)  # ddp
        for batch in loader:
            some_images, some_labels, some_old = (part.to(device) for part in batch)
            optimizer.zero_grad()
            loss = loss_func(trained(some_images), some_labels, ref_emb=some_old)
            loss.backward()
            optimizer.step()

    if dist.get_rank() == 0:  # ddp
        print(f"{dist.get_world_size()} processes, {device.type}, loss of the last batch {loss.item():.3f}")
        new_test = embed(model.cpu(), test_images)
        calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"), device="cpu")
        show("new/new", calculator.get_accuracy(new_test, test_labels))
        across = calculator.get_accuracy(new_test, test_labels, old_test, test_labels, ref_includes_query=True)
        show("new/old", across)
        show("old/old", calculator.get_accuracy(old_test, test_labels))


def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=SEED)
    return images[train], labels[train], images[test], labels[test]


def network(channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * channels * 16, WIDTH),
    )


def what_you_already_have(images, labels):
    """Stand for the old model, which every rank loads: trained on 100 images of the digits 0 to 4."""
    torch.manual_seed(SEED)
    few = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(5)])
    model, loss_func = network(channels=8), NormalizedSoftmaxLoss(5, WIDTH)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_func(model(images[few]), labels[few]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def embed(model, images):
    return torch.nn.functional.normalize(model.eval()(images), dim=1)


def show(name, accuracy):
    print(f"{name}  P@1 {accuracy['precision_at_1']:.1%}  mAP {accuracy['mean_average_precision']:.1%}")


def join_processes():
    """Join the processes that torchrun started, or be the only one; return this one's device."""
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


if __name__ == "__main__":
    device = join_processes()
    try:
        main(device)
    finally:
        dist.destroy_process_group()
