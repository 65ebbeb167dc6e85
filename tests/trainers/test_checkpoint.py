import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, NormalizedSoftmaxLoss
from torch.utils.data import TensorDataset

from pml_compat.frozen import FrozenModel
from pml_compat.losses import CompatibleLoss, FCTLoss
from pml_compat.trainers import CompatibleMetricLossOnly, ResumableSampler, load_checkpoint, save_checkpoint
from pml_compat.trainers.checkpoint import Progress
from tests.processes import exit_code
from tests.trainers import interrupted

EVERY_RANDOM = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "numpy, normal": lambda: np.random.randn(),  # noqa: NPY002 (keeps every second one)
    "python": lambda: random.random(),
    "python, normal": lambda: random.gauss(),
}


def parts(width=3, seed=0, kind=torch.optim.Adam, schedule=torch.optim.lr_scheduler.StepLR, batch_size=2):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width))
    optimizer = kind(model.parameters(), lr=0.1)
    return {
        "modules": {"model": model},
        "optimizers": {"adam": optimizer},
        "lr_schedulers": {"steps": schedule(optimizer, 2)},
        "others": {"sampler": ResumableSampler(8, batch_size)},
        "generators": {"own": torch.Generator().manual_seed(seed)},
    }


def step(parts):
    """Train one step and return everything that it changes."""
    model, optimizer = parts["modules"]["model"], parts["optimizers"]["adam"]
    optimizer.zero_grad()
    loss = model(torch.randn(8, 2, generator=parts["generators"]["own"])).sigmoid().mean()
    loss.backward()
    optimizer.step()
    parts["lr_schedulers"]["steps"].step()
    parts["others"]["sampler"].advance()
    return loss.item(), optimizer.param_groups[0]["lr"], parts["others"]["sampler"].position


def states(parts):
    return {
        group: {name: p.get_state() if group == "generators" else p.state_dict() for name, p in named.items()}
        for group, named in parts.items()
    }


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert one.equal(other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


# Killed, and started again


def curve(folder):
    return [tuple(line.split()) for line in (folder / "curve").read_text().splitlines()]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    threads = torch.get_num_threads()
    interrupted.main(whole)
    torch.set_num_threads(threads)
    expected = curve(whole)
    assert [number for number, _ in expected] == [str(number) for number in range(1, 29)]
    assert len({value for _, value in expected}) == 28
    assert exit_code(interrupted.main, killed, 11) == -signal.SIGKILL  # in epoch 2 of 4, two steps after a checkpoint
    assert curve(killed) == expected[:11]
    assert exit_code(interrupted.main, killed) == 0
    assert curve(killed)[11:] == expected[9:]
    assert {path.name for path in killed.iterdir()} == {"curve", "last.pt"}


def make_trainer(losses, fail_at=None, sampler=None):
    torch.manual_seed(0)
    images = torch.randn(40, 5)
    models = {
        "trunk": torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Dropout()),
        "embedder": torch.nn.Linear(6, 4),
    }
    loss = CompatibleLoss(NormalizedSoftmaxLoss(3, 4), FCTLoss())
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(part.parameters(), lr=0.02)
        for name, part in {**models, "metric_loss": loss}.items()
    }

    def after_iteration(trainer):
        losses.append(float(trainer.losses["total_loss"].detach()))
        if len(losses) == fail_at:
            raise KeyboardInterrupt

    return CompatibleMetricLossOnly(
        models=models,
        optimizers=optimizers,
        batch_size=8,
        loss_funcs={"metric_loss": loss},
        dataset=TensorDataset(images, torch.arange(40) % 3),
        old_model=FrozenModel(torch.nn.Linear(5, 4)),
        lr_schedulers={
            "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.ExponentialLR(optimizers["trunk_optimizer"], 0.9),
            "embedder_scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(optimizers["embedder_optimizer"], 1, 0.5),
        },
        sampler=sampler,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        end_of_iteration_hook=after_iteration,
    )


@pytest.mark.parametrize("sampler", [lambda: None, lambda: ResumableSampler(40, 8)])
def test_the_trainer_goes_on_from_the_end_of_an_epoch(tmp_path, sampler):
    expected, found, more = [], [], []
    whole = make_trainer(expected, sampler=sampler())
    torch.manual_seed(7)
    whole.train(num_epochs=4)

    def save(trainer):
        save_checkpoint(tmp_path / "last.pt", epoch=trainer.epoch, **trainer.checkpoint_parts())

    stopped = make_trainer(found, fail_at=13, sampler=sampler())  # in epoch 3
    stopped.end_of_epoch_hook = save
    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(num_epochs=4)
    again = make_trainer(more, sampler=sampler())
    torch.manual_seed(99)
    progress = load_checkpoint(tmp_path / "last.pt", **again.checkpoint_parts())
    assert progress == Progress(epoch=2, step=0)
    again.train(start_epoch=progress.epoch + 1, num_epochs=4)
    assert found == expected[:13] and more == expected[10:] and len(expected) == 20
    names = torch.load(tmp_path / "last.pt", weights_only=True)["states"]["modules"]
    assert set(names) == {"trunk", "embedder", "metric_loss"}
    assert list(names["metric_loss"]) == ["loss.W", "balance.task_lengths", "balance.term_lengths", "balance.calls"]


# One file


def test_everything_comes_back(tmp_path):
    saved = parts()
    for _ in range(3):
        step(saved)
    save_checkpoint(tmp_path / "last.pt", **saved, epoch=1, step=3)
    expected = [step(saved) for _ in range(3)]
    other = parts(seed=5)
    assert load_checkpoint(tmp_path / "last.pt", **other) == Progress(epoch=1, step=3)
    assert [step(other) for _ in range(3)] == expected
    assert_same(states(saved), states(other))


@pytest.mark.parametrize("name", EVERY_RANDOM)
def test_random_numbers_go_on(tmp_path, name):
    draw = EVERY_RANDOM[name]
    draw()
    save_checkpoint(tmp_path / "last.pt", modules={})
    expected = [draw() for _ in range(5)]
    load_checkpoint(tmp_path / "last.pt", modules={})
    assert [draw() for _ in range(5)] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_go_on(tmp_path):
    torch.rand(3, device="cuda")
    save_checkpoint(tmp_path / "last.pt", modules={})
    expected = torch.rand(3, device="cuda")
    load_checkpoint(tmp_path / "last.pt", modules={})
    assert torch.rand(3, device="cuda").equal(expected)


def test_pmls_cross_batch_memory_comes_back(tmp_path):
    """PML itself does not save how far it is filled."""

    def memory():
        return {"loss": CrossBatchMemory(ContrastiveLoss(), 4, memory_size=12)}

    saved, other = memory(), memory()
    batches = [(torch.randn(5, 4), torch.arange(5) % 2) for _ in range(5)]
    for embeddings, labels in batches[:3]:
        saved["loss"](embeddings, labels)
    save_checkpoint(tmp_path / "last.pt", modules=saved)
    load_checkpoint(tmp_path / "last.pt", modules=other)
    assert (other["loss"].queue_idx, other["loss"].has_been_filled) == (3, True)
    for embeddings, labels in batches[3:]:
        assert saved["loss"](embeddings, labels) == other["loss"](embeddings, labels)


def test_an_old_model_is_not_in_it(tmp_path):
    modules = {"both": torch.nn.ModuleList([torch.nn.Linear(2, 2), FrozenModel(torch.nn.Linear(500, 500))])}
    save_checkpoint(tmp_path / "last.pt", modules=modules)
    assert (tmp_path / "last.pt").stat().st_size < 100_000
    load_checkpoint(tmp_path / "last.pt", modules=modules)


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules": lambda p: {"network": p["modules"]["model"]}},
            r"modules must be .*, \['model'\], got \['network'\]",
        ),
        ({"optimizers": lambda p: {}}, r"optimizers must be those of the checkpoint, \['adam'\], got \[\]"),
        ({"others": lambda p: None}, r"others must be those of the checkpoint, \['sampler'\], got \[\]"),
        (
            {"modules": lambda p: parts(width=4)["modules"]},
            r"modules\['model'\] must have the shapes of the checkpoint: 0.weight is \[3, 2\] there, got \[4, 2\]",
        ),
        (
            {"modules": lambda p: {"model": p["modules"]["model"][:1]}},
            r"without 1.bias, 1.num_batches_tracked, .* of it, with none beside it \(5 and 0\)",
        ),
        ({"modules": lambda p: {"model": torch.nn.Linear(2, 3)}}, r"must be a Sequential, .*, got a Linear"),
        (
            {"optimizers": lambda p: parts(width=4)["optimizers"]},
            r"optimizers\['adam'\] must have the shapes .*: parameter 0 of group 0 is \[3, 2\] there, got \[4, 2\]",
        ),
        ({"optimizers": lambda p: parts(kind=torch.optim.SGD)["optimizers"]}, "must be a Adam, .*, got a SGD"),
        (
            {"lr_schedulers": lambda p: parts(schedule=torch.optim.lr_scheduler.CosineAnnealingLR)["lr_schedulers"]},
            "must be a StepLR, .*, got a CosineAnnealingLR",
        ),
        (
            {"others": lambda p: parts(batch_size=4)["others"]},
            "the state must be of a sampler with .*'batch_size': 4.*, got one with .*'batch_size': 2",
        ),
        (
            {"modules": lambda p: {"model": p["modules"]["model"].append(CrossBatchMemory(ContrastiveLoss(), 1))}},
            "2.embedding_memory",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_lost(tmp_path, changes, message):
    saved = parts()
    step(saved)
    save_checkpoint(tmp_path / "last.pt", **saved)
    content = (tmp_path / "last.pt").read_bytes()
    own = parts(seed=5)
    step(own)
    own.update({group: change(own) for group, change in changes.items()})
    torch.manual_seed(3)
    kept = {group: named for group, named in own.items() if named}
    before = torch.load(_written(tmp_path, kept), weights_only=True)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "last.pt", **own)
    assert torch.rand(3).equal(expected)
    after = torch.load(_written(tmp_path, kept), weights_only=True)
    assert_same(before["states"], after["states"])
    assert (tmp_path / "last.pt").read_bytes() == content


def _written(folder, kept):
    save_checkpoint(folder / "own.pt", **{"modules": {}, **kept})
    return folder / "own.pt"


def test_of_several_others_all_are_kept_where_one_refuses(tmp_path):
    def samplers(seed):
        return {"first": ResumableSampler(8, 2), "second": ResumableSampler(8, 2, seed=seed)}

    saved, own = samplers(0), samplers(1)
    saved["first"].advance()
    save_checkpoint(tmp_path / "last.pt", modules={}, others=saved)
    with pytest.raises(ValueError, match="the state must be of a sampler"):
        load_checkpoint(tmp_path / "last.pt", modules={}, others=own)
    assert own["first"].position == 0


def test_a_part_of_a_file_is_refused_and_another_file_too(tmp_path):
    save_checkpoint(tmp_path / "last.pt", modules=parts()["modules"])
    whole = (tmp_path / "last.pt").read_bytes()
    for length in (0, 10, len(whole) // 2):
        (tmp_path / "part.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path must be a whole checkpoint, '.*part.pt' is not"):
            load_checkpoint(tmp_path / "part.pt", modules=parts()["modules"])
    torch.save({"model": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"path must be a file written by save_checkpoint, '.*other.pt' is not"):
        load_checkpoint(tmp_path / "other.pt", modules={})
    with pytest.raises(FileNotFoundError, match=r"path must be a checkpoint, '.*none.pt' is not there"):
        load_checkpoint(tmp_path / "none.pt", modules={})


class Running:
    """Code that must not run when a checkpoint is read."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save({"format": Running()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="path must be a whole checkpoint"):
        load_checkpoint(tmp_path / "last.pt", modules={})


def test_a_state_that_could_not_be_read_is_not_written(tmp_path):
    class Odd:
        def state_dict(self):
            return {"value": Path("x")}

        def load_state_dict(self, state):
            pass

    save_checkpoint(tmp_path / "last.pt", modules={}, step=1)
    with pytest.raises(ValueError, match="the states must be tensors, numbers, strings and containers"):
        save_checkpoint(tmp_path / "last.pt", modules={}, others={"odd": Odd()}, step=2)
    assert load_checkpoint(tmp_path / "last.pt", modules={}).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": torch.nn.Linear(2, 2)}, "modules must be a mapping of names, got Linear"),
        ({"modules": {"model": 3}}, r"modules\['model'\] must be a module, got int"),
        ({"generators": {"own": 3}}, r"generators\['own'\] must be a torch.Generator, got int"),
        ({"optimizers": {"adam": 3}}, r"optimizers\['adam'\] must be an object with state_dict and .*, got int"),
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"epoch": 1.5}, "epoch must be an integer of at least 0, got 1.5"),
    ],
)
def test_errors_when_saving(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "last.pt", **{"modules": {}, **arguments})
    assert not list(tmp_path.iterdir())
