import numpy as np
import pytest
import torch

from pml_compat.frozen import FrozenEmbeddings, credible_mask
from pml_compat.frozen.class_means import class_means
from tests import reference


def samples(seed=0, n=60, classes=5, width=4, spread=0.3):
    """Return embeddings around class centres, of any length, in no order, and labels with gaps and one single."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, classes - 1, (n,), generator=generator)
    rows[0] = classes - 1
    centers = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    lengths = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 3 + 0.1
    return (centers[rows] + spread * noise) * lengths, rows * 7 + 3


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 1.0])
def test_nearest_matches_naive_loop(seed, share):
    old, labels = samples(seed)
    mask = credible_mask(old, labels, share=share)
    assert mask.tolist() == reference.credible_nearest(old.numpy(), labels, share)
    assert mask.dtype == torch.bool and mask[0]  # a class of one keeps its sample


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("max_entropy", [0.02, 0.05, 0.1])
def test_entropy_matches_naive_loop(seed, max_entropy):
    old, labels = samples(seed)
    expected = [h <= max_entropy * np.log(5) for h in reference.credible_entropies(old.numpy(), labels)]
    assert 0 < sum(expected) < len(old)
    assert credible_mask(old, labels, rule="entropy", max_entropy=max_entropy).tolist() == expected


def test_by_hand():
    # unit rows at 0, 90, 180 degrees and twice 45: the mean is near 45 degrees, so 180 goes first, then 0 and 90
    old = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    labels = torch.zeros(5, dtype=torch.long)
    assert credible_mask(old, labels, share=0.8).tolist() == [True, True, False, True, True]
    assert credible_mask(old, labels, share=0.4).tolist() == [False, False, False, True, True]
    # by length as it is, the mean is (1.4, 0.82): (0, 0.1) is 1.57 away, (1, 1) only 0.44
    assert credible_mask(old, labels, share=0.2, normalize=False).tolist() == [False, False, False, True, False]


def test_entropy_is_over_all_classes():
    """Over a sample's own class alone it is 0 for all, and everything is credible."""
    angles = torch.deg2rad(torch.tensor([-20.0, -10.0, 10.0, 20.0, 70.0, 80.0, 100.0, 110.0, 45.0, 45.0]))
    old, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 1])
    kept = credible_mask(old, labels, rule="entropy", max_entropy=0.6)
    assert kept.tolist() == [True] * 8 + [False, False]  # the two between both classes
    labels[3] = 1  # the old model is sure of class 0 all the same
    assert credible_mask(old, labels, rule="entropy", max_entropy=0.6).equal(kept)


def test_a_class_keeps_its_share_exactly():
    """0.55 of 100 is 55.00000000000001 in floating point: 55, not 56."""
    old, labels = torch.randn(300, 4), torch.arange(300) % 3
    for share, expected in ((0.55, 55), (0.9, 90), (0.901, 91), (1e-9, 1)):
        assert torch.bincount(labels[credible_mask(old, labels, share=share)]).tolist() == [expected] * 3


def test_equal_distances_keep_the_first():
    old = torch.ones(6, 3)
    assert credible_mask(old, torch.tensor([1, 0, 1, 0, 1, 0]), share=0.5).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("rule", ["nearest", "entropy"])
def test_order_of_samples_changes_nothing(rule):
    old, labels = samples()
    order = torch.randperm(len(old))
    permuted = credible_mask(old[order], labels[order], rule=rule, share=0.7)
    assert permuted.equal(credible_mask(old, labels, rule=rule, share=0.7)[order])


@pytest.mark.parametrize("rule", ["nearest", "entropy"])
def test_sources_and_dtypes_give_the_same(rule, tmp_path):
    old, labels = (rows.float() if rows.is_floating_point() else rows for rows in samples())
    expected = credible_mask(old, labels, rule=rule)
    np.save(tmp_path / "old.npy", old.numpy())
    stored = FrozenEmbeddings.write(tmp_path / "old", [(old, torch.arange(len(old)))])
    for source in (old.double(), old.numpy(), np.load(tmp_path / "old.npy", mmap_mode="r"), stored):
        assert credible_mask(source, labels, rule=rule).equal(expected)
    low = credible_mask(old.half(), labels.int(), rule=rule)
    assert (low != expected).float().mean() < 0.1


@pytest.mark.parametrize("rule", ["nearest", "entropy"])
def test_pieces_give_what_the_whole_gives(rule, monkeypatch):
    old, labels = samples()
    expected = credible_mask(old, labels, rule=rule)
    monkeypatch.setattr("pml_compat.frozen.class_means._BATCH_ROWS", 7)
    monkeypatch.setattr("pml_compat.frozen.credible._BLOCK_ELEMENTS", 23)  # 4 rows of 5 classes
    assert credible_mask(old, labels, rule=rule).equal(expected)


def test_entropy_of_classes_without_spread():
    old = torch.eye(3).repeat_interleave(2, 0)
    assert credible_mask(old, torch.arange(6) // 2, rule="entropy", max_entropy=0.0).all()  # no spread at all
    assert credible_mask(old[:1], torch.tensor([4]), rule="entropy").tolist() == [True]  # one class


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_class_means_match_naive_loop(seed, normalize):
    old, labels = samples(seed)
    classes = class_means(old, labels, normalize=normalize)
    expected = reference.class_balls(old.numpy(), labels, normalize)
    assert classes.labels.tolist() == list(expected)
    assert classes.counts.tolist() == [count for _, _, count, _ in expected.values()]
    np.testing.assert_allclose(classes.means, [mean for mean, *_ in expected.values()], rtol=1e-12)
    np.testing.assert_allclose(classes.radii(), [radius for _, radius, *_ in expected.values()], rtol=1e-12)
    for row, (*_, distances) in enumerate(expected.values()):
        np.testing.assert_allclose(classes.distances[classes.rows == row].sort().values, distances, rtol=1e-12)
    if not normalize:
        assert any(radius < max(distances) for _, radius, _, distances in expected.values())


def test_class_means_keep_float32_and_their_inputs():
    old, labels = samples()
    before = old.clone()
    assert class_means(old.half(), labels).means.dtype == class_means(old.float(), labels).means.dtype == torch.float32
    assert old.equal(before)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (None, {"rule": "both"}, "rule must be 'nearest' or 'entropy', got 'both'"),
        (None, {"share": 0.0}, "share must be a finite number above 0, got 0.0"),
        (None, {"share": 1.5}, "share must be at most 1, got 1.5"),
        (None, {"max_entropy": -0.1}, "max_entropy must be a finite number of at least 0, got -0.1"),
        (None, {"max_entropy": 2}, "max_entropy must be at most 1, got 2"),
        (lambda e, y: (e, y[:-1]), {}, "labels must have one entry a row: expected 60, got 59"),
        (lambda e, y: (e, y.float()), {}, "labels must be integers, got torch.float32"),
        (lambda e, y: (e[:0], y[:0]), {}, r"embeddings must not be empty, got shape \(0, 4\)"),
        (lambda e, y: (e[:0].numpy(), y[:0]), {}, "embeddings must not be empty, got none"),
        (lambda e, y: (e[0], y), {}, r"embeddings must be 2-dimensional, \(N, D\), got shape \(4,\)"),
        (lambda e, y: (e.tolist(), y), {}, r"embeddings must be an \(N, D\) tensor or array, got list"),
        (lambda e, y: (e * torch.nan, y), {}, "embeddings must be finite, row 0 has a NaN or an infinity"),
    ],
)
def test_bad_calls(change, kwargs, message):
    old, labels = samples() if change is None else change(*samples())
    with pytest.raises(ValueError, match=message):
        credible_mask(old, labels, **kwargs)
