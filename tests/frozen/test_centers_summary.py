import math

import numpy as np
import pytest
import torch

from pml_compat.frozen import ClassCenters, centers_summary
from tests import reference


def circle(*degrees):
    angles = torch.tensor([math.radians(d) for d in degrees])
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_by_hand():
    centers = ClassCenters(
        circle(0, 30, 100), torch.tensor([7, 3, 5]), torch.tensor([0.6, 0.5, 0.2]), torch.tensor([4, 8, 1])
    )
    summary = centers.summary()
    assert summary.nearest_labels.tolist() == [3, 7, 3]
    np.testing.assert_allclose(np.degrees(summary.nearest_angles), [30, 30, 70], rtol=1e-5)
    assert summary.collapsed.tolist() == [True, False, False]  # 0.6 rad are 34 degrees, 0.5 are 29
    assert summary.single.tolist() == [False, False, True]
    assert str(summary).splitlines() == [
        "3 classes, 2 features, 13 samples (1 to 8 a class)",
        "1 collapsed: another class's centre lies inside their boundary, which cannot keep the two apart",
        "    label  boundary  nearest centre",
        "        7     34.4°           30.0° (label 3)",
        "1 of one sample, without a boundary: 5",
    ]


def test_says_what_new_queries_can_expect_where_embeddings_were_seen():
    rows = torch.eye(4)[torch.arange(24) % 4] + 0.01 * torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    summary = ClassCenters.from_embeddings(rows, torch.arange(24) % 4).summary()
    assert str(summary).splitlines()[-4:] == [
        "P@1 / mAP in percent among old embeddings that nothing was fitted to, of",
        "  the old model's queries 100.0 / 100.0",
        "  queries on their class's mean 100.0 / 100.0, on its direction 100.0 / 100.0",
        "  queries near their direction, as a trained model's: 100.0 / 100.0",
    ]
    assert summary.prospects.old.precision_at_1 == 1.0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("elements", [1, 40, 2**24])
def test_nearest_matches_naive_loop(seed, elements, monkeypatch):
    monkeypatch.setattr(centers_summary, "_BLOCK_ELEMENTS", elements)
    torch.manual_seed(seed)
    centers = ClassCenters(torch.randn(17, 5), torch.randperm(100)[:17])
    summary = centers.summary()
    rows = centers.centers.double().numpy()
    for i in range(17):
        angles = {reference.angle(rows[i], rows[j]): int(centers.labels[j]) for j in range(17) if j != i}
        assert float(summary.nearest_angles[i]) == pytest.approx(min(angles), rel=1e-5)
        assert int(summary.nearest_labels[i]) == angles[min(angles)]


def test_tiny_angles_keep_their_digits():
    centers = ClassCenters(circle(0, 0.001), torch.arange(2))
    np.testing.assert_allclose(np.degrees(centers.summary().nearest_angles), [0.001, 0.001], rtol=1e-2)


def test_one_class_and_nothing_measured():
    summary = ClassCenters(torch.ones(1, 3), torch.tensor([4])).summary()
    assert summary.nearest_labels.tolist() == [-1] and summary.nearest_angles.tolist() == [math.inf]
    assert not summary.collapsed.any() and not summary.single.any()
    assert str(summary) == "1 classes, 3 features\nno boundaries measured"


def test_the_worst_come_first_and_the_list_is_cut():
    degrees = torch.arange(12.0) * 10
    centers = ClassCenters(circle(*degrees.tolist()), torch.arange(12), torch.linspace(0.2, 1.0, 12))
    lines = str(centers.summary()).splitlines()
    assert lines[1].startswith("12 collapsed")
    assert [int(line.split()[0]) for line in lines[3:-1]] == list(range(11, 1, -1))
    assert lines[-1].strip() == "..."
