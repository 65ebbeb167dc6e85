import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar100"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """100 classes of a colour each, with noise: 8 training and 3 test images, one strip a class."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number, color in enumerate(rng.integers(40, 216, (100, 3))):
        for part, count in (("train", 8), ("test", 3)):
            (folder / part).mkdir(exist_ok=True)
            strip = np.clip(color + rng.normal(0, 25, (32 * count, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(strip).save(folder / part / f"{number:02d}.png")
    return folder


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def example():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE / "data.py")))


def test_crops_are_parts_of_their_image(example):
    torch.manual_seed(0)
    columns = torch.arange(32).expand(400, 32, 32)
    images = torch.stack([columns, columns.transpose(1, 2)], dim=1)  # of where each pixel was
    found = example.crop(images, flip=False)
    assert found.shape == (400, 2, 32, 32) and found.min() >= 0 and found.max() <= 31
    assert (found[:, 0].diff(dim=2) >= 0).all() and (found[:, 1].diff(dim=1) >= 0).all()  # not mirrored
    first, last = found[:, :, 0, 0], found[:, :, 31, 31]
    width, height = ((last - first) / 31).unbind(1)
    assert 0.24 < (width * height).min() < 0.3 and (width * height).max() > 0.9
    assert 0.74 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.34
    for side in range(2):  # from everywhere
        assert first[:, side].min() < 1 and first[:, side].max() > 12 and last[:, side].min() < 19
    flipped = example.crop(images)[:, 0]
    assert 150 < (flipped[:, 0, 31] < flipped[:, 0, 0]).sum() < 250


@pytest.mark.slow
def test_every_method_goes_through_and_nothing_is_done_twice(data, tmp_path):
    arguments = ["--data", data, "--out", tmp_path, "--epochs", 2, "--side-epochs", 1]
    printed = run("compare.py", *arguments)
    found = json.loads((tmp_path / "results.json").read_text())
    rows = [line.split("|")[1].strip() for line in printed.splitlines()[2:]]
    assert sorted(rows) == sorted({*found, "old (old/old)"} - {"old"})
    assert {"independent", "bct", "lce_backward", "mixbct", "bt2", "head", "linear", "fct_side", "fastfill"} <= set(
        found
    )
    assert {"rotated", "blended", "two_stages_10", "two_stages_50"} <= set(found)
    (fastfill,) = found["fastfill"]
    areas = {name: fastfill[name]["area"]["precision_at_1"] for name in fastfill if name.startswith("backfill")}
    assert len(areas) == len(set(areas.values())) == 3  # in random order, by predicted error, by class margin
    at_query_time = {"rotated", "blended", "two_stages_10", "two_stages_50"}
    asked_otherwise = {"old", "independent", "lce_backward", "bt2"} | at_query_time
    for method, (one,) in found.items():
        assert one["seed"] == 0
        assert ("backfill" in one) == (method not in asked_otherwise and not method.startswith("head"))
        if "backfill" in one:
            assert one["backfill"]["values"]["precision_at_1"][0] == one["new_to_old"]["precision_at_1"]
            assert one["backfill"]["values"]["precision_at_1"][-1] == one["new_to_new"]["precision_at_1"]
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000 < (tmp_path / "backfill.png").stat().st_size
    assert all((tmp_path / "seed_0" / f"{model}_mixture_2.npy").exists() for model in ("old", "independent"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "seed_0").iterdir()}
    for name in ("bct.json", "bct_test.npy", "fct.json"):  # as if the run had been stopped there
        (tmp_path / "seed_0" / name).unlink()
    run("compare.py", *arguments)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "seed_0").iterdir()}
    changed = {path.name for path in after if after[path] != times[path]}
    assert changed == {"bct.json", "bct_test.npy", "fct.json"}  # what was embedded is only measured again
    again = json.loads((tmp_path / "results.json").read_text())
    for method in ("bct", "fct"):
        assert again[method][0]["new_to_old"] == found[method][0]["new_to_old"]


@pytest.mark.slow
def test_open_protocol_calibrates_mixed_galleries(data, tmp_path):
    methods = ["bct", "head", "bt2", "fct", "lce_backward", "blended"]
    arguments = ["--protocol", "open", "--epochs", 2, "--methods", *methods]
    run("compare.py", "--data", data, "--out", tmp_path, *arguments)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(np.load(tmp_path / "seed_0" / "head_test.npy")) == 20 * 11  # all images of the unseen classes
    assert len(np.load(tmp_path / "seed_0" / "old_train.npy")) == 80 * 8
    for method in methods:
        ((one,), first, last) = found[method], 0, -1
        for point, pair in ((first, "new_to_old"), (last, "new_to_new")):
            mixed = one["mixed"]["values"]["mean_average_precision"][point]
            assert mixed == pytest.approx(one[pair]["mean_average_precision"], abs=1e-4)


def test_settings_are_chosen_on_classes_that_are_never_tested(example):
    kept = {int(label) for label in example.SEARCH_CLASSES}
    splits = (example.open_split(torch.arange(200) % 100, seed) for seed in range(5))
    tested = {label for split in splits for label in split.test_classes.tolist()}
    assert len(tested) > 50 and len(kept) == 16 and not tested & kept
