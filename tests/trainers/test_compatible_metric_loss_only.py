import copy

import pytest
import torch
from pytorch_metric_learning import losses, miners, trainers
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.logging_presets import HookContainer
from torch.utils.data import Subset, TensorDataset

from pml_compat.frozen import FrozenClassifier, FrozenEmbeddings, FrozenModel, OldEmbeddingDataset
from pml_compat.losses import BCTLoss, CompatibleLoss, FCTLoss, GatheredLoss
from pml_compat.testers import CrossModelTester
from pml_compat.trainers import CompatibleMetricLossOnly, IndexedDataset
from tests import cases

IN, WIDTH, CLASSES = 5, 6, 4
CPU = torch.device("cpu")


def data(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return TensorDataset(torch.randn(n, IN, generator=generator) + torch.eye(IN)[labels], labels)


class Watched(torch.nn.Linear):
    """An old model that keeps what it was called with and in which mode."""

    def __init__(self, width=WIDTH):
        super().__init__(IN, width)
        self.calls, self.modes = [], set()

    def forward(self, x):
        self.calls.append(x)
        self.modes.add((self.training, torch.is_grad_enabled()))
        return super().forward(x)


class Recording(BaseMetricLossFunction):
    """A loss that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        self.calls.append((embeddings, labels, indices_tuple, ref_emb, ref_labels))
        return embeddings.square().mean()


def old_model(seed=1, width=WIDTH):
    torch.manual_seed(seed)
    return Watched(width)


def task_loss():
    return losses.NormalizedSoftmaxLoss(CLASSES, WIDTH)


def compatible(*names, weights=0.5):
    terms = {name: FCTLoss() for name in names} if names else FCTLoss()
    return CompatibleLoss(task_loss(), terms, weights)


def make(loss=None, dataset=None, kind=CompatibleMetricLossOnly, lr=0.05, models=None, **kwargs):
    """Build a trainer whose networks and losses are the same each time."""
    torch.manual_seed(0)
    models = models or {"trunk": torch.nn.Linear(IN, 7), "embedder": torch.nn.Linear(7, WIDTH)}
    loss = compatible() if loss is None else loss
    trained = {**models, "metric_loss": loss}
    optimizers = {
        f"{name}_optimizer": torch.optim.SGD(part.parameters(), lr=lr)
        for name, part in trained.items()
        if list(part.parameters())
    }
    arguments = {
        "models": models,
        "optimizers": optimizers,
        "batch_size": 16,
        "loss_funcs": {"metric_loss": loss},
        "dataset": data() if dataset is None else dataset,
        "dataloader_num_workers": 0,
        "data_device": CPU,
    }
    return kind(**{**arguments, **kwargs})


def curve(trainer, epochs=3, seed=5):
    """Train, and return the loss of each iteration."""
    found = []
    trainer.end_of_iteration_hook = lambda trainer: found.append(float(trainer.losses["total_loss"].detach()))
    torch.manual_seed(seed)
    trainer.train(num_epochs=epochs)
    return found


def fresh_loss(*names, **kwargs):
    torch.manual_seed(3)
    return compatible(*names, **kwargs)


# What the loss gets


def test_the_loss_gets_the_old_model_on_the_same_view():
    old, loss = old_model(), Recording()

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.randn(IN), label

    trainer = make(loss, Augmented(*data().tensors), old_model=old)
    seen = []
    trainer.models["trunk"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    curve(trainer, epochs=2)
    assert len(loss.calls) == len(seen) == 6 and old.modes == {(False, False)}
    for (_, labels, indices_tuple, ref_emb, ref_labels), images in zip(loss.calls, seen, strict=True):
        assert ref_emb.equal(torch.nn.functional.linear(images, old.weight, old.bias)) and not ref_emb.requires_grad
        assert ref_labels.equal(labels) and ref_labels is not labels and indices_tuple is None


@pytest.mark.parametrize("normalize", [False, True])
def test_stored_embeddings_and_the_old_model_give_the_same_losses(normalize):
    old = FrozenModel(old_model(), normalize=normalize)
    stored = old(data().tensors[0])
    expected = curve(make(fresh_loss(), old_model=old))
    assert len(expected) == 9 and expected[-1] < expected[0]
    indexed = IndexedDataset(data())
    for trainer in (
        make(fresh_loss(), indexed, old_embeddings=stored),
        make(fresh_loss(), indexed, old_embeddings=stored.numpy()),
        make(fresh_loss(), indexed, old_embeddings=FrozenEmbeddings.from_array(stored)),
        make(fresh_loss(), OldEmbeddingDataset(data(), FrozenEmbeddings.from_array(stored))),
    ):
        assert curve(trainer) == pytest.approx(expected, rel=1e-6)


def test_stored_embeddings_are_found_by_id_in_any_order():
    stored, order = torch.randn(48, WIDTH), torch.randperm(48)
    loss = Recording()
    dataset = IndexedDataset(TensorDataset(data().tensors[0], torch.arange(48)))  # each its own label
    trainer = make(loss, dataset, old_embeddings=FrozenEmbeddings.from_array(stored[order], ids=order))
    curve(trainer, epochs=1)
    seen = []
    for _, labels, _, ref_emb, _ in loss.calls:
        rows = (ref_emb[:, None] == stored).all(2).nonzero()[:, 1]
        assert labels.equal(rows)
        seen += rows.tolist()
    assert sorted(seen) == list(range(48))


def test_a_subset_keeps_its_indices():
    loss = Recording()
    part = torch.arange(47, 15, -1).tolist()
    trainer = make(loss, Subset(IndexedDataset(data()), part), old_embeddings=torch.arange(48.0)[:, None])
    curve(trainer, epochs=1)
    assert sorted(int(row) for call in loss.calls for row in call[3]) == sorted(part)


def test_stored_float16_comes_as_float32():
    loss = Recording()
    curve(make(loss, IndexedDataset(data()), old_embeddings=torch.randn(48, 3).half()), epochs=1)
    assert loss.calls[0][3].dtype == torch.float32


def test_the_old_model_keeps_its_own_dtype():
    old, loss = old_model().double(), Recording()
    curve(make(loss, old_model=old), epochs=1)
    assert old.calls[0].dtype == torch.float64 and loss.calls[0][3].dtype == torch.float32
    curve(make(loss, old_model=old_model(), dtype=torch.float64, models={"trunk": torch.nn.Linear(IN, 3).double()}))
    assert loss.calls[-1][0].dtype == loss.calls[-1][3].dtype == torch.float64


def test_several_old_models():
    first, second = old_model(1), old_model(2)
    stored = second(data().tensors[0]).detach()
    weights = {"v1": 0.5, "v2": 2.0}
    trainer = make(fresh_loss("v1", "v2", weights=weights), old_model={"v1": first, "v2": second})
    expected = curve(trainer)
    assert sorted(trainer.loss_funcs["metric_loss"].terms) == ["task_loss", "v1", "v2"]
    mixed = make(
        fresh_loss("v1", "v2", weights=weights),
        IndexedDataset(data()),
        old_model={"v1": first},
        old_embeddings={"v2": stored},
    )
    assert curve(mixed) == pytest.approx(expected, rel=1e-6)
    swapped = make(fresh_loss("v1", "v2", weights=weights), old_model={"v1": second, "v2": first})
    assert curve(swapped) != pytest.approx(expected, rel=1e-3)


def test_one_old_model_with_a_name_comes_as_a_mapping():
    loss = Recording()
    curve(make(loss, old_model={"v1": old_model()}), epochs=1)
    assert set(loss.calls[0][3]) == {"v1"}


def test_old_and_new_widths_may_differ():
    loss = Recording()
    curve(make(loss, old_model=old_model(width=3)), epochs=1)
    assert loss.calls[0][3].shape == (16, 3)


# Losses that read no old embeddings


def bct():
    return BCTLoss(task_loss(), FrozenClassifier(torch.randn(CLASSES, WIDTH), kind="cosine"))


def several():
    return losses.MultipleLosses([task_loss(), losses.ContrastiveLoss()])


@pytest.mark.parametrize("build", [bct, several])
def test_a_loss_that_reads_none_is_called_as_pml_does(build):
    torch.manual_seed(3)
    loss, old = build(), old_model()
    found = curve(make(copy.deepcopy(loss), old_model=old))
    assert found == curve(make(copy.deepcopy(loss), kind=trainers.MetricLossOnly))
    assert not old.calls


@pytest.mark.parametrize("name", sorted(cases.LOSSES | cases.ALIGNED | cases.PAIRED))
def test_every_loss_of_the_library_gets_what_it_reads(name):
    torch.manual_seed(0)
    images = torch.randn(32, cases.WIDTH)
    dataset = TensorDataset(images, torch.arange(32) % cases.CLASSES)
    calls = []
    loss = cases.build(name)
    loss.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    models = {"trunk": torch.nn.Linear(cases.WIDTH, cases.WIDTH)}
    trainer = make(loss, dataset, models=models, old_model=torch.nn.Linear(cases.WIDTH, cases.WIDTH))
    curve(trainer, epochs=1)
    assert {"ref_emb" in kwargs for kwargs in calls} == {name not in cases.LOSSES}


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting")
@pytest.mark.parametrize("wrapper", [DistributedLossWrapper, GatheredLoss])
def test_distributed_wrappers_are_seen_through(wrapper):
    for inner, called in ((bct(), False), (compatible(), True)):
        old = old_model()
        curve(make(wrapper(inner), old_model=old), epochs=1)
        assert bool(old.calls) == called


def test_a_weight_of_zero_runs_no_old_model():
    old = old_model()
    trainer = make(old_model=old, loss_weights={"metric_loss": 0})
    trainer.initialize_dataloader()
    trainer.calculate_loss(trainer.get_batch())
    assert trainer.losses["metric_loss"] == 0 and not old.calls


# PML's own parts


def test_freeze_these():
    trainer = make(old_model=old_model(), freeze_these=("trunk",))
    before = copy.deepcopy(trainer.models)
    curve(trainer, epochs=1)
    assert trainer.models["trunk"].weight.equal(before["trunk"].weight)
    assert not trainer.models["embedder"].weight.equal(before["embedder"].weight)
    assert not trainer.models["trunk"].training and trainer.models["embedder"].training


def test_tuple_miner_mines_among_new_embeddings_for_the_task_loss():
    task, calls = Recording(), []

    class Miner(miners.MultiSimilarityMiner):
        def forward(self, embeddings, labels, ref_emb=None, ref_labels=None):
            calls.append((embeddings, ref_emb))
            return super().forward(embeddings, labels, ref_emb, ref_labels)

    loss = CompatibleLoss(task, FCTLoss())
    curve(make(loss, old_model=old_model(), mining_funcs={"tuple_miner": Miner()}), epochs=1)
    assert len(calls) == 3 and all(ref is None for _, ref in calls)
    for (_, _, indices_tuple, ref_emb, _), (mined, _) in zip(task.calls, calls, strict=True):
        assert len(indices_tuple) == 4 and ref_emb is None and len(mined) == 16


def test_subset_batch_miner_takes_the_old_rows_along():
    class EveryOther(torch.nn.Module):
        def forward(self, embeddings, labels):
            assert not embeddings.requires_grad
            return torch.arange(1, len(labels), 2)

    loss = Recording()
    rows = torch.arange(48.0)[:, None]
    dataset = IndexedDataset(TensorDataset(data().tensors[0], torch.arange(48)))  # each its own label
    trainer = make(loss, dataset, old_embeddings=rows, mining_funcs={"subset_batch_miner": EveryOther()})
    curve(trainer, epochs=1)
    for embeddings, labels, _, ref_emb, _ in loss.calls:
        assert len(embeddings) == 8 and ref_emb[:, 0].equal(labels.float())
    assert trainer.models["trunk"].training


def test_batches_of_another_form():
    def collate(items):
        return {name: torch.stack([torch.as_tensor(item[i]) for item in items]) for i, name in enumerate("xyi")}

    loss = Recording()
    trainer = make(
        loss,
        IndexedDataset(TensorDataset(data().tensors[0], torch.arange(48))),
        old_embeddings=torch.arange(48.0)[:, None],
        collate_fn=collate,
        data_and_label_getter=lambda batch: (batch["x"], batch["y"]),
        index_getter=lambda batch: batch["i"],
    )
    curve(trainer, epochs=1)
    assert all(call[3][:, 0].equal(call[1].float()) for call in loss.calls) and len(loss.calls) == 3


def test_three_epochs_with_hooks_and_the_cross_model_tester(tmp_path):
    record_keeper = pytest.importorskip("record_keeper", reason="needs record-keeper")
    writer = record_keeper.RecordWriter(str(tmp_path / "logs"))
    keeper = record_keeper.RecordKeeper(None, writer, ["_record_these", "_record_these_stats"])
    hooks = HookContainer(keeper, primary_metric="new_to_old_mean_average_precision", log_freq=1)
    old = FrozenModel(old_model())
    before = copy.deepcopy(old.model.state_dict())
    tester = CrossModelTester(
        old, end_of_testing_hook=hooks.end_of_testing_hook, dataloader_num_workers=0, data_device=CPU
    )
    loss = CompatibleLoss(task_loss(), FCTLoss(), collect_stats=True)
    trainer = make(
        loss,
        old_model=old,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": data(24, seed=9)}, str(tmp_path / "models")),
    )
    trainer.train(num_epochs=3)
    rows = keeper.query("SELECT task_loss, old_loss FROM metric_loss_CompatibleLoss", return_dict=True)
    assert len(rows["task_loss"]) == len(rows["old_loss"]) == 9 and min(rows["old_loss"]) > 0
    totals = keeper.query("SELECT total_loss FROM loss_histories", return_dict=True)["total_loss"]
    assert totals == pytest.approx([a + b for a, b in zip(rows["task_loss"], rows["old_loss"], strict=True)])
    history = hooks.get_accuracy_history(tester, "val", metrics=["new_to_old_precision_at_1"])
    assert history["epoch"] == [1, 2, 3]

    saved = list((tmp_path / "models").iterdir())
    assert {path.name for path in saved} >= {"trunk_3.pth", "embedder_3.pth", "metric_loss_3.pth"}
    assert not [path for path in saved if "old" in path.name]
    assert set(trainer.models) == {"trunk", "embedder"}
    names = torch.load(tmp_path / "models" / "metric_loss_3.pth", weights_only=True)
    assert list(names) == ["loss.W", "balance.task_lengths", "balance.term_lengths", "balance.calls"]
    optimised = {id(p) for o in trainer.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert not optimised & {id(p) for p in old.model.parameters()}
    after = old.model.state_dict()
    assert all(value.equal(before[name]) for name, value in after.items())
    assert all(p.grad is None for p in old.model.parameters())

    again = make(CompatibleLoss(task_loss(), FCTLoss()), old_model=old)
    assert hooks.load_latest_saved_models(again, str(tmp_path / "models"), device=CPU) == 4
    assert again.models["trunk"].weight.equal(trainer.models["trunk"].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    stored = old_model()(data().tensors[0]).detach()
    expected = curve(make(fresh_loss(), old_model=old_model()))
    for kwargs in ({"old_model": old_model()}, {"dataset": IndexedDataset(data()), "old_embeddings": stored}):
        trainer = make(fresh_loss().cuda(), data_device=torch.device("cuda"), **kwargs)
        for model in trainer.models.values():
            model.cuda()
        assert curve(trainer) == pytest.approx(expected, rel=1e-4)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "old_model or old_embeddings must be given, got neither; or an OldEmbeddingDataset"),
        (
            {"old_model": torch.nn.Linear(IN, WIDTH), "old_embeddings": torch.ones(48, WIDTH)},
            "must not both be given for one old model, got both; several",
        ),
        (
            {"old_model": {"v1": torch.nn.Linear(IN, WIDTH)}, "old_embeddings": torch.ones(48, WIDTH)},
            "must not both be given for one old model, got both; several old models are given as mappings",
        ),
        (
            {"old_model": {"v1": torch.nn.Linear(IN, WIDTH)}, "old_embeddings": {"v1": torch.ones(48, WIDTH)}},
            r"got both for \['v1'\]",
        ),
        ({"old_model": torch.ones(48, WIDTH)}, "old_model must be a torch.nn.Module, got Tensor; stored embeddings"),
        ({"old_embeddings": torch.nn.Linear(IN, WIDTH)}, "old_embeddings must be stored embeddings, got Linear; a"),
        ({"old_embeddings": torch.ones(48)}, r"embeddings must be 2-dimensional, \(N, D\), got shape \(48,\)"),
        ({"old_model": {}}, r"old_model must name one old model or more, got the names \[\]"),
        ({"old_embeddings": {"": torch.ones(48, 2)}}, r"old_embeddings must name .*, got the names \[''\]"),
        (
            {
                "old_model": torch.nn.Linear(IN, WIDTH),
                "dataset": OldEmbeddingDataset(data(), FrozenEmbeddings.from_array(torch.ones(48, WIDTH))),
            },
            "must be None with an OldEmbeddingDataset, whose batches have the old embeddings already",
        ),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def train_one_batch(trainer):
    trainer.initialize_dataloader()
    trainer.calculate_loss(trainer.get_batch())


class Pooled(torch.nn.Module):
    def forward(self, x):
        return x[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"old_embeddings": torch.ones(48, WIDTH)},
            r"must give \(data, label, index\) .*, got a list of 2; wrap it in",
        ),
        (
            {"old_embeddings": torch.ones(48, WIDTH), "dataset": TensorDataset(*data().tensors, torch.ones(48))},
            r"indices of a batch must be integers of shape \(N,\), got torch.float32 of shape \(16,\)",
        ),
        (
            {"old_embeddings": torch.ones(48, WIDTH), "index_getter": lambda batch: [1, 2]},
            "indices of a batch must be one a sample: expected 16, got 2",
        ),
        (
            {"old_embeddings": torch.ones(7, WIDTH), "index_getter": lambda batch: [3, 7] + [0] * 14},
            "old_embeddings must have every sample that dataset gives, index 7 is not among its 7; embed it",
        ),
        (
            {"old_embeddings": torch.ones(7, WIDTH), "index_getter": lambda batch: [3, -1] + [0] * 14},
            "index -1 is not among its 7",
        ),
        (
            {
                "old_embeddings": {"v1": torch.ones(48, WIDTH), "v2": torch.ones(10, WIDTH)},
                "index_getter": lambda batch: [20] * 16,
                "loss": compatible("v1", "v2"),
            },
            r"old_embeddings\['v2'\] must have every sample that dataset gives, index 20",
        ),
        (
            {"old_embeddings": torch.ones(48, WIDTH + 1), "dataset": IndexedDataset(data())},
            r"ref_emb must be shaped like embeddings, .*: expected \(16, 6\), got \(16, 7\)",
        ),
        ({"old_model": torch.nn.Linear(IN, WIDTH + 1)}, r"expected \(16, 6\), got \(16, 7\)"),
        ({"old_model": Pooled()}, "old_model must return one embedding a sample: expected 16 rows, got 3"),
        (
            {"old_model": {"v1": torch.nn.Linear(IN, WIDTH)}, "loss": compatible("v2")},
            r"ref_emb must have the names of old_losses, \['v2'\], got \['v1'\]",
        ),
        ({"old_model": torch.nn.Flatten(0)}, r"model must return a tensor of shape \(N, D\), got \(80,\)"),
    ],
)
def test_errors_in_training(arguments, message):
    trainer = make(**arguments)
    with pytest.raises(ValueError, match=message):
        train_one_batch(trainer)


@pytest.mark.parametrize(
    ("collate", "got"),
    [(lambda items: {"x": 1}, "got dict"), (lambda items: [torch.ones(2, IN), torch.ones(2)], r"got \(2,\)")],
)
def test_a_batch_that_lost_its_old_embeddings(collate, got):
    dataset = OldEmbeddingDataset(data(), FrozenEmbeddings.from_array(torch.ones(48, WIDTH)))
    trainer = make(
        dataset=dataset, collate_fn=collate, data_and_label_getter=lambda batch: (torch.ones(2, IN), torch.zeros(2))
    )
    with pytest.raises(ValueError, match=rf"last part of a batch .* must be \(2, D\) old embeddings, {got}; let"):
        train_one_batch(trainer)


def test_the_old_model_must_not_be_trained():
    models = {"trunk": torch.nn.Linear(IN, WIDTH)}
    with pytest.raises(
        ValueError, match=r"old_model must not be trained, .* optimizers\['trunk_optimizer'\]; train copy"
    ):
        make(models=models, old_model=torch.nn.Sequential(models["trunk"]))
    shared = make(models=models, old_model=torch.nn.Sequential(models["trunk"]), freeze_these=("trunk",))
    curve(shared, epochs=1)


def test_an_old_model_changed_by_others_is_refused():
    old = old_model()
    trainer = make(old_model=old)
    with torch.no_grad():
        old.weight.add_(1)
    with pytest.raises(RuntimeError, match="the old model's buffers or parameters changed"):
        train_one_batch(trainer)


@pytest.mark.filterwarnings("ignore")  # Dynamo's, of what it cannot see through
def test_a_compiled_loss():
    classifier = FrozenClassifier(torch.randn(CLASSES, WIDTH), kind="cosine")
    for loss in (BCTLoss(task_loss(), classifier), compatible()):
        trainer = make(torch.compile(loss, backend="eager"), old_model=old_model())
        assert trainer._loss_reads_old() == isinstance(loss, CompatibleLoss)
        trainer.train()


class Pairs(torch.utils.data.Dataset):
    """Gives a dict, as a tokenizer does."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        inputs, label = data()[index]
        return {"inputs": inputs, "parts": (inputs, index)}, label


class OfPairs(torch.nn.Linear):
    def forward(self, batch):
        assert batch["parts"][1].dtype == torch.int64
        return super().forward(batch["inputs"] + batch["parts"][0])


def test_batches_that_are_dicts():
    torch.manual_seed(0)
    models = {"trunk": OfPairs(IN, 7), "embedder": torch.nn.Linear(7, WIDTH)}
    before, old = models["trunk"].weight.detach().clone(), OfPairs(IN, WIDTH)
    make(dataset=Pairs(), models=models, old_model=old).train()
    assert not models["trunk"].weight.equal(before)
    tester = CrossModelTester(old, dataloader_num_workers=0, data_device=CPU)
    assert tester.test({"val": Pairs()}, 1, models["trunk"], models["embedder"])["val"]
