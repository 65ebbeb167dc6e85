"""A gallery in parts: every process of a group gets what one process gets of the whole."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.accuracy.calculator import RANK_METRICS
from tests.processes import run_ranks

CASES = ("plain", "same_items", "ids", "cameras", "copies", "k", "text_ids", "first", "first_of_copies", "junk")


def case(name):
    """Return queries, gallery, options of ``get_accuracy``, and what belongs to the gallery's rows."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 70)
    rows = torch.tensor(rng.normal(size=(70, 5)) + rng.normal(size=(6, 5))[labels], dtype=torch.float32)
    rows = torch.nn.functional.normalize(rows, dim=1)
    if name in ("copies", "first_of_copies"):
        rows[35:] = rows[:35]
    own, options = {"reference_labels": labels}, {}
    if name == "same_items":
        options = {"ref_includes_query": True}
    if name in ("ids", "text_ids"):
        ids = rng.permutation(70)
        ids = np.array([f"item {i}" for i in ids]) if name == "text_ids" else ids
        own["reference_ids"], options = ids, {"query_ids": ids[:20]}
    if name == "junk":
        options = {"junk": [rng.permutation(70)[:9] for _ in range(20)]}
    if name == "cameras":
        cameras = rng.integers(0, 2, 70)
        own["reference_cameras"], options = cameras, {"query_cameras": cameras[:20]}
    return rows[:20] + 0.1, labels[:20], rows, own, options


def accuracy(name, group=None, part=slice(None)):
    query, query_labels, rows, own, options = case(name)
    metrics = ("precision_at_1", "cmc_top_3") if name.startswith("first") else (*RANK_METRICS, "ndcg_at_7")
    calculator = CrossModelAccuracyCalculator(metrics, device="cpu", k=4 if name == "k" else None, gallery_group=group)
    own = {key: value[part] for key, value in own.items()}
    return calculator.get_accuracy(query, query_labels, rows[part], **own, **options)


def run_rank(rank, world_size, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    part = slice(0, 23) if rank == 0 else slice(23, 70)
    group = dist.group.WORLD
    found = {name: accuracy(name, group, part) for name in CASES}
    try:
        query, query_labels, rows, own, _ = case("plain")
        rows = rows[part].clone()
        if rank == 1:
            rows[4] = torch.nan
        calculator = CrossModelAccuracyCalculator(RANK_METRICS, device="cpu", gallery_group=group)
        calculator.get_accuracy(query, query_labels, rows, own["reference_labels"][part])
    except ValueError as error:
        found["error"] = str(error)
    results[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(run_rank, 2, tmp_path_factory.mktemp("gallery"))


@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_the_whole_gives(name, ranks):
    expected = accuracy(name)
    for rank in (0, 1):
        assert ranks[rank][name] == pytest.approx(expected, abs=1e-12)


def test_an_error_in_one_process_is_raised_in_all(ranks):
    for rank in (0, 1):
        assert ranks[rank]["error"].startswith("rank 1 of gallery_group: reference must be finite, row 4 has a NaN")


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_a_part_cannot_do_is_refused(alone):
    with pytest.raises(ValueError, match="knn_func must be None with gallery_group, got"):
        CrossModelAccuracyCalculator(knn_func=lambda *_: None, gallery_group=alone)
    query, query_labels, *_ = case("plain")
    with pytest.raises(ValueError, match=r"include must name ranking metrics alone with gallery_group, got \['AMI'\]"):
        CrossModelAccuracyCalculator(("AMI",), device="cpu", gallery_group=alone).get_accuracy(
            query, query_labels, query, query_labels
        )
    with pytest.raises(ValueError, match="reference must be given with gallery_group"):
        CrossModelAccuracyCalculator(RANK_METRICS, device="cpu", gallery_group=alone).get_accuracy(query, query_labels)


def test_ids_in_some_processes_only_are_refused(alone, monkeypatch):
    from pml_compat.accuracy import gallery

    monkeypatch.setattr(gallery, "gathered", lambda value, group: [value, None])
    with pytest.raises(ValueError, match="must be given in every process of gallery_group, or none"):
        gallery.joined(np.arange(3), alone)
