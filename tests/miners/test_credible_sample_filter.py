import numpy as np
import pytest
import torch
from pytorch_metric_learning import miners

from pml_compat.frozen import FrozenEmbeddings, credible_mask
from pml_compat.miners import CredibleSampleFilter, HardestCrossModelMiner, RegressionMiner
from tests.miners import naive
from tests.miners.cases import WIDTH, samples, stored, tuples
from tests.miners.test_cross_model_miner import circle

SETTINGS = [
    {"rule": "nearest", "share": 0.6},
    {"rule": "nearest", "share": 0.05, "normalize": False},
    {"rule": "entropy", "max_entropy": 0.5},
    {"rule": "entropy", "max_entropy": 0.2, "normalize": False},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_naive_loop_on_stored_and_on_other_samples(settings, dtype):
    old, labels = stored()
    found = CredibleSampleFilter(old.to(dtype), labels, **settings)
    for rows, own in ((old, labels), samples(7)[2:0:-1]):
        expected = naive.credible(rows.numpy(), own.tolist(), old.numpy(), labels.tolist(), **settings)
        assert 0 < sum(expected) < len(expected) or rows is not old
        assert found.credible(rows.to(dtype), own).tolist() == expected


@every_setting
def test_agrees_with_credible_mask(settings):
    old, labels = stored(400)
    expected = credible_mask(old.float(), labels, **settings)
    found = CredibleSampleFilter(old.float(), labels, **settings)
    assert found.credible(old.float(), labels).equal(expected)
    order = torch.randperm(400)[:37]  # whatever batch a sample comes in
    assert found.credible(old[order].float(), labels[order]).equal(expected[order])


def test_by_hand():
    # class 3 at 0, 2 and 40 degrees, class 8 at 90: the mean of class 3 is near 14 degrees
    old, labels = circle(0, 2, 40, 90), torch.tensor([3, 3, 3, 8])
    found = CredibleSampleFilter(old, labels, share=0.6)
    assert found.credible(old, labels).tolist() == [True, True, False, True]
    assert found.credible(circle(14, 91, 14), torch.tensor([3, 8, 5])).tolist() == [True, False, False]
    a1, p, a2, n = found(old, labels, old * 1.0)
    assert tuples((a1, p)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 3)]
    assert tuples((a2, n)) == [(0, 3), (1, 3), (2, 3), (3, 0), (3, 1)]


def test_a_class_of_one_or_of_equal_samples_is_credible():
    torch.manual_seed(0)
    old, labels = torch.cat([torch.randn(4).expand(3, 4), torch.randn(20, 4)]), torch.tensor([0, 0, 0, 1] + [2] * 19)
    for scale in (1.0, 1e-3, 1e3):
        for normalize in (True, False):
            found = CredibleSampleFilter(old * scale, labels, share=0.5, normalize=normalize)
            assert found.credible(old * scale, labels)[:4].all()
            torch.testing.assert_close(found.old_variances[0], found.old_variances[1])  # that of all


def test_a_class_keeps_its_share_exactly():
    """0.55 of 100 is 55.00000000000001 in floating point: 55, not 56."""
    old, labels = torch.randn(300, 4), torch.arange(300) % 3
    for share, expected in ((0.55, 55), (0.9, 90), (0.901, 91), (1e-9, 1)):
        found = CredibleSampleFilter(old, labels, share=share).credible(old, labels)
        assert torch.bincount(labels[found]).tolist() == [expected] * 3


@pytest.mark.parametrize("rule", ["nearest", "entropy"])
def test_the_wrapped_miner_finds_the_hardest_among_the_credible(rule):
    new, labels, old = samples()
    rule_filter = CredibleSampleFilter(*stored(), HardestCrossModelMiner(2), rule=rule, share=0.6, collect_stats=True)
    credible = rule_filter.credible(old, labels)
    kept = credible.nonzero()[:, 0]
    assert 0 < len(kept) < len(old)
    a1, p, a2, n = HardestCrossModelMiner(2)(new, labels, old[kept], labels[kept])
    expected = (a1, kept[p], a2, kept[n])
    assert all(a.equal(b) for a, b in zip(rule_filter(new, labels, old), expected, strict=True))
    assert rule_filter.credible_fraction == pytest.approx(len(kept) / len(old))


def test_triplets_and_a_miner_of_all_rows():
    new, labels, old = samples()
    for miner in (miners.BatchHardMiner(), RegressionMiner(), HardestCrossModelMiner(None, "triplets")):
        found = CredibleSampleFilter(*stored(), miner, share=0.6)
        credible = found.credible(old, labels)
        a, p, n = found(new, labels, old)
        assert len(a) > 0 and bool(credible[p].all()) and bool(credible[n].all())
        if not isinstance(miner, miners.BatchHardMiner):
            every = tuples(miner(new, labels, old))
            assert sorted(tuples((a, p, n))) == sorted(t for t in every if credible[t[1]] and credible[t[2]])


class Pairs(RegressionMiner):
    """All pairs, of a miner that needs all rows."""

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        return HardestCrossModelMiner(None)(embeddings, labels, ref_emb, ref_labels)


def test_pairs_of_a_miner_of_all_rows():
    found = CredibleSampleFilter(*stored(), Pairs(), share=0.6)(*samples())
    assert all(a.equal(b) for a, b in zip(found, CredibleSampleFilter(*stored(), share=0.6)(*samples()), strict=True))


def test_nothing_credible():
    new, labels, old = samples()
    mined = CredibleSampleFilter(*stored(), miners.BatchHardMiner())(new, labels + 50, old)
    assert [part.tolist() for part in mined] == [[]] * 4


def test_sources(tmp_path):
    old, labels = stored()
    expected = CredibleSampleFilter(old, labels).credible(old, labels)
    np.save(tmp_path / "old.npy", old.numpy())
    sources = (old.numpy(), np.load(tmp_path / "old.npy", mmap_mode="r"), FrozenEmbeddings.from_array(old))
    for source in sources:
        assert CredibleSampleFilter(source, labels).credible(old, labels).equal(expected)


def test_bad_settings_and_calls():
    old, labels = stored()
    with pytest.raises(ValueError, match="rule must be 'nearest' or 'entropy', got 'median'"):
        CredibleSampleFilter(old, labels, rule="median")
    with pytest.raises(ValueError, match="share must be a finite number above 0, got 0"):
        CredibleSampleFilter(old, labels, share=0)
    with pytest.raises(ValueError, match=r"share must be at most 1, got 1.5"):
        CredibleSampleFilter(old, labels, share=1.5)
    with pytest.raises(ValueError, match="max_entropy must be at most 1, got 2"):
        CredibleSampleFilter(old, labels, max_entropy=2)
    with pytest.raises(ValueError, match="max_entropy must be a finite number of at least 0, got -1"):
        CredibleSampleFilter(old, labels, max_entropy=-1)
    with pytest.raises(ValueError, match=r"miner must be a PML miner \(BaseMiner\), got function"):
        CredibleSampleFilter(old, labels, lambda *_: None)
    with pytest.raises(ValueError, match="labels must have one entry a row: expected 60, got 59"):
        CredibleSampleFilter(old, labels[1:])
    with pytest.raises(ValueError, match="embeddings must be finite, row 0"):
        CredibleSampleFilter(old / 0, labels)
    found = CredibleSampleFilter(old, labels)
    with pytest.raises(ValueError, match=f"embeddings must be {WIDTH} wide, got width 3"):
        found(old[:, :3], labels, old[:, :3] * 1.0)
    with pytest.raises(ValueError, match="embeddings must be on the device of the filter: got cpu and meta"):
        found.to("meta").credible(old, labels)
