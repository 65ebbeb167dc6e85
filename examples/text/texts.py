"""Docstrings of installed packages, which pip has put on the disk already, as texts to search; and their embeddings."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = ("networkx", "numpy", "scipy", "sklearn", "sympy")  # pml_compat and torch need them
LEFT_OUT = ("distutils", "externals")
WORDS = 60  # of a text
FEWEST_WORDS = {"query": 4, "text": 20}


def docstrings(packages: Sequence[str] = PACKAGES, fewest: int = 10) -> list[tuple[str, str, str]]:
    """Return the module, the first paragraph and the words that follow it, of every public function and class.

    They are read from the source; nothing is imported. A module is a folder, three deep at most. Left out are private
    folders and tests, short docstrings, and a paragraph or a text that is there already. Sorted.

    Args:
        packages: Names to import, of installed packages.
        fewest: The docstrings that a module must have.
    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    by_text: dict[str, tuple[str, str, str]] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"packages must be installed, {package!r} is not: pip install {package}")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            folders = path.relative_to(root.parent).parts[:-1]
            if any(name.startswith(("_", "test")) or name in LEFT_OUT for name in folders):
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                    query, text = first.split(), rest.split()
                    if len(query) >= FEWEST_WORDS["query"] and len(text) >= FEWEST_WORDS["text"]:
                        item = (".".join(folders[:3]), " ".join(query), " ".join(text[:WORDS]))
                        by_text.setdefault(item[2], item)
    by_query: dict[str, tuple[str, str, str]] = {}
    for item in by_text.values():
        by_query.setdefault(item[1], item)
    sizes = Counter(module for module, _, _ in by_query.values())
    return sorted(item for item in by_query.values() if sizes[item[0]] >= fewest)


def embed_once(folder: Path, name: str, load_model: Callable[[], Any], texts: Sequence[str]) -> torch.Tensor:
    """Return the unit embeddings ``(N, D)`` of texts, from a file in ``folder`` where this was done before.

    Args:
        folder: Where the file is, or will be; its name has a checksum of the texts.
        name: With which the file's name begins.
        load_model: Returns what embeds a list of strings as an array; called where there is no file.
        texts: What to embed.
    """
    path = folder / f"{name}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        start = time.process_time()
        rows = np.asarray(load_model()(list(texts)), dtype=np.float32)
        np.save(path, rows / np.linalg.norm(rows, axis=1, keepdims=True))
        print(f"{path.name}: {len(texts):,} texts embedded in {time.process_time() - start:.0f} s", flush=True)
    return torch.from_numpy(np.load(path))
