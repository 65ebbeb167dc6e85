"""A small training that appends each step's loss to a file, and may be killed; run again, it goes on."""

import os
import random
import signal

import numpy as np
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner
from torch.utils.data import DataLoader, TensorDataset

from pml_compat.frozen import FrozenModel
from pml_compat.losses import CompatibleLoss, NCCLLoss, RACTLoss
from pml_compat.trainers import ResumableSampler, load_checkpoint, save_checkpoint

EPOCHS, EVERY = 4, 3  # a checkpoint each EVERY steps, and 7 steps an epoch


class Augmented(TensorDataset):
    """Draws from three random generators."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn(6) + 0.1 * np.random.rand() + 0.1 * random.random(), label  # noqa: NPY002


def main(folder, killed_at=None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    old_model = FrozenModel(torch.nn.Linear(6, 4))
    labels = torch.arange(70) % 5
    dataset = Augmented(torch.randn(70, 6) + torch.eye(6)[labels], labels)
    torch.manual_seed(os.getpid())  # what a new process draws before it goes on must not matter
    random.seed(os.getpid())
    np.random.seed(os.getpid())  # noqa: NPY002
    if not (folder / "curve").exists():
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 4)
    )
    nccl_loss = NCCLLoss(NormalizedSoftmaxLoss(5, 4), queue_size=32, embedding_size=4)  # its queue is a state
    loss_func = CompatibleLoss(nccl_loss, {"ract": RACTLoss(0.1)})
    miner = BatchEasyHardMiner()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * 7)
    sampler = ResumableSampler(len(dataset), batch_size=10, seed=3)
    parts = {
        "modules": {"model": model, "loss": loss_func, "miner": miner},
        "optimizers": {"all": optimizer},
        "lr_schedulers": {"all": schedule},
        "others": {"sampler": sampler},
    }
    checkpoint, step = folder / "last.pt", 0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, **parts).step
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator())
    with (folder / "curve").open("a") as curve:
        while sampler.epoch < EPOCHS:
            for images, classes in loader:
                optimizer.zero_grad()
                loss = loss_func(model(images), classes, ref_emb=old_model(images))
                loss.backward()
                optimizer.step()
                schedule.step()
                sampler.advance()
                step += 1
                print(step, loss.item().hex(), file=curve, flush=True)
                if step % EVERY == 0:
                    save_checkpoint(checkpoint, **parts, step=step)
                if step == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
