import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "asymmetric" / "small_queries.py"
# In place of timm, which is large: two networks of a layer or two.
TIMM = """
import torch

def create_model(name, pretrained, num_classes):
    hidden = {"large": 64, "small": 16}[name]
    layers = torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(192, hidden), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.Linear(hidden, num_classes))
"""


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "data", raising=False)
    yield SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    sys.modules.pop("data", None)


@pytest.fixture
def timm(tmp_path):
    (tmp_path / "timm.py").write_text(TIMM)
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    """Ten classes of a colour each, with noise: 24 training and 4 test images."""
    rng = np.random.default_rng(0)
    for number, color in enumerate(rng.integers(40, 216, (10, 3))):
        for part, count in (("train", 24), ("test", 4)):
            (tmp_path / "pictures" / part).mkdir(exist_ok=True, parents=True)
            strip = np.clip(color + rng.normal(0, 25, (32 * count, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(strip).save(tmp_path / "pictures" / part / f"{number}.png")
    return tmp_path / "pictures"


def table(*arguments, folder=None):
    """Run the example, and return its table: {query network: cells}."""
    folders = os.pathsep.join(map(str, [EXAMPLE.parents[2], *([folder] if folder else [])]))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1, done.stdout
    return {row[0]: row[1:] for row in rows[2:]}


def average_precision(cell):
    return float(re.fullmatch(r"([\d.]+) / ([\d.]+)", cell)[2])


def test_small_queries_find_what_the_large_network_stored(timm):
    methods = "independent", "BCT", "PointAlignment", "D3still alone"
    networks = "--large", "large", "--small", "small", "--epochs", 20, "--lr", "1e-2"
    found = table(*networks, "--methods", *methods, folder=timm)
    assert list(found) == ["large", *(f"small, {method}" for method in methods)]
    parameters, one, many, closed, _, unseen, _ = found.pop("large")
    assert parameters == "0.02 M" and float(one) > 0 and float(many) > 0
    chance, own = map(average_precision, found.pop("small, independent")[3:5])
    assert chance < 50 < own
    for method, (_, _, _, large, own, open_large, _) in found.items():
        assert average_precision(large) > 80 and average_precision(own) > 80, method
        assert average_precision(open_large) > 50, method
    assert average_precision(closed) > 80 and average_precision(unseen) > 50


@pytest.mark.slow
def test_on_pictures(timm, pictures):
    arguments = "--large", "large", "--small", "small", "--epochs", 4, "--methods", "BCT", "RAML alone"
    found = table("--cifar", pictures, "--classes", 7, "--images", 20, "--size", 32, *arguments, folder=timm)
    assert list(found) == ["large", "small, BCT", "small, RAML alone"]
    assert all(0 < average_precision(cell) <= 100 for cell in found["small, BCT"][3:])


@pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("timm", "torchvision")), reason="needs timm"
)
@pytest.mark.slow
def test_timm():
    arguments = "--large", "resnet10t", "--epochs", 12, "--methods", "independent", "PointAlignment alone"
    found = table("--small", "lcnet_050", *arguments)
    (*_, chance, _, _, _), (*_, reached, _, _, _) = (found[name] for name in list(found)[1:])
    assert average_precision(reached) > average_precision(chance) + 10
    assert float(found["resnet10t"][0].split()[0]) > 4 * float(found["lcnet_050, independent"][0].split()[0])


def test_without_timm(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "pml-compat\[timm\]"'):
        example.Network("resnet18", None)


def test_losses_alone_know_no_classes_and_the_others_the_task(example):
    torch.manual_seed(0)
    stored, labels = torch.randn(300, example.WIDTH), torch.arange(300) % 5
    for method in [*example.BESIDE, *example.ALONE]:
        loss_func = example.loss_of(method, 5, stored, labels)
        weights = sum(weight.numel() for weight in loss_func.parameters())
        assert weights == (0 if method in example.ALONE else 5 * example.WIDTH), method
        reads = getattr(loss_func, "needs_ref_emb", False)
        assert reads == (method not in ("independent", "BCT")), method
        embeddings = torch.randn(16, example.WIDTH, requires_grad=True)
        loss_func(embeddings, labels[:16], **({"ref_emb": stored[:16]} if reads else {})).backward()
        assert embeddings.grad.isfinite().all() and embeddings.grad.any(), method


def test_a_loss_is_given_the_stored_rows_of_its_images(example):
    class Reads(torch.nn.Module):
        needs_ref_emb, seen = True, []

        def forward(self, embeddings, labels, ref_emb):
            self.seen.append((embeddings.detach()[:, 0], labels, ref_emb[:, 0]))
            return embeddings.sum()

    class Same(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):
            return images.flatten(1).float() + self.weight

    numbers = torch.arange(250)
    data = example.Images(numbers.to(torch.uint8).reshape(-1, 1, 1, 1), numbers)
    example.train(Same(), Reads(), data, lambda images: images, 3, 0.0, stored=numbers[:, None].float())
    assert [len(labels) for _, labels, _ in Reads.seen] == [example.BATCH] * 9  # 3 epochs of 3 whole batches
    for embeddings, labels, stored in Reads.seen:
        assert torch.equal(embeddings.round().long(), labels) and torch.equal(stored.long(), labels)


def test_a_row_of_the_table(example):
    labels = torch.tensor([0, 0, 1, 1])
    test_sets = {"closed": example.Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels)}
    queries, gallery = {"closed": torch.eye(2)[labels]}, {"closed": torch.eye(2)[1 - labels]}
    cells = example.row("name", torch.nn.Flatten(), test_sets, queries, (gallery, queries)).strip("| ").split(" | ")
    assert cells[:2] == ["name", "0.00 M"] and cells[4:] == ["0.0 / 33.3", "100.0 / 100.0"]
    cells = example.row("name", torch.nn.Flatten(), test_sets, queries, (None, queries)).split(" | ")
    assert cells[4] == ""
