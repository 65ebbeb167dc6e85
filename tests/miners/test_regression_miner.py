import pytest
import torch

from pml_compat.miners import RegressionMiner
from tests.miners import naive
from tests.miners.cases import DISTANCES, samples, tuples
from tests.miners.test_cross_model_miner import circle
from tests.pairwise import pairwise


@pairwise
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("most", [1, 4, None])
@pytest.mark.parametrize("block", [1, 100, 2**22])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_naive_loop(kind, most, block, seed, monkeypatch):
    monkeypatch.setattr("pml_compat.miners.regression_miner._BLOCK_ELEMENTS", block)
    new, labels, old = samples(seed)
    expected = naive.regressions(new.numpy(), labels.tolist(), old.numpy(), most, kind)
    miner = RegressionMiner(most, distance=DISTANCES[kind](), collect_stats=True)
    found = tuples(miner(new, labels, old))
    assert len(found) > 4
    assert found == expected if most else sorted(found) == sorted(expected)
    assert miner.regressed_fraction == len({a for a, *_ in expected}) / len(new)


def test_by_hand():
    # old queries at 0, 20, 60 degrees, classes 0, 0, 1. The first item's new query, at 45, is nearer to 60 than to 0
    # and 20: two triplets went wrong; the third's, at 35, is nearer to 20 than to 60, and to 0 no nearer.
    old, labels = circle(0, 20, 60), torch.tensor([0, 0, 1])
    new = circle(45, 20, 35)
    assert tuples(RegressionMiner()(new, labels, old)) == [(0, 0, 2), (0, 1, 2), (2, 2, 1)]
    assert tuples(RegressionMiner(1)(new, labels, old)) == [(0, 0, 2), (2, 2, 1)]  # 45 - 15 goes before 25 - 15


def test_a_tie_of_the_new_query_is_wrong_and_one_of_the_old_was_not_right():
    old, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1])
    between = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert tuples(RegressionMiner()(between, labels, old)) == [(0, 0, 1)]
    twins = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert tuples(RegressionMiner()(old, labels, twins)) == []


def test_equal_violations_keep_the_lowest_indices():
    old = circle(0, 0, 0, 90, 90, 90)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    new = old[[3, 3, 3, 0, 0, 0]]  # every query has changed sides
    assert tuples(RegressionMiner(2)(new, labels, old)) == [
        (a, p, n) for a in range(6) for p, n in ([(0, 3), (0, 4)] if a < 3 else [(3, 0), (3, 1)])
    ]


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_new_model_equal_to_the_old_has_none(kind):
    _, _, old = samples(n=64)
    labels = torch.arange(64) % 5
    assert len(RegressionMiner(distance=DISTANCES[kind]())(old.float(), labels, old.float() * 1.0)[0]) == 0


def test_bad_settings_and_calls():
    new, labels, old = samples()
    with pytest.raises(ValueError, match="max_triplets_per_anchor must be an integer of at least 1, got 0"):
        RegressionMiner(0)
    with pytest.raises(ValueError, match=r"ref_emb must be of the same items, .* expected 14 rows, got 13"):
        RegressionMiner()(new, labels, old[1:], labels[1:])
    with pytest.raises(ValueError, match="ref_labels must equal labels, as row i of ref_emb is the item of row i"):
        RegressionMiner()(new, labels, old, labels.flip(0))
