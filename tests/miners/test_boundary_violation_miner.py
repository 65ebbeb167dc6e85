import pytest
import torch

from pml_compat.frozen import ClassCenters
from pml_compat.miners import BoundaryViolationMiner
from tests.miners import naive
from tests.miners.cases import DISTANCES, WIDTH, samples, stored, tuples
from tests.miners.test_cross_model_miner import circle
from tests.pairwise import pairwise


@pairwise
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("k", [2, None])
def test_matches_naive_loop(kind, margin, k):
    new, labels, _ = samples()
    old, old_labels = stored()
    centers = ClassCenters.from_embeddings(old, old_labels)
    by_label = {y: c.numpy() for y, c in zip(centers.labels.tolist(), centers.centers, strict=True)}
    bounds = dict(zip(centers.labels.tolist(), centers.boundaries.tolist(), strict=True))
    anchors = naive.outside(new.numpy(), labels.tolist(), by_label, bounds, margin)
    assert 0 < len(anchors) < len(new)
    positive, _ = naive.hardest(new.numpy(), labels.tolist(), old.numpy(), old_labels.tolist(), None, kind)
    _, negative = naive.hardest(new.numpy(), labels.tolist(), old.numpy(), old_labels.tolist(), k, kind)
    miner = BoundaryViolationMiner(centers, margin, k=k, distance=DISTANCES[kind](), collect_stats=True)
    a1, p, a2, n = miner(new, labels, old, old_labels)
    assert set(tuples((a1, p))) == {(a, j) for a, j in positive if a in anchors}
    assert set(tuples((a2, n))) == {(a, j) for a, j in negative if a in anchors}
    assert miner.outside_fraction == len(anchors) / len(new)


def test_by_hand():
    # class 0 around 0 degrees, up to 30; class 1 around 90, up to 10
    centers = ClassCenters(circle(0, 90), torch.tensor([0, 1]), torch.deg2rad(torch.tensor([30.0, 10.0])))
    new, labels, old = circle(29, 31, 99, 79) * 3, torch.tensor([0, 0, 1, 1]), circle(1, 2, 91, 92)
    a1, p, a2, n = BoundaryViolationMiner(centers, k=1)(new, labels, old)
    assert tuples((a1, p)) == [(1, 0), (1, 1), (3, 2), (3, 3)] and tuples((a2, n)) == [(1, 2), (3, 1)]
    a1, *_ = BoundaryViolationMiner(centers, torch.pi / 60)(new, labels, old)  # 3 degrees more
    assert len(a1) == 0
    a1, *_ = BoundaryViolationMiner(centers, -torch.pi / 60)(new, labels, old)
    assert a1.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_old_embeddings_that_made_the_boundaries_violate_none(dtype):
    old, labels = stored()
    for spread in (1.0, 1e-2, 1e-4):
        own = torch.randn(4, WIDTH, dtype=torch.float64)[labels]
        rows = (own + spread * (old - old.mean(0))).to(dtype)
        miner = BoundaryViolationMiner(ClassCenters.from_embeddings(rows, labels))
        assert [len(part) for part in miner(rows, labels, rows * 1.0)] == [0] * 4


def test_labels_without_a_centre_or_of_one_sample_give_no_anchors():
    old, new = circle(0, 10, 90), circle(180, 180, 180)
    miner = BoundaryViolationMiner(ClassCenters.from_embeddings(old, torch.tensor([4, 4, 7])))
    a1, _, a2, _ = miner(new, torch.tensor([4, 7, 5]), old)
    assert set(a1.tolist()) == set(a2.tolist()) == {0}


def test_keeps_its_own_centers():
    old, labels = stored()
    centers = ClassCenters.from_embeddings(old, labels)
    miner = BoundaryViolationMiner(centers)
    expected = miner(*samples())
    centers.boundaries.zero_()
    assert all(a.equal(b) for a, b in zip(miner(*samples()), expected, strict=True))


def test_bad_settings_and_calls():
    new, labels, old = samples()
    centers = ClassCenters.from_embeddings(old[:, :3], labels)
    with pytest.raises(ValueError, match="centers must be a ClassCenters, got Tensor"):
        BoundaryViolationMiner(old)
    with pytest.raises(ValueError, match="centers must have boundaries, got none; measure them with boundary='max'"):
        BoundaryViolationMiner(ClassCenters(centers.centers, centers.labels))
    with pytest.raises(ValueError, match=r"margin must be a finite number of at least -3.14159, got -4"):
        BoundaryViolationMiner(centers, -4)
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        BoundaryViolationMiner(centers, k=0)
    with pytest.raises(ValueError, match=r"embeddings must be as wide as centers: expected 3, got 5; map .*fit_width"):
        BoundaryViolationMiner(centers)(new, labels, old)
    with pytest.raises(ValueError, match="embeddings must be on the device of the miner: got cpu and meta"):
        BoundaryViolationMiner(centers).to("meta")(new[:, :3], labels, old[:, :3])
