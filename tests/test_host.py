"""What the package takes from pytorch-metric-learning goes through one file."""

import ast
from pathlib import Path

import pytest

import pml_compat
from pml_compat import _host

PACKAGE = Path(pml_compat.__file__).parent
HOST = "pytorch_metric_learning"


def imported(file):
    """Names of all modules that a file imports, wherever in it; examples in docstrings are not imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield ast.unparse(node.args[0]).strip("f'\"")


def test_one_file_imports_pml_and_trainers_and_testers_what_they_extend():
    allowed = {"_host.py": "", "trainers": ".trainers", "testers": ".testers"}
    found = {file: [name for name in imported(file) if name.startswith(HOST)] for file in PACKAGE.rglob("*.py")}
    wrong = {
        str(file.relative_to(PACKAGE)): name
        for file, names in found.items()
        for name in names
        if not name.startswith(HOST + allowed.get(file.relative_to(PACKAGE).parts[0], " nothing"))
    }
    assert wrong == {}
    assert len(found[PACKAGE / "_host.py"]) > 10  # the search finds imports


def test_host_imports_nothing_of_ours():
    tree = ast.parse((PACKAGE / "_host.py").read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def test_a_name_that_pml_does_not_have_is_said_at_the_import():
    with pytest.raises(AttributeError, match=r"pml_compat\._host.*no attribute 'Nothing'"):
        _ = _host.Nothing
