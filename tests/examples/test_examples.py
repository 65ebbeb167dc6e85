import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    """Run an example and return its accuracies as fractions, {pair: (P@1, mAP)}."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"^(\w+/\w+)\D+(?:@1 +)?([\d.]+)%\D+([\d.]+)%", done.stdout, re.MULTILINE)
    return {pair: (float(first) / 100, float(second) / 100) for pair, first, second in pairs}


def importable(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


def beats_the_old_system(accuracies):
    assert set(accuracies) == {"old/old", "new/old", "new/new"}
    assert accuracies["new/old"][1] > accuracies["old/old"][1]
    assert accuracies["new/new"][0] > accuracies["old/old"][0]


def test_drop_in_changes_at_most_ten_lines():
    lines = [line for line in (EXAMPLES / "bct_drop_in.py").read_text().splitlines() if line.endswith("# upgrade")]
    assert 3 <= len(lines) <= 10
    assert any("BCTLoss(" in line for line in lines)
    without = [line for line in (EXAMPLES / "bct_drop_in.py").read_text().splitlines() if line not in lines]
    code = "\n".join(without).partition('"""\n\n')[2]
    assert "pml_compat" not in code and "old_loss" not in code.partition("torch.manual_seed")[2]


@pytest.mark.slow
def test_drop_in():
    beats_the_old_system(run("bct_drop_in.py"))


@importable("record_keeper", "tensorboard")
def test_pml_trainer(tmp_path):
    beats_the_old_system(run("bct_pml_trainer.py", "--epochs", "8"))
    assert not list(EXAMPLES.parent.glob("example_*"))


@importable("timm", "torchvision")
@pytest.mark.slow
def test_timm():
    beats_the_old_system(run("bct_timm.py"))
