import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.serving import MixedGallery

CALIBRATIONS = (9.0, -4.0), (14.0, -11.0)


def embeddings(n=300, classes=10, old_width=6, new_width=9, seed=0, noise=(0.9, 0.7)):
    """Return labels, what is compared with old vectors, old vectors, and a sharper, shifted new space."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.arange(n) % classes
    old_centers, new_centers = draw(classes, old_width), draw(classes, new_width)
    old = old_centers[labels] + noise[0] * draw(n, old_width)
    part = old_centers[labels] + noise[0] * draw(n, old_width)
    new = 2 + new_centers[labels] + noise[1] * draw(n, new_width)  # all of them point one way: large cosines
    return labels, part, old, new


@pytest.mark.parametrize("new_features", [None, 4])
def test_scores_are_log_odds_up_to_one_scale_per_query(new_features):
    torch.manual_seed(0)
    part, old = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    new = torch.randn(5, new_features or 3, dtype=torch.float64)
    new_query = part if new_features is None else new
    mixed = MixedGallery(3, new_features, *CALIBRATIONS)
    query = mixed.query_rows(part, None if new_features is None else new_query)
    gallery = torch.cat([mixed.old_rows(old), mixed.new_rows(new)])
    cosine = lambda one, other: normalize(one) @ normalize(other).t()  # noqa: E731
    (a_o, b_o), (a_n, b_n) = CALIBRATIONS
    expected = torch.cat([a_o * cosine(part, old) + b_o, a_n * cosine(new_query, new) + b_n], dim=1)
    found = query @ gallery.t()
    # Equal up to one positive factor and one constant for all: differences have one ratio.
    ratio = (found[:, 1:] - found[:, :1]) / (expected[:, 1:] - expected[:, :1])
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert ratio[0, 0] > 0
    assert gallery.shape[1] == query.shape[1] == mixed.width == 5 + (new_features or 0)
    torch.testing.assert_close(gallery.norm(dim=1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(query.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_by_hand():
    mixed = MixedGallery(1, None, (3.0, 8.0), (3.0, 0.0))  # offsets 4 and -4 after centring: rows of length 5
    torch.testing.assert_close(mixed.old_rows(torch.tensor([[2.0]])), torch.tensor([[0.6, 0.8, 0.0]]))
    torch.testing.assert_close(mixed.new_rows(torch.tensor([[-7.0]])), torch.tensor([[-0.6, -0.8, 0.0]]))
    torch.testing.assert_close(mixed.query_rows(torch.tensor([[5.0]])), torch.tensor([[0.5**0.5, 0.5**0.5, 0.0]]))
    longer = MixedGallery(1, None, (4.0, 6.0), (0.0 + 1e-9, 0.0))
    torch.testing.assert_close(longer.old_rows(torch.tensor([[1.0]])), torch.tensor([[0.8, 0.6, 0.0]]))
    torch.testing.assert_close(longer.new_rows(torch.tensor([[1.0]])), torch.tensor([[0.0, -0.6, 0.8]]))


@pytest.mark.parametrize("seed", [0, 1])
def test_fit_is_a_logistic_regression_on_all_pairs(seed):
    labels, part, old, new = embeddings(120, seed=seed)
    mixed = MixedGallery.fit(part, old, labels, new)
    others = ~np.eye(len(labels), dtype=bool)
    same = (labels[:, None] == labels).numpy()[others]
    for query, gallery, (slope, offset) in (
        (part, old, mixed.old_calibration),
        (new, new, mixed.new_calibration),
    ):
        cosines = (normalize(query) @ normalize(gallery).t()).numpy()[others]
        peer = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(cosines[:, None], same)
        assert slope == pytest.approx(peer.coef_.item(), rel=5e-3)
        assert offset == pytest.approx(peer.intercept_.item(), rel=5e-3)


def test_a_mixed_gallery_ranks_between_its_ends_and_better_than_raw_cosines():
    labels, part, old, new = embeddings(600, seed=3)
    mixed = MixedGallery.fit(*(rows[:300] for rows in (part, old, labels, new)))
    labels, part, old, new = (rows[300:] for rows in (labels, part, old, new))
    is_new = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.5
    calculator = CrossModelAccuracyCalculator(include=("mean_average_precision", "precision_at_1"))

    def measured(query, gallery):
        found = calculator.get_accuracy(query, labels, gallery, labels, ref_includes_query=True)
        return torch.tensor(list(found.values()))

    query = mixed.query_rows(part, new)
    half = measured(query, torch.where(is_new[:, None], mixed.new_rows(new), mixed.old_rows(old)))
    all_old, all_new = measured(query, mixed.old_rows(old)), measured(query, mixed.new_rows(new))
    torch.testing.assert_close(all_old, measured(normalize(part), normalize(old)))  # an end is the plain cosine
    torch.testing.assert_close(all_new, measured(normalize(new), normalize(new)))
    side_by_side = torch.cat([normalize(part), normalize(new)], dim=1)
    raw_rows = torch.where(
        is_new[:, None],
        torch.cat([torch.zeros_like(part), normalize(new)], dim=1),
        torch.cat([normalize(old), torch.zeros_like(new)], dim=1),
    )
    raw = measured(side_by_side, raw_rows)
    assert (all_old < half).all() and (half < all_new).all(), (all_old, half, all_new)
    assert half[0] > raw[0] + 0.04 and half[1] >= raw[1]


def test_shared_space():
    labels, part, old, _ = embeddings(200)
    mixed = MixedGallery.fit(part, old, labels)
    assert mixed.new_features is None and mixed.width == 8
    assert mixed.new_rows(part).shape == (200, 8)


def test_separable_scores_have_a_finite_slope():
    labels = torch.arange(60) % 3
    rows = torch.eye(3)[labels]
    mixed = MixedGallery.fit(rows, rows, labels)
    assert 1 < mixed.old_calibration[0] < 1e3
    assert torch.isfinite(mixed.query_rows(rows) @ mixed.old_rows(rows).t()).all()


def test_rows_drawn_come_from_the_seed():
    labels, part, old, new = embeddings(200)

    def slope(seed):
        return MixedGallery.fit(part, old, labels, new, max_rows=50, seed=seed).old_calibration[0]

    torch.manual_seed(0)
    first = slope(0)
    torch.manual_seed(1)
    assert slope(0) == pytest.approx(first, rel=1e-9) and slope(1) != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    labels, part, old, new = (rows.to(dtype) if rows.is_floating_point() else rows for rows in embeddings(100))
    mixed = MixedGallery.fit(part, old, labels, new)
    assert mixed.query_rows(part, new).dtype == mixed.old_rows(old).dtype == mixed.new_rows(new).dtype == dtype


def test_half_precision_rows_of_zero_stay_finite():
    mixed, nothing = MixedGallery(6, 9, *CALIBRATIONS), torch.zeros(2, 15, dtype=torch.float16)
    part, new = nothing[:, :6], nothing[:, 6:]
    for rows in (mixed.query_rows(part, new), mixed.old_rows(part), mixed.new_rows(new)):
        assert torch.isfinite(rows).all()


def test_numpy_rows():
    labels, part, old, new = (rows.numpy() for rows in embeddings(100))
    mixed = MixedGallery.fit(part, old, labels, new)
    assert mixed.query_rows(part, new).shape == (100, mixed.width)


def test_save_and_load(tmp_path):
    mixed = MixedGallery(6, 9, *CALIBRATIONS)
    mixed.save(tmp_path / "mixed.json")
    again = MixedGallery.load(tmp_path / "mixed.json")
    assert vars(again) == vars(mixed)
    whole = (tmp_path / "mixed.json").read_text()
    (tmp_path / "mixed.json").write_text(whole[:-20])
    with pytest.raises(ValueError, match="path must be a whole JSON file"):
        MixedGallery.load(tmp_path / "mixed.json")
    (tmp_path / "mixed.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"path must be a file written by MixedGallery.save"):
        MixedGallery.load(tmp_path / "mixed.json")
    with pytest.raises(FileNotFoundError):
        MixedGallery.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, *CALIBRATIONS), "old_features must be an integer of at least 1, got 0"),
        ((2, 0, *CALIBRATIONS), "new_features must be an integer of at least 1, got 0"),
        ((2, 2, (0.0, 1.0), (1.0, 0.0)), "slope of old_calibration must be a finite number above 0, got 0"),
        ((2, 2, (1.0, 1.0), 3.0), "new_calibration must be two numbers, slope and offset, got 3.0"),
        ((2, 2, (1.0, float("nan")), (1.0, 0.0)), "offset of old_calibration must be finite, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedGallery(*arguments)


def test_bad_calls():
    labels, part, old, new = embeddings(40)
    mixed = MixedGallery(6, 9, *CALIBRATIONS)
    with pytest.raises(ValueError, match=r"embeddings must be given, \(N, 9\), got None"):
        mixed.query_rows(part)
    with pytest.raises(ValueError, match="embeddings must be None, got a matrix"):
        MixedGallery(6, None, *CALIBRATIONS).query_rows(part, new)
    with pytest.raises(ValueError, match="embeddings must have the rows of old_part, 40, got 39"):
        mixed.query_rows(part, new[1:])
    with pytest.raises(ValueError, match="old_embeddings must be 6 wide, got width 9"):
        mixed.old_rows(new)
    with pytest.raises(ValueError, match="embeddings must be 9 wide, got width 6"):
        mixed.new_rows(old)
    with pytest.raises(ValueError, match="old_embeddings must have the items of old_part: expected 40 rows, got 39"):
        MixedGallery.fit(part, old[1:], labels, new)
    with pytest.raises(ValueError, match="labels must have two items of one class, got none"):
        MixedGallery.fit(part, old, torch.arange(40), new)
    with pytest.raises(ValueError, match="labels must have items of different classes, got none"):
        MixedGallery.fit(part, old, torch.zeros(40, dtype=torch.long), new)
    with pytest.raises(ValueError, match="old_part must score higher within a class than between classes"):
        MixedGallery.fit(part, -old, labels, new)
    old[3, 0] = torch.nan
    with pytest.raises(ValueError, match="old_embeddings must be finite, row 3"):
        MixedGallery.fit(part, old, labels, new)


def test_rows_of_both_score_the_mean_of_the_two():
    labels, part, old, new = embeddings(80)
    mixed = MixedGallery.fit(part, old, labels, new)
    queries = mixed.query_rows(part, new)
    both = mixed.new_rows(new, old)
    scores = [queries @ rows.t() for rows in (mixed.old_rows(old), mixed.new_rows(new), both)]
    torch.testing.assert_close(scores[2], (scores[0] + scores[1]) / 2)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(80))


def test_rows_of_both_need_both():
    labels, part, old, new = embeddings(80)
    with pytest.raises(ValueError, match="old_embeddings must be None where one part serves both kinds"):
        MixedGallery.fit(part, old, labels).new_rows(part, old)
    mixed = MixedGallery.fit(part, old, labels, new)
    with pytest.raises(ValueError, match="old_embeddings must have the items of embeddings, 80 rows, got 79"):
        mixed.new_rows(new, old[1:])
    with pytest.raises(ValueError, match=r"old_embeddings must be .* wide"):
        mixed.new_rows(new, old[:, 1:])


def test_without_labels_the_cosines_are_z_scores():
    _, part, old, new = embeddings(90)
    mixed = MixedGallery.fit(part, old, None, new)
    for rows, others, calibration in ((part, old, mixed.old_calibration), (new, new, mixed.new_calibration)):
        cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(others, dim=1).t()
        values = cosines[~torch.eye(90, dtype=torch.bool)].numpy()
        scored = calibration[0] * values + calibration[1]
        assert (scored.mean(), scored.std()) == pytest.approx((0, 1), abs=0.01)  # by histogram


def test_z_scores_of_one_value():
    rows = torch.eye(3)
    with pytest.raises(ValueError, match="old_part must have cosines that differ, all are"):
        MixedGallery.fit(rows, rows, None)


@pytest.mark.parametrize("missing", ["old_features", "new_features", "old_calibration", "new_calibration"])
def test_a_file_without_a_number(tmp_path, missing):
    path = tmp_path / "mixed.json"
    MixedGallery(2, None, (1.0, 0.0), (1.0, 0.0)).save(path)
    found = json.loads(path.read_text())
    del found[missing]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"must be a file written by MixedGallery.save"):
        MixedGallery.load(path)


@pytest.mark.parametrize("content", [b"\x80\x81", b"{", b"[]", b"{}", None])
def test_a_file_that_is_no_mixed_gallery(content, tmp_path):
    path = tmp_path / "mixed.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a .*mixed\.json' is"):
        MixedGallery.load(path)
