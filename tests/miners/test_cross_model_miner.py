import pytest
import torch

from pml_compat.miners import HardestCrossModelMiner
from tests.miners import naive
from tests.miners.cases import DISTANCES, samples, stored, tuples
from tests.pairwise import pairwise


@pairwise
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_naive_loop(kind, k, bank, seed):
    new, labels, old = samples(seed)
    old, old_labels = stored() if bank else (old, labels)
    positive, negative = naive.hardest(new.numpy(), labels.tolist(), old.numpy(), old_labels.tolist(), k, kind)
    mined = HardestCrossModelMiner(k, distance=DISTANCES[kind]())(new, labels, old, old_labels)
    assert len(set(tuples(mined[:2]))) == len(mined[0])
    assert set(tuples(mined[:2])) == positive and set(tuples(mined[2:])) == negative
    triplets = HardestCrossModelMiner(k, "triplets", distance=DISTANCES[kind]())(new, labels, old, old_labels)
    expected = {(a, p, n) for a, p in positive for b, n in negative if a == b}
    assert len(triplets[0]) == len(expected) and set(tuples(triplets)) == expected
    assert triplets[0].tolist() == sorted(triplets[0].tolist())


def test_by_hand():
    # on the unit circle, in degrees: new 0 and 90; old 10 and 100 (their own), 170 of class 0, 20 of class 1
    new, old = circle(0, 90), circle(10, 100, 170, 20)
    labels, old_labels = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1])
    a1, p, a2, n = HardestCrossModelMiner()(new, labels, old, old_labels)
    assert tuples((a1, p)) == [(0, 2), (1, 3)] and tuples((a2, n)) == [(0, 3), (1, 0)]
    assert tuples(HardestCrossModelMiner(2, "triplets")(new, labels, old, old_labels)[:2]) == [
        (0, 2), (0, 2), (0, 0), (0, 0), (1, 3), (1, 3), (1, 1), (1, 1),
    ]  # fmt: skip


def circle(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_an_item_alone_in_its_class_has_its_own_old_embedding():
    new, _, old = samples()
    a, p, n = HardestCrossModelMiner(output="triplets")(new, torch.arange(14), old)
    assert a.equal(torch.arange(14)) and p.equal(a) and bool((n != a).all())


def test_an_anchor_without_positives_gives_no_triplet():
    new, labels, old = samples()
    mined = HardestCrossModelMiner(2, "triplets")(new, labels, old, torch.where(labels == 0, 9, labels))
    assert set(mined[0].tolist()) == set((labels != 0).nonzero()[:, 0].tolist())


def test_bad_settings():
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        HardestCrossModelMiner(0)
    with pytest.raises(ValueError, match="output must be 'pairs' or 'triplets', got 'quadruplets'"):
        HardestCrossModelMiner(output="quadruplets")
