"""The site: every Python block runs, every page is described and reachable, every public name has a page."""

import copy
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
from sklearn.datasets import load_digits

from pml_compat import embed
from pml_compat.transformations import LinearTransformation

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
WITH_CODE = [name for name in NAMES if BLOCK.search((DOCS / name).read_text())]


@pytest.fixture(scope="module")
def shared():
    """Return what the table at the end of docs/quickstart.md names: a small upgrade on digits."""
    torch.manual_seed(0)
    digits = load_digits()
    everything = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    all_labels = torch.tensor(digits.target)
    old_loss = NormalizedSoftmaxLoss(5, embedding_size=16)
    old_model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    new_loss = NormalizedSoftmaxLoss(10, embedding_size=32)
    new_model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    known = all_labels[:300] < 5
    for model, loss_func, some in ((old_model, old_loss, known), (new_model, new_loss, known | True)):
        optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            loss_func(model(everything[:300][some]), all_labels[:300][some]).backward()
            optimizer.step()
    old, new = (embed(model, everything[:1000], progress=False) for model in (old_model, new_model))
    return {
        "old_model": old_model,
        "old_loss": old_loss,
        "new_model": new_model,
        "model": copy.deepcopy(new_model),
        "images": everything[:300],
        "labels": all_labels[:300],
        "old_embeddings": old[:300],
        "new_embeddings": new[:300],
        "side_info": torch.nn.functional.avg_pool2d(everything[:300], 2).flatten(1)[:, :8],
        "rows": torch.arange(32),
        "num_classes": 10,
        "embedding_size": 32,
        "old_embedding_size": 16,
        "old_queries": old[300:500],
        "new_queries": new[300:500],
        "query_labels": all_labels[300:500],
        "old_gallery": old[500:1000],
        "new_gallery": new[500:1000],
        "gallery_labels": all_labels[500:1000],
    }


def _fct(names):
    names["newer_embeddings"] = torch.randn(300, 24)


def _migrating(names):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vectors, ids = names["old_gallery"].numpy(), np.arange(500)
    parquet.write_table(pyarrow.table({"id": ids, "vector": list(vectors)}), "gallery.parquet")
    LinearTransformation(16, 32).fit(names["old_embeddings"], names["new_embeddings"]).save("map.safetensors")
    names["embed_by_id"] = lambda ids: names["new_gallery"][torch.as_tensor(ids)]
    names["ids_most_urgent_first"] = ids[::-1]


def _two_stages(names):
    names["load_images"] = lambda ids: names["images"][torch.as_tensor(ids) % 300]
    names["query"] = names["images"][:4]
    if importlib.util.find_spec("qdrant_client"):
        from qdrant_client import QdrantClient, models

        names["client"] = QdrantClient(":memory:")
        widths = {"old": 16, "new": 32}
        config = {name: models.VectorParams(size=width, distance="Cosine") for name, width in widths.items()}
        names["client"].create_collection("items", vectors_config=config)
        pairs = zip(names["old_gallery"][:60].tolist(), names["new_gallery"][:60].tolist(), strict=True)
        points = [models.PointStruct(id=id, vector={"old": old, "new": new}) for id, (old, new) in enumerate(pairs)]
        names["client"].upsert("items", points)


# What a page takes for given beside the shared names: the user's own functions, files and servers.
BEFORE = {"methods/fct.md": _fct, "migrating.md": _migrating, "methods/two_stages.md": _two_stages}


# What takes more than a few seconds.
SLOW = ("quickstart.md", "results/digits.md")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in WITH_CODE])
def test_the_blocks_of_a_page_run_in_their_order(name, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = copy.deepcopy(shared)
    BEFORE.get(name, lambda names: None)(names)
    torch.manual_seed(0)
    page = (DOCS / name).read_text()
    for block in BLOCK.finditer(page):
        for package in (block["needs"] or "").split():
            pytest.importorskip(package)
        line = page.count("\n", 0, block.start("code"))
        exec(compile("\n" * line + block["code"], DOCS / name, "exec"), names)


def test_no_block_is_left_out():
    """A block that is fenced otherwise would not run."""
    for name in NAMES:
        page = (DOCS / name).read_text()
        fences = re.findall(
            r"^\s*(?:```|~~~|:::)\{?(?:code-block\}? )?(?:py\w*|pycon|ipython\w*)\b", page, re.MULTILINE
        )
        assert len(fences) == len(BLOCK.findall(page)), name


def test_the_ten_lines_are_ten():
    marked = re.findall(r"  # (\d+)$", (DOCS / "quickstart.md").read_text(), re.MULTILINE)
    assert marked == [str(line) for line in range(1, 11)]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_a_title_and_a_description(name):
    head = re.match(r'---\ndescription: "(.{20,140})"\n---\n(# \S|```\{include\})', (DOCS / name).read_text())
    assert head, f"{name} must begin with a description of 20 to 140 characters and a title"


def test_every_public_name_has_a_page():
    packages = {"pml_compat"} | {
        f"pml_compat.{path.parent.name}"
        for path in (DOCS.parent / "pml_compat").glob("*/__init__.py")
        if getattr(importlib.import_module(f"pml_compat.{path.parent.name}"), "__all__", ())
    }
    pages = {page.stem for page in (DOCS / "api").glob("*.md")} - {"index"}
    assert {package.removeprefix("pml_compat.") for package in packages} == pages
    assert all(f"automodule:: {package}\n" in _api_page(package) for package in packages)


def _api_page(package):
    return (DOCS / "api" / f"{package.removeprefix('pml_compat.')}.md").read_text()


def test_what_a_method_page_quotes_stands_in_the_results():
    """Pages of methods repeat cells of defaults.md, which is measured anew from time to time."""
    results = (DOCS / "defaults.md").read_text()
    found = 0
    for page in sorted((DOCS / "methods").glob("*.md")):
        tables = re.findall(r"((?:^\|.*\n)+)\n(?:[^|\n]+\n)*?[^|\n]*\.\./defaults\.md", page.read_text(), re.MULTILINE)
        for pair in re.findall(r"\d+\.\d / \d+\.\d", "".join(tables)):
            assert pair in results, f"{page.name} quotes {pair}, which docs/defaults.md does not have"
            found += 1
    assert found > 100


def test_the_figures_are_those_that_the_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("draw", DOCS / "figures" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    kept = {path.name: path.read_text() for path in (DOCS / "figures").glob("*.svg")}
    draw.__file__ = str(tmp_path / "draw.py")
    for figure in draw.FIGURES:
        figure().write(figure.__name__)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.svg")} == kept


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_lists_its_pages(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-b", "html"]
    command += ["-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "llms.txt").read_text()
    listed = re.findall(r"^- \[.+\]\((.+)\.html\): .+$", index, re.MULTILINE)
    assert sorted(listed) == sorted(name.removesuffix(".md") for name in NAMES if name != "index.md")
