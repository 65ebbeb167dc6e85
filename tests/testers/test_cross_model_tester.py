import re

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import FrozenEmbeddings, FrozenModel
from pml_compat.testers import CrossModelTester
from pml_compat.transformations import FCTTransformation, LinearTransformation

IN, OLD, SIDE, TRUNK, NEW = 5, 6, 3, 7, 9  # widths
SPACES = ("old", "new", "transformed_old")
EVERY_PAIR = tuple(f"{query}_to_{gallery}" for query in SPACES for gallery in SPACES)
CPU = torch.device("cpu")


def split(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    return TensorDataset(torch.randn(n, IN, generator=generator) + torch.eye(IN)[labels], labels)


class Counting(torch.nn.Linear):
    """An old model that counts what it embeds, and sees whether it is in eval mode."""

    def __init__(self):
        super().__init__(IN, OLD)
        self.seen, self.modes = 0, set()

    def forward(self, x):
        self.seen += len(x)
        self.modes.add((self.training, torch.is_grad_enabled()))
        return super().forward(x)


class Models:
    def __init__(self):
        torch.manual_seed(0)
        self.old, self.trunk, self.embedder = Counting(), torch.nn.Linear(IN, TRUNK), torch.nn.Linear(TRUNK, NEW)

    @torch.no_grad()
    def embed(self, data):
        old = self.old(data)
        self.old.seen, self.old.modes = 0, set()
        return {"old": old, "new": self.embedder(self.trunk(data))}


@pytest.fixture
def models():
    return Models()


def fct(side=SIDE):
    torch.manual_seed(1)
    transformation = FCTTransformation(OLD, NEW, side, hidden_features=8)
    transformation(torch.randn(20, OLD), None if side is None else torch.randn(20, side))  # moves the running averages
    return transformation


def side_of(n, seed=5):
    return torch.randn(n, SIDE, generator=torch.Generator().manual_seed(seed))


def calculator(*metrics, **kwargs):
    return CrossModelAccuracyCalculator(
        include=metrics or ("precision_at_1", "mean_average_precision"), fit_width=True, **kwargs
    )


def make(*args, **kwargs):
    return CrossModelTester(*args, dataloader_num_workers=0, data_device=CPU, **kwargs)


def run(tester, models, datasets, epoch=1, **kwargs):
    return tester.test(datasets, epoch, models.trunk, models.embedder, **kwargs)


def directly(query, query_labels, gallery=None, gallery_labels=None, ref_includes_query=True, pairs=EVERY_PAIR[:2]):
    """Return what the calculator itself says of each pair, in PML's names."""
    gallery, gallery_labels = (query, query_labels) if gallery is None else (gallery, gallery_labels)
    expected = {}
    for pair in pairs:
        first, second = pair.split("_to_")
        found = calculator().get_accuracy(
            query[first], query_labels, gallery[second], gallery_labels, ref_includes_query
        )
        expected.update({f"{pair}_{metric}_level0": value for metric, value in found.items()})
    return expected


def without_epoch(accuracies):
    return {name: value for name, value in accuracies.items() if name != "epoch"}


@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("side", [None, SIDE])
@pytest.mark.parametrize("stored", [True, False])
def test_every_pair_is_what_the_calculator_says(models, stored, side, unit_length):
    data, labels = split().tensors
    embeddings, transformation = models.embed(data), fct(side)
    side_info = None if side is None else side_of(len(data))
    embeddings["transformed_old"] = torch.tensor(transformation.apply_to(embeddings["old"], side_info, progress=False))
    tester = make(
        None if stored else models.old,
        old_embeddings={"val": embeddings["old"]} if stored else None,
        transformation=transformation,
        side_info=None if side is None else {"val": side_info},
        pairs=EVERY_PAIR,
        normalize_embeddings=unit_length,
    )
    found = run(tester, models, {"val": split()}, epoch=7)
    assert found is tester.all_accuracies and found["val"]["epoch"] == 7
    if unit_length:
        embeddings = {name: normalize(values) for name, values in embeddings.items()}
    expected = directly(embeddings, labels, pairs=EVERY_PAIR)
    assert list(without_epoch(found["val"])) == list(expected)
    assert without_epoch(found["val"]) == pytest.approx(expected)
    assert len({round(value, 6) for name, value in expected.items() if "average" in name}) == len(EVERY_PAIR)


def test_by_hand():
    labels = torch.tensor([0, 1, 1, 0])
    old = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])  # 0 and 1, 2 and 3 find each other
    new = torch.eye(2)[labels]
    tester = make(old_embeddings={"val": old}, accuracy_calculator=calculator("precision_at_1"))
    found = tester.test({"val": TensorDataset(new, labels)}, 1, torch.nn.Identity())
    assert found == {
        "val": {
            "epoch": 1,
            "old_to_old_precision_at_1_level0": 0.0,
            "new_to_old_precision_at_1_level0": 0.5,  # 0 and 2 stand on themselves, 1 and 3 on 2 and 0
            "new_to_new_precision_at_1_level0": 1.0,
        }
    }


@pytest.mark.parametrize("splits", [None, [("val", ["gallery"])], [("val", ["gallery", "val"]), ("gallery", ["val"])]])
def test_new_to_new_is_what_pmls_tester_measures(models, splits):
    datasets = {"val": split(), "gallery": split(30, seed=1)}
    options = {"dataloader_num_workers": 0, "data_device": CPU, "accuracy_calculator": calculator()}
    of_host = testers.GlobalEmbeddingSpaceTester(**options)
    copies = [None if splits is None else [(query, [*refs]) for query, refs in splits] for _ in range(2)]
    expected = run(of_host, models, datasets, splits_to_eval=copies[0])
    found = run(CrossModelTester(models.old, **options), models, datasets, splits_to_eval=copies[1])
    assert list(found) == list(expected)
    for query, accuracies in expected.items():
        got = {name.removeprefix("new_to_new_"): value for name, value in found[query].items()}
        assert accuracies.items() <= got.items()


@pytest.mark.parametrize("references", [["gallery"], ["gallery", "val"], ["more", "gallery"]])
def test_other_reference_splits(models, references):
    datasets = {"val": split(), "gallery": split(30, seed=1), "more": split(10, seed=2)}
    order = sorted(references, key=lambda name: name != "val")  # the queries come first
    query = {name: normalize(values) for name, values in models.embed(datasets["val"].tensors[0]).items()}
    galleries = [models.embed(datasets[name].tensors[0]) for name in order]
    gallery = {name: normalize(torch.cat([part[name] for part in galleries])) for name in query}
    labels = torch.cat([datasets[name].tensors[1] for name in order])
    pairs = ("old_to_old", "new_to_old", "new_to_new")
    expected = directly(query, datasets["val"].tensors[1], gallery, labels, "val" in references, pairs)
    tester = make(models.old)
    found = run(tester, models, datasets, splits_to_eval=[("val", [*references])])
    assert list(found) == ["val"] and without_epoch(found["val"]) == pytest.approx(expected)
    assert models.old.seen == sum(len(datasets[name]) for name in {"val", *references})


def test_names_survive_a_database(models):
    default = run(make(models.old), models, {"val": split()})["val"]
    pairs = ("old_to_old", "new_to_old", "new_to_new")
    metrics = ("precision_at_1", "mean_average_precision")
    names = sorted(f"{pair}_{metric}_level0" for pair in pairs for metric in metrics)
    assert sorted(without_epoch(default)) == names and all(re.fullmatch(r"[a-z]\w*", name) for name in names)
    tester = make(models.old, transformation=fct(None))
    assert {f"{pair}_{metric}" for pair in (*pairs, "new_to_transformed_old") for metric in metrics} == set(
        tester.accuracy_calculator.get_curr_metrics()
    )
    tester = make(models.old, pairs=["new_to_old"], accuracy_calculator=calculator("cmc_top_5", avg_of_avgs=True))
    assert tester.accuracy_calculator.get_curr_metrics() == ["new_to_old_cmc_top_5"]
    assert tester.description_suffixes("accuracies") == "accuracies_normalized_CrossModelTester_level_0_avg_of_avgs"


@pytest.mark.parametrize("form", ["tensor", "array", "memmap", "file", "store", "ids", "folder"])
def test_stored_old_embeddings(models, form, tmp_path):
    data, _ = split().tensors
    old, side = models.embed(data)["old"], side_of(len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "old.npy", old.numpy())
    side_info = {"val": side.numpy()}
    if form in ("ids", "folder"):
        side_info = None  # it is stored beside them
    stored = {
        "tensor": lambda: old,
        "array": old.numpy,
        "memmap": lambda: np.load(tmp_path / "old.npy", mmap_mode="r"),
        "file": lambda: tmp_path / "old.npy",
        "store": lambda: FrozenEmbeddings.from_array(old),
        "ids": lambda: FrozenEmbeddings.from_array(old[order], ids=order, side_info=side[order]),
        "folder": lambda: FrozenEmbeddings.write(tmp_path / "old", [(old[order], order, side[order])]),
    }[form]()
    of_store = make(old_embeddings={"val": stored}, transformation=fct(), side_info=side_info)
    of_model = make(models.old, transformation=fct(), side_info={"val": side})
    found, expected = (run(tester, models, {"val": split()})["val"] for tester in (of_store, of_model))
    assert found == pytest.approx(expected) and len(found) == 9


def test_stored_and_computed_side_by_side(models):
    """The gallery is stored, the queries are embedded."""
    datasets = {"val": split(), "gallery": split(30, seed=1)}
    gallery = models.embed(datasets["gallery"].tensors[0])["old"]
    both = make(models.old, old_embeddings={"gallery": gallery})
    found = run(both, models, datasets, splits_to_eval=[("val", ["gallery"])])["val"]
    assert models.old.seen == len(datasets["val"])
    assert found == pytest.approx(run(make(models.old), models, datasets, splits_to_eval=[("val", ["gallery"])])["val"])


def test_only_what_a_pair_needs_has_to_be_there(models):
    datasets = {"val": split(), "gallery": split(30, seed=1)}
    gallery = models.embed(datasets["gallery"].tensors[0])["old"]
    tester = make(old_embeddings={"gallery": gallery}, pairs=("new_to_old", "new_to_new"))
    found = run(tester, models, datasets, splits_to_eval=[("val", ["gallery"])])["val"]
    everything = run(make(models.old), models, datasets, splits_to_eval=[("val", ["gallery"])])["val"]
    assert len(found) == 5 and found.items() <= everything.items()
    models.embed(datasets["val"].tensors[0])
    run(make(models.old, pairs=["new_to_new"]), models, datasets)
    assert models.old.seen == 0


def test_the_old_model_embeds_a_split_once(models):
    datasets = {"val": split(), "gallery": split(30, seed=1)}
    tester = make(models.old.train())
    first = run(tester, models, datasets)
    second = run(tester, models, dict(datasets), epoch=2)
    assert models.old.seen == 54 and models.old.modes == {(False, False)}
    assert without_epoch(second["val"]) == without_epoch(first["val"])
    run(tester, models, datasets, splits_to_eval=[("val", ["gallery"])])
    assert models.old.seen == 54
    run(tester, models, {**datasets, "val": split()})  # another data set
    assert models.old.seen == 54 + 24
    datasets["gallery"].tensors = tuple(torch.cat([t, t[:7]]) for t in datasets["gallery"].tensors)
    found = run(tester, models, {"gallery": datasets["gallery"]})  # another length
    assert models.old.seen == 54 + 24 + 37
    assert found["gallery"] == run(make(models.old), models, {"gallery": datasets["gallery"]})["gallery"]
    datasets["gallery"].tensors = tuple(t.flip(0) for t in datasets["gallery"].tensors)
    found = run(tester, models, {"gallery": datasets["gallery"]})  # another order
    assert found["gallery"] == run(make(models.old), models, {"gallery": datasets["gallery"]})["gallery"]


def test_a_transformation_is_measured_as_it_is(models):
    transformation = fct(None).train()
    before = {name: value.clone() for name, value in transformation.state_dict().items()}
    tester = make(FrozenModel(models.old, normalize=True), transformation=transformation)
    key = "new_to_transformed_old_mean_average_precision_level0"
    first = run(tester, models, {"val": split()})["val"][key]
    assert transformation.training
    assert all(value.equal(before[name]) for name, value in transformation.state_dict().items())
    with torch.no_grad():
        for parameter in transformation.parameters():
            parameter.neg_()
    assert run(tester, models, {"val": split()}, epoch=2)["val"][key] != first
    unit = make(old_embeddings={"val": normalize(models.embed(split().tensors[0])["old"])}, transformation=fct(None))
    assert run(unit, models, {"val": split()})["val"][key] == pytest.approx(first)


def test_label_levels(models):
    data, labels = split().tensors
    datasets = {"val": TensorDataset(data, torch.stack([labels, labels % 2], 1))}
    tester = make(models.old, label_hierarchy_level="all", accuracy_calculator=calculator("precision_at_1"))
    found = run(tester, models, datasets)["val"]
    coarse = run(
        make(models.old, accuracy_calculator=calculator("precision_at_1")),
        models,
        {"val": TensorDataset(data, labels % 2)},
    )["val"]
    for pair in ("old_to_old", "new_to_old", "new_to_new"):
        levels = [found[f"{pair}_precision_at_1_level{level}"] for level in (0, 1)]
        assert levels[1] == coarse[f"{pair}_precision_at_1_level0"]
        assert found[f"AVERAGE_{pair}_precision_at_1"] == pytest.approx(sum(levels) / 2)


def test_pmls_other_arguments(models):
    """Items that are dictionaries, an own collate function, a visualizer, the trunk's output, a device by name."""
    data, labels = split().tensors
    shown = []

    class Visualizer:
        def fit_transform(self, embeddings):
            shown.append(embeddings.shape)
            return embeddings

    tester = CrossModelTester(
        models.old,
        data_and_label_getter=lambda batch: (batch["image"], batch["label"]),
        dataloader_num_workers=0,
        data_device="cpu",
        batch_size=5,
        dtype=torch.float32,
        use_trunk_output=True,
        visualizer=Visualizer(),
        end_of_testing_hook=lambda tester: shown.append(tester.embeddings_and_labels["val"][0].shape),
    )
    items = [{"x": image, "y": label} for image, label in zip(data.double(), labels, strict=True)]

    def collate(batch):
        return {"image": torch.stack([i["x"] for i in batch]), "label": torch.stack([i["y"] for i in batch])}

    found = tester.test({"val": items}, 1, models.trunk, models.embedder, None, collate)["val"]
    expected = make(models.old).test({"val": split()}, 1, models.trunk)["val"]
    assert found == pytest.approx(expected)
    assert shown == [(24, TRUNK), (24, TRUNK)]


def test_a_linear_transformation_into_a_narrower_space(models):
    data, _ = split().tensors
    embeddings = models.embed(data)
    new = embeddings["new"][:, :4]
    narrower = torch.nn.Linear(TRUNK, 4)
    narrower.load_state_dict({name: value[:4] for name, value in models.embedder.state_dict().items()})
    transformation = LinearTransformation(OLD, 4).fit(embeddings["old"], new)
    found = make(models.old, transformation=transformation).test({"val": split()}, 1, models.trunk, narrower)["val"]
    mapped = transformation(embeddings["old"]).detach()
    expected = calculator().get_accuracy(
        normalize(new), split().tensors[1], normalize(mapped), split().tensors[1], ref_includes_query=True
    )
    for name, value in expected.items():
        assert found[f"new_to_transformed_old_{name}_level0"] == pytest.approx(value)


def test_the_old_model_goes_to_the_data_device(models):
    tester = CrossModelTester(models.old, data_device="meta")
    assert tester.old_model.model.weight.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(models):
    """The stored embeddings and the transformation may stay on the CPU."""
    datasets = {"val": split(), "gallery": split(30, seed=1)}
    gallery, side = models.embed(datasets["gallery"].tensors[0])["old"], {"val": side_of(24), "gallery": side_of(30)}
    arguments = {"old_embeddings": {"gallery": gallery}, "transformation": fct(), "side_info": side}
    splits = [("val", ["val", "gallery"])]
    expected = run(make(models.old, **arguments), models, datasets, splits_to_eval=splits)["val"]
    models.trunk.cuda(), models.embedder.cuda()
    tester = CrossModelTester(models.old, dataloader_num_workers=0, **arguments)
    for _ in range(2):
        found = run(tester, models, datasets, splits_to_eval=splits)["val"]
        assert found == pytest.approx(expected)


# PML's trainer and hooks


def make_keeper(folder):
    record_keeper = pytest.importorskip("record_keeper", reason="needs record-keeper")
    writer = record_keeper.RecordWriter(str(folder))
    return record_keeper.RecordKeeper(None, writer, ["_record_these", "_record_these_stats"])


def make_trainer(models, lr=0.05, **kwargs):
    networks = {"trunk": models.trunk, "embedder": models.embedder}
    return trainers.MetricLossOnly(
        models=networks,
        optimizers={f"{name}_optimizer": torch.optim.SGD(m.parameters(), lr=lr) for name, m in networks.items()},
        loss_funcs={"metric_loss": losses.ContrastiveLoss()},
        dataset=split(32, seed=9),
        batch_size=16,
        dataloader_num_workers=0,
        data_device=CPU,
        **kwargs,
    )


def hooked(models, folder, primary_metric="new_to_old_mean_average_precision", patience=None, lr=0.05, **kwargs):
    hooks = HookContainer(make_keeper(folder / "logs"), primary_metric=primary_metric)
    tester = make(models.old, end_of_testing_hook=hooks.end_of_testing_hook, **kwargs)
    hook = hooks.end_of_epoch_hook(tester, {"val": split()}, str(folder / "models"), patience=patience)
    return hooks, tester, make_trainer(models, lr, end_of_epoch_hook=hook)


def test_trains_logs_and_resumes(models, tmp_path):
    hooks, tester, trainer = hooked(models, tmp_path, transformation=fct(None))
    before = [p.clone() for p in models.old.parameters()]
    trainer.train(num_epochs=2)
    assert models.old.seen == 24 and models.old.modes == {(False, False)}
    assert all(p.equal(q) and p.grad is None for p, q in zip(models.old.parameters(), before, strict=True))
    assert not {"old_model", "old"} & trainer.models.keys()

    table = hooks.record_group_name(tester, "val")
    assert table == "accuracies_normalized_CrossModelTester_level_0_VAL_vs_self"
    rows = hooks.record_keeper.query(f"SELECT * FROM {table}", return_dict=True)
    assert {"epoch", "best_epoch", "best_accuracy", *without_epoch(tester.all_accuracies["val"])} <= rows.keys()
    assert rows["epoch"] == [1, 2] and len(tester.all_accuracies["val"]) == 9
    history = rows["new_to_old_mean_average_precision_level0"]
    assert history[1] == tester.all_accuracies["val"]["new_to_old_mean_average_precision_level0"] != history[0]
    best = hooks.get_best_epoch_and_accuracy(tester, "val")
    assert best == (1 + history.index(max(history)), max(history)) == (rows["best_epoch"][1], rows["best_accuracy"][1])
    saved = {path.name for path in (tmp_path / "models").iterdir()}
    assert {"trunk_2.pth", "embedder_2.pth", f"trunk_best{best[0]}.pth", f"embedder_best{best[0]}.pth"} <= saved

    again = Models()
    hooks, tester, trainer = hooked(again, tmp_path, transformation=fct(None))
    start = hooks.load_latest_saved_models(trainer, str(tmp_path / "models"), device=CPU)
    assert start == 3 and again.trunk.weight.equal(models.trunk.weight)
    trainer.train(start_epoch=start, num_epochs=3)
    rows = hooks.record_keeper.query(f"SELECT * FROM {table}", return_dict=True)
    assert (
        rows["epoch"] == [1, 2, 3]
        and rows["old_to_old_precision_at_1_level0"][2] == rows["old_to_old_precision_at_1_level0"][0]
    )
    history = rows["new_to_old_mean_average_precision_level0"]
    assert hooks.get_best_epoch_and_accuracy(tester, "val") == (1 + history.index(max(history)), max(history))


@pytest.mark.parametrize("label_hierarchy_level", [0, "all"])
def test_patience_waits_for_the_cross_test(models, tmp_path, label_hierarchy_level):
    kwargs = {"label_hierarchy_level": label_hierarchy_level}
    hooks, tester, trainer = hooked(models, tmp_path, "new_to_old_precision_at_1", patience=1, lr=0.0, **kwargs)
    trainer.train(num_epochs=9)
    assert trainer.epoch == 3 and hooks.get_best_epoch_and_accuracy(tester, "val")[0] == 1


def test_hooks_know_the_metrics_of_every_pair(models, tmp_path):
    tester = make(models.old)
    for metric in ("old_to_old_precision_at_1", "new_to_old_mean_average_precision"):
        assert HookContainer(None, primary_metric=metric).end_of_epoch_hook(tester, {}, str(tmp_path))
    with pytest.raises(ValueError, match=r"`primary_metric` must be one of: \['old_to_old_"):
        HookContainer(None, primary_metric="precision_at_1").end_of_epoch_hook(tester, {}, str(tmp_path))


@pytest.mark.parametrize("tests_before", [0, 1])
def test_the_old_model_must_not_be_the_one_in_training(models, tests_before):
    datasets = {"val": split()}
    tester = make(torch.nn.Sequential(models.trunk, models.embedder))
    for _ in range(tests_before):
        run(tester, models, datasets)
    make_trainer(models).train(num_epochs=1)
    with pytest.raises(RuntimeError, match=r"parameters changed since its last call; is it being trained"):
        run(tester, models, datasets)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "old_model or old_embeddings must be given, got neither"),
        ({"old_model": torch.ones(2, 3)}, r"old_model must be a torch.nn.Module, got Tensor; stored embeddings are"),
        ({"old_embeddings": torch.ones(2, 3)}, r"old_embeddings must be a dictionary by split name, got Tensor; give"),
        ({"old_embeddings": {"val": torch.ones(2)}}, r"embeddings must be 2-dimensional, \(N, D\), got shape \(2,\)"),
        ({"transformation": torch.nn.Linear(OLD, NEW)}, r"transformation must be a pml_compat.\S+, got Linear"),
        ({"side_info": {"val": side_of(24)}}, r"side_info must be None where there is no transformation, .*'val'"),
        (
            {"transformation": fct(None), "side_info": {"val": side_of(24)}},
            "side_info must be None where the transformation takes none",
        ),
        (
            {"transformation": fct(), "side_info": side_of(24)},
            "side_info must be a dictionary by split name, got Tensor",
        ),
        ({"pairs": ["new/old"]}, r"pairs must be a sequence of old_to_old, old_to_new, .*, got \['new/old'\]"),
        ({"pairs": "new_to_old"}, "pairs must be a sequence of .*, got 'new_to_old'"),
        ({"pairs": ()}, r"pairs must be a sequence of .*, got \(\)"),
        ({"pairs": ("new_to_transformed_old",)}, "pairs must not name transformed_old without a transformation, got"),
        ({"pca": 2}, "pca must be None, got 2: each model's PCA"),
    ],
)
def test_constructor_errors(arguments, message):
    old_model = None if not arguments else torch.nn.Linear(IN, OLD)
    with pytest.raises(ValueError, match=message):
        make(**{"old_model": old_model, **arguments})


def test_pmls_calculator_is_refused(models):
    with pytest.raises(ValueError, match=r"accuracy_calculator must be a CrossModelAccuracyCalculator, got Accuracy"):
        make(models.old, accuracy_calculator=AccuracyCalculator(include=("NMI",), knn_func=print, kmeans_func=print))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"old_embeddings": {"test": torch.ones(24, OLD)}},
            r"old_embeddings must have split 'val', got \['test'\]; add it, or old_model, or leave out the pairs",
        ),
        (
            {"old_embeddings": {"val": torch.ones(23, OLD)}},
            r"old_embeddings\['val'\] must have one row for each of the 24 items .*, got none for item 23",
        ),
        (
            {"old_embeddings": {"val": torch.ones(25, OLD)}},
            r"old_embeddings\['val'\] must have one row .*, got 25 rows; of a larger store, pick them",
        ),
        (
            {"old_embeddings": {"val": FrozenEmbeddings.from_array(torch.ones(24, OLD), ids=torch.arange(24) + 1)}},
            r"with its position as id, got none for item 0",
        ),
        (
            {"transformation": fct(), "side_info": {"val": side_of(9)}},
            r"side_info\['val'\] must have one row for each of the 24 items .*, got none for item 9",
        ),
        (
            {"transformation": fct(), "side_info": {"test": side_of(24)}},
            r"side_info must have split 'val' for this FCTTransformation, got \['test'\]",
        ),
        ({"transformation": fct(), "side_info": {"val": torch.ones(24, 2)}}, "side_info must be 3 wide, got width 2"),
        (
            {"transformation": LinearTransformation(OLD, 4)},
            "transformation must lead into the new space, 9 wide, got out_features 4",
        ),
        (
            {"transformation": LinearTransformation(4, NEW)},
            "old embeddings of split 'val' must be 4 wide, the transformation's in_features, got width 6",
        ),
    ],
)
def test_errors_in_a_test(models, arguments, message):
    tester = make(**{"old_model": None if "old_embeddings" in arguments else models.old, **arguments})
    with pytest.raises(ValueError, match=message):
        run(tester, models, {"val": split()})


def test_widths_of_the_splits_must_agree(models):
    tester = make(models.old, old_embeddings={"gallery": torch.ones(24, 4)})
    with pytest.raises(ValueError, match=r"of split 'gallery' must be 6 wide, as those seen before, got width 4"):
        run(tester, models, {"val": split(), "gallery": split()}, splits_to_eval=[("val", ["val", "gallery"])])


def test_a_data_set_that_changes_its_order_is_refused(models):
    class Shuffled(TensorDataset):
        shift = 0

        def __getitem__(self, index):
            self.shift += index == 0
            return super().__getitem__((index + self.shift) % len(self))

    with pytest.raises(ValueError, match=r"split 'val' must give its items in the same order each time"):
        run(make(models.old), models, {"val": Shuffled(*split().tensors)})


@pytest.mark.parametrize("mapped", [False, True])
def test_the_whole_evaluation_of_a_split(mapped, models):
    data = {"val": split(60)}
    transformation = LinearTransformation(OLD, NEW) if mapped else None
    tester = CrossModelTester(models.old, transformation=transformation, dataloader_num_workers=0, data_device=CPU)
    accuracies = tester.test(data, 1, models.trunk, models.embedder)["val"]
    found = tester.evaluate(data, models.trunk, models.embedder, orders=1)
    pairs = ["old_to_old", "new_to_old", "new_to_new", *(["new_to_transformed_old"] if mapped else [])]
    for pair in pairs:
        for metric in ("precision_at_1", "mean_average_precision"):
            assert found.accuracy(pair, metric) == pytest.approx(accuracies[f"{pair}_{metric}_level0"], abs=1e-5)
    assert found.data["same_items"] == "position" and found.backfill and found.verdict.title
