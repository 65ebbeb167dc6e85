"""A mapped gallery embedded anew: as far as a budget goes, on from there after any kill, in an order of one's own."""

import os
import time

import numpy as np
import pytest
import torch

from pml_compat.cli.main import main
from pml_compat.gallery import backfill, migrate, open_store, rollback
from pml_compat.gallery.stores import read_manifest
from tests.gallery.test_migrate import (  # noqa: F401 (fixtures)
    FILES,
    IDS,
    NEW_WIDTH,
    ROWS,
    content,
    database,
    fill,
    killed_runs,
    linear,
    mapped,
    one_thread,
    place,
    write_npy,
    write_qdrant,
)

OWN = np.random.default_rng(9).normal(size=(ROWS, NEW_WIDTH)).astype(np.float32)  # what the new model embeds


def own_vectors(ids):
    return OWN[np.searchsorted(IDS, ids)]


def replaced(address):
    found = open_store(address).fetch(IDS)
    own, old = (np.abs(found - rows).max(1) < 1e-5 for rows in (OWN, mapped(linear())))
    assert (own ^ old).all()  # each item is one or the other
    return set(IDS[own].tolist())


def test_a_backfill_goes_as_far_as_its_budget_and_on_from_there(tmp_path):
    old, new = write_npy(tmp_path)
    migrate(old, new, linear(), progress=False)
    asked = []

    def embed(ids):
        asked.extend(ids)
        return torch.from_numpy(own_vectors(ids))

    found = backfill(new, embed, budget="20%", batch_size=50, progress=False)
    assert found["backfill"]["done"] == 120 and replaced(new) == set(asked)
    backfill(new, embed, budget=200, batch_size=50, progress=False)
    assert len(asked) == len(set(asked)) == 200 and replaced(new) == set(asked)
    backfill(new, embed, budget="150", progress=False)  # less than is done
    backfill(new, embed, budget="0s", progress=False)
    assert len(asked) == 200
    with pytest.raises(ValueError, match="order, seed and model must be those of the run that began"):
        backfill(new, embed, budget="100%", seed=1, progress=False)
    backfill(new, embed, budget="1h", progress=False)
    assert replaced(new) == set(IDS.tolist()) and len(asked) == ROWS
    assert read_manifest(new)["backfill"]["done"] == ROWS


def test_a_backfill_in_an_order_of_ones_own(tmp_path):
    old, new = write_npy(tmp_path)
    migrate(old, new, linear(), new_model="b", progress=False)
    order = IDS[::-3]
    backfill(new, own_vectors, budget=60, order=order, model="b", progress=False)
    assert replaced(new) == set(order[:60].tolist())
    with pytest.raises(ValueError, match="model must be the one that the gallery was mapped for, 'b', got 'c'"):
        backfill(new, own_vectors, budget=60, order=order, model="c")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "kind",
    [  # what stores in files have in common waits beside them; the slow ones are written as those before them
        "npy",
        "parquet",
        pytest.param("parquet folder", marks=pytest.mark.slow),
        "faiss",
        pytest.param("ivf", marks=pytest.mark.slow),
        "qdrant",
        "postgres",
    ],
)
def test_a_killed_backfill_goes_on(kind, tmp_path, request):
    if kind == "postgres":
        database = request.getfixturevalue("database")
        fill(database, "items")
        old, new = place(database, "items#embedding"), place(database, "items#embedding_v2")
    else:
        old, new = (write_qdrant if kind == "qdrant" else FILES[kind])(tmp_path)

    def run():
        migrate(old, new, linear(), progress=False)

        def embed(ids):
            time.sleep(0.01)
            return own_vectors(ids)

        backfill(new, embed, budget="50%", batch_size=20, progress=False)

    def check():
        assert len(replaced(new)) == 300
        if kind in FILES:
            assert read_manifest(new)["backfill"] | {"order": 0} == {
                "order": 0,
                "done": 300,
                "written": 300,
                "model": None,
            }
        assert not [name for name in os.listdir(tmp_path) if "waiting" in name or "partial" in name]
        rollback(new)

    killed_runs(run, 2, 0.3 if kind != "qdrant" else 1.0)
    killed_runs(run, 0, 0)
    killed_runs(check, 0, 0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [("110%", "at most 100%"), ("a lot", "must be a share"), (-3, "must be a share"), (0.5, "a share is written 20%")],
)
def test_budgets_that_are_none(budget, message, tmp_path):
    old, new = write_npy(tmp_path)
    with pytest.raises(ValueError, match="must be what a migration has finished"):
        backfill(new, own_vectors, budget="10%")
    migrate(old, new, linear(), progress=False)
    with pytest.raises(ValueError, match=message):
        backfill(new, own_vectors, budget=budget)


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda ids: own_vectors(ids)[:, :3], "must return a row of 5 numbers for each of"),
        (lambda ids: own_vectors(ids)[:1], "must return a row of 5 numbers for each of"),
        (lambda ids: own_vectors(ids) * np.nan, "must return finite numbers"),
    ],
)
def test_embeddings_that_do_not_fit_change_nothing(embed, message, tmp_path):
    old, new = write_npy(tmp_path)
    migrate(old, new, linear(), progress=False)
    before = content(new)
    with pytest.raises(ValueError, match=message):
        backfill(new, embed, budget="10%", progress=False)
    with pytest.raises(ValueError, match="it lacks 5"):
        backfill(new, lambda ids: OWN[: len(ids)], budget=2, order=np.array([5, 3]), progress=False)
    assert content(new) == before


def test_command_line_backfill(tmp_path, capsys, monkeypatch):
    old, new = write_npy(tmp_path)
    linear().save(tmp_path / "map.safetensors")
    (tmp_path / "my_embedder.py").write_text(
        "import numpy as np\n\ndef embed(ids):\n    return np.full((len(ids), 5), 2.0, np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["migrate", old, new, "--with", "map.safetensors"]
    assert main([*command, "--embed", "my_embedder:embed", "--budget", "25%"]) == 0
    assert "150 of them embedded anew" in capsys.readouterr().out
    assert (np.load(new) == 2).all(1).sum() == 150
    assert main([*command, "--embed", "my_embedder:embed"]) == 3
    assert "--embed must be given with --budget" in capsys.readouterr().err
    assert main([*command, "--embed", "my_embedder:other", "--budget", "3"]) == 3
    assert "it has no 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FILES)
def test_a_store_in_files_is_written_anew_once_a_run(kind, tmp_path):
    """Order, ids, payload and what was not embedded stay; what waits is gone once it is written."""
    old, new = FILES[kind](tmp_path)
    migrate(old, new, linear(), batch_size=100, progress=False)
    before = [batch.records() for batch in open_store(new).batches(1000)]
    order = IDS[::-2]

    def embed(ids):
        if len(ids) < 50:
            raise RuntimeError("the embedder broke off")
        return own_vectors(ids)

    with pytest.raises(RuntimeError, match="broke off"):
        backfill(new, embed, budget=130, order=order, batch_size=50, progress=False)
    if kind != "npy":
        assert replaced(new) == set()  # 100 wait
    asked = []
    backfill(new, lambda ids: asked.extend(ids) or own_vectors(ids), budget=130, order=order, progress=False)
    assert asked == order[100:130].tolist() and replaced(new) == set(order[:130].tolist())
    assert [batch.records() for batch in open_store(new).batches(1000)] == before
    backfill(new, own_vectors, budget=200, order=order, progress=False)
    assert replaced(new) == set(order[:200].tolist())
    assert not [name for name in os.listdir(tmp_path) if "waiting" in name or "partial" in name]
    whole = content(new)
    backfill(new, own_vectors, budget=200, order=order, progress=False)
    assert content(new) == whole  # nothing is written for nothing


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "npy"])
def test_an_id_that_is_not_there_costs_no_embedding(kind, tmp_path):
    old, new = FILES[kind](tmp_path)
    migrate(old, new, linear(), progress=False)
    with pytest.raises(ValueError, match=r"order must name items of .*, it lacks 5"):
        backfill(new, lambda ids: pytest.fail("asked"), budget=2, order=np.array([3, 5]), progress=False)


def test_files_that_hold_none_of_the_items_are_left_alone(tmp_path):
    old, new = FILES["parquet folder"](tmp_path)
    migrate(old, new, linear(), batch_size=100, progress=False)
    before = content(new)
    backfill(new, own_vectors, budget=30, order=IDS[:30], progress=False)
    assert replaced(new) == set(IDS[:30].tolist())
    changed = [name for name, data in content(new).items() if data != before[name]]
    assert 0 < len(changed) < len(before)
