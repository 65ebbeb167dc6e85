"""Benchmarks still find what they use: they are run by hand, so that nothing else would tell."""

import ast
import importlib.util
import runpy
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_names_exist(path, monkeypatch):
    tree = ast.parse(path.read_text())
    imported = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
    for extra in imported & {"faiss", "sklearn"}:
        if importlib.util.find_spec(extra) is None:
            pytest.skip(f"needs {extra}")
    monkeypatch.syspath_prepend(str(path.parent))
    names = runpy.run_path(str(path), run_name="imported")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType):
                assert hasattr(module, node.attr), f"line {node.lineno}: {module.__name__} has no {node.attr}"
