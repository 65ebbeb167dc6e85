import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pml_compat

ROOT = Path(pml_compat.__file__).parents[1]
TRAIN = ("pml_compat.frozen", "pml_compat.losses", "pml_compat.miners")
# Imports the packages where nothing optional is installed, and tells which files asked for it.
# PML asks for faiss itself, and scikit-learn for rich.
PROGRAM = """
import importlib, json, sys

class Nothing:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"faiss", "timm", "matplotlib", "rich"}:
            frame = sys._getframe()
            while "importlib" in frame.f_code.co_filename or frame.f_locals.get("self") is self:
                frame = frame.f_back
            self.asked.append((frame.f_code.co_filename, name))
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Nothing())
seen = {}
for name in ("pml_compat", "pml_compat.frozen", "pml_compat.losses", "pml_compat.miners", "pml_compat.accuracy"):
    Nothing.asked.clear()
    importlib.import_module(name)
    seen[name] = {"asked": [*Nothing.asked], "loaded": sorted(sys.modules)}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def imports():
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_the_package_alone_loads_nothing_heavy(imports):
    heavy = {"torch", "numpy", "pytorch_metric_learning", "sklearn", "tqdm"}
    assert not heavy & set(imports["pml_compat"]["loaded"])
    assert imports["pml_compat"]["asked"] == []


@pytest.mark.parametrize("name", [*TRAIN, "pml_compat.accuracy"])
def test_subpackages_ask_for_no_optional_package(imports, name):
    assert name in imports[name]["loaded"]
    assert [file for file, _ in imports[name]["asked"] if Path(file).is_relative_to(ROOT / "pml_compat")] == []


def test_who_trains_does_not_wait_for_what_measures(imports):
    host, loaded = "pytorch_metric_learning", set(imports[TRAIN[-1]]["loaded"])
    assert "pml_compat._host" in loaded
    assert not {"sklearn", f"{host}.utils.accuracy_calculator", f"{host}.trainers"} & loaded
    assert all("faiss" not in [asked for _, asked in imports[name]["asked"]] for name in TRAIN)
    assert "sklearn" in imports["pml_compat.accuracy"]["loaded"]  # it would be seen


def test_version_is_the_newest_in_the_changelog():
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("no CHANGELOG.md beside the package")
    versions = re.findall(r"^##\s+\[?v?(\d+\.\d+\.\d+)", changelog.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == pml_compat.__version__
