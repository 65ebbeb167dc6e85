import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.slow
def test_every_method_goes_through_and_nothing_is_done_twice(data, tmp_path):
    arguments = ["--data", data, "--out", tmp_path, "--epochs", 2, "--side-epochs", 1, "--fct-epochs", 2]
    printed = run("compare.py", *arguments)
    found = json.loads((tmp_path / "results.json").read_text())
    rows = [line.split("|")[1].strip() for line in printed.splitlines()[2:]]
    assert sorted(rows) == sorted({*found, "old (old/old)"} - {"old"})
    assert {"old", "independent", "bct", "lce_backward", "cross_model", "mixbct", "linear", "fct", "fct_side"} <= set(
        found
    )
    for method, (one,) in found.items():
        assert one["seed"] == 0
        if method not in ("old", "independent", "lce_backward"):
            assert one["backfill"]["values"]["precision_at_1"][0] == one["new_to_old"]["precision_at_1"]
            assert one["backfill"]["values"]["precision_at_1"][-1] == one["new_to_new"]["precision_at_1"]
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000 < (tmp_path / "backfill.png").stat().st_size
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "seed_0").iterdir()}
    (tmp_path / "seed_0" / "bct.json").unlink()  # as if the run had been stopped there
    run("compare.py", *arguments)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "seed_0").iterdir()}
    changed = {path.name for path in after if after[path] != times[path]}
    assert changed == {"bct.json", "bct_test.npy"}
    assert json.loads((tmp_path / "results.json").read_text())["bct"][0]["new_to_old"] == found["bct"][0]["new_to_old"]


@pytest.mark.slow
def test_the_search_leaves_the_test_images_alone(data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(data / "train")  # and no test images
    run(
        "search.py", "--data", tmp_path / "data", "--out", tmp_path, "--epochs", 1, "--methods", "lce", "--per-class", 2
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"old", "independent", "lce (lce 100)", "lce (lce 1000)", "lce (lce 10000)"}
