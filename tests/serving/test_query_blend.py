import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat._files import save_tensors
from pml_compat.frozen import FrozenEmbeddings
from pml_compat.serving import NumpyQueryBlend, QueryBlend, alignability, blend_share, query_blend
from pml_compat.serving.rotation import interpolate, stand_alike
from pml_compat.transformations import OrthogonalTransformation
from tests import reference
from tests.pairwise import pairwise

WIDTHS = [(8, 8), (8, 12), (8, 5)]  # of the old and the new model


def items(n=240, classes=12, widths=(8, 8), noise=(0.8, 0.4), seed=0, turned=True):
    """Return labels, old embeddings, and new ones: the same classes seen with less noise, in a space of their own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.arange(n) % classes
    centers = 0.5 + draw(classes, widths[0])  # not centred: what a fit that takes the mean off would lose
    turn = torch.linalg.qr(draw(max(widths), max(widths)))[0] if turned else torch.eye(max(widths))
    old, new = (centers[labels] + scale * draw(n, widths[0]) for scale in noise)
    return labels, old, new @ turn[: widths[0], : widths[1]]


def fitted(share=None, **options):
    labels, old, new = items(**options)
    blend = QueryBlend().fit(old, new, labels)
    blend.share = blend.share if share is None else share
    return blend, old, new


def precision(queries, labels, gallery):
    """P@1 of the first 150, each left out of its own ranking."""
    arrays = normalize(queries[:150]).double().numpy(), normalize(gallery).double().numpy()
    return reference.found_by(arrays[0], labels[:150].tolist(), arrays[1], labels.tolist())[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_rotation_is_procrustes_on_unit_rows(widths, seed):
    blend, old, new = fitted(widths=widths, seed=seed)
    new, old = (np.array([reference.unit(row) for row in rows.double().numpy()]) for rows in (new, old))
    np.testing.assert_allclose(blend.rotation, reference.procrustes(new, old), atol=1e-5)
    centred = reference.procrustes(new - new.mean(0), old - old.mean(0))
    assert np.abs(centred - blend.rotation.numpy()).max() > 0.01
    rotation = blend.rotation if widths[1] <= widths[0] else blend.rotation.t()
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(min(widths)), atol=1e-5, rtol=0)
    assert blend.rotation.shape == (widths[1], widths[0]) and blend.rotation.dtype == torch.float32


def slerp(u, v, share):
    theta = reference.angle(u, v)
    return (math.sin((1 - share) * theta) * u + math.sin(share * theta) * v) / math.sin(theta)


def at_angle(theta, width=6, seed=0):
    """Return two unit rows with an angle between them, in float64."""
    first, second = np.random.default_rng(seed).normal(size=(2, width))
    first = reference.unit(first)
    second = reference.unit(second - (second @ first) * first)
    return first, math.cos(theta) * first + math.sin(theta) * second


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_the_blend_is_on_the_great_circle(share):
    pairs = [at_angle(theta, seed=seed) for seed, theta in enumerate([0.01, 0.3, 1.0, math.pi / 2, 2.5, 3.1])]
    found = interpolate(*(torch.tensor(np.array(rows)) for rows in zip(*pairs, strict=True)), share)
    np.testing.assert_allclose(found, [slerp(u, v, share) for u, v in pairs], atol=1e-9)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_query_rows_follow_the_formula(widths, share):
    blend, old, new = fitted(share, widths=widths, n=60)
    rotation = blend.rotation.double().numpy()
    expected = [
        slerp(reference.unit(o), reference.unit(reference.unit(f) @ rotation), share)
        for o, f in zip(old.double().numpy(), new.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(blend.query_rows(old, new), expected, atol=1e-5)
    lengths = torch.linspace(0.1, 9, 60)[:, None]
    torch.testing.assert_close(blend.query_rows(old * lengths, new / lengths), blend.query_rows(old, new))


def test_by_hand():
    u, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(interpolate(u, v, 1 / 3), torch.tensor([[0.75**0.5, 0.5]]))
    old, quarter = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(blend_share.procrustes(old @ quarter, old).matrix, quarter.t())
    blend = QueryBlend().fit(old, old)
    blend.rotation, blend.share = quarter.t(), 0.5  # the new query, turned back, is at (0, 1)
    torch.testing.assert_close(blend.query_rows(u, torch.tensor([[-7.0, 0.0]])), torch.tensor([[0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_ends_that_meet_or_are_opposite_give_unit_rows(share, dtype):
    pairs = [at_angle(theta, seed=seed) for theta in (0.0, 1e-9, 1e-5, 2e-4) for seed in range(4)]
    u, v = (torch.tensor(np.array(rows), dtype=dtype) for rows in zip(*pairs, strict=True))
    torch.testing.assert_close(interpolate(u, v, share), u, atol=3e-4, rtol=0)
    for opposite in (-v, -u):
        found = interpolate(u, opposite, share)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(u), dtype=dtype))


def test_a_share_of_0_is_the_old_query():
    blend, old, new = fitted(0.0)
    assert blend.query_rows(old, new).equal(normalize(old))


def test_a_straight_line_walks_the_same_arc():
    u, v = (torch.tensor(rows)[None] for rows in at_angle(1.2))
    for weight in (0.2, 0.5, 0.9):
        between = normalize((1 - weight) * u + weight * v)
        share = math.acos(float((between * u).sum())) / 1.2
        torch.testing.assert_close(interpolate(u, v, share), between)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_weighted_scores_rank_as_the_blended_query_does(share):
    blend, old, new = (each.double() if isinstance(each, torch.Tensor) else each for each in fitted(share))
    u, v = normalize(old), normalize(normalize(new) @ blend.rotation.double())
    theta = (u * v).sum(1, keepdim=True).arccos()
    weight = (share * theta).sin() / (((1 - share) * theta).sin() + (share * theta).sin())
    scores = (1 - weight) * (u @ u.t()) + weight * (v @ u.t())
    assert scores.argsort(dim=1).equal((blend.query_rows(old, new) @ u.t()).argsort(dim=1))


def test_between_equal_widths_the_rotation_changes_no_cosine():
    _, old, new = items(n=60)
    before = normalize(new)
    after = blend_share.procrustes(before, normalize(old))(before)
    torch.testing.assert_close(after @ after.t(), before @ before.t(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_turned_model_with_less_noise_is_blended_in_and_finds_more(widths, labelled):
    labels, old, new = items(n=600, classes=30, widths=widths, noise=(1.0, 0.3))
    seen = labels < 15
    blend = QueryBlend().fit(old[seen], new[seen], labels[seen] if labelled else None)
    assert 0 < blend.share <= 1
    labels, old, new = labels[~seen], old[~seen], new[~seen]
    assert precision(blend.query_rows(old, new), labels, old) > precision(old, labels, old) + 0.03


@pairwise
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("width", "noise"), [(4, 0.3), (32, 0.3)])  # in 32 the old model finds all
def test_an_unrelated_model_is_left_out(width, noise, seed, labelled):
    labels, old, _ = items(n=600, classes=60, noise=(noise, noise), widths=(width, width), seed=seed)
    new = torch.randn(600, width, generator=torch.Generator().manual_seed(seed + 100))
    assert QueryBlend().fit(old, new, labels if labelled else None).share == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_turned_model_is_not_blended_in_as_it_is_where_the_old_one_finds_all(seed):
    labels, old, new = items(n=200, widths=(64, 64), seed=seed)
    assert precision(old, labels, old) == 1
    blend = QueryBlend().fit(old, new, labels)
    unturned = blend.rotation.equal(torch.eye(64))
    assert blend.share == 0 or not unturned


@pytest.mark.parametrize("width", [24, 32, 48])  # of the new model
def test_no_rotation_where_the_models_fit_each_other_already(width):
    labels, old, new = items(n=64, classes=16, widths=(32, max(32, width)), noise=(1.0, 0.5), turned=False)
    blend = QueryBlend().fit(old, new[:, :width], labels)  # too few rows for a rotation
    assert blend.rotation.equal(torch.eye(width, 32)) and blend.share > 0


@pytest.mark.parametrize(
    ("size", "classes", "noise", "seed"),
    # Of the first two, what the folds choose is worse than the old query on all rows.
    [(60, 12, 0.8, 33), (16, 4, 2.5, 34), (60, 12, 0.6, 0), (60, 12, 1.0, 1), (60, 12, 1.6, 2)],
)
def test_never_below_the_old_query_on_what_it_was_fitted_to(size, classes, noise, seed):
    labels, old, new = items(n=size, classes=classes, noise=(0.6, noise), seed=seed)
    blend = QueryBlend().fit(old, new, labels)
    assert precision(blend.query_rows(old, new), labels, old) >= precision(old, labels, old)


def common_directions(n=1200, classes=40, width=16, seed=0, turned=True):
    """Items whose cosines are mostly made of two directions that say nothing of their class."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.arange(n) % classes
    nothing = torch.cat([5 * draw(n, 2), torch.zeros(n, width - 2)], 1)
    centers = torch.cat([torch.zeros(classes, 2), draw(classes, width - 2)], 1)
    old, new = (nothing + centers[labels] + noise * draw(n, width) for noise in (0.9, 0.6))
    return labels, old, new @ torch.linalg.qr(draw(width, width))[0] if turned else new


def unit_arrays(*embeddings):
    return (np.array([reference.unit(row) for row in rows.double().numpy()]) for rows in embeddings)


def power(rows, exponent):
    """That of the rows' second moments, 1 at the largest, those below a thousandth of the mean counted as that."""
    moments, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    moments = np.maximum(moments, moments.mean() / 1000)
    return axes @ np.diag((moments / moments.max()) ** exponent) @ axes.T


def reference_sphered(new, old):
    """Return the matrix and the offset: what differs from the mean, turned where both models are whitened in part."""
    centred, about = new - new.mean(0), old - old.mean(0)
    matrix = reference.procrustes(centred @ power(centred, -0.25), about @ power(about, -0.25)) @ power(old, -0.35)
    return matrix, new.mean(0) @ matrix


def in_a_cone(seed=0):
    """Return items of which the new model's lie within a few degrees of one another."""
    labels, old, new = items(n=600, noise=(1.2, 0.4), seed=seed)
    return labels, old, normalize(new - new.mean(0)) + 4 * normalize(torch.ones(1, 8))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("widths", WIDTHS)
def test_what_queries_may_be_mapped_by(widths, seed):
    _, old, new = items(widths=widths, seed=seed)
    u, v = unit_arrays(old, new)
    rows = torch.from_numpy(v).float(), torch.from_numpy(u).float()
    found = blend_share.whitened(*rows)
    np.testing.assert_allclose(found.matrix, reference.procrustes(v, u) @ power(u, -0.2), atol=1e-4)
    assert not found.offset.any()
    found, (matrix, offset) = blend_share.sphered(*rows), reference_sphered(v, u)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-4)
    np.testing.assert_allclose(found.offset, offset, atol=1e-4)
    for length in (1.0, 0.2):
        np.testing.assert_allclose(found(length * rows[0]), length * (v @ matrix - offset), atol=1e-4)
    assert not found(torch.zeros(2, widths[1])).any()  # what has no direction gets none


@pytest.mark.parametrize("seed", [0, 1])
def test_new_queries_are_whitened_where_that_finds_more(seed):
    labels, old, new = common_directions(seed=seed)
    blend = QueryBlend().fit(old, new, labels)
    u, v = unit_arrays(old, new)
    turned = QueryBlend().fit(old, new, labels)
    turned.rotation = torch.from_numpy(reference.procrustes(v, u)).float()
    turned.offset = torch.zeros(old.shape[1])
    assert not torch.allclose(blend.rotation, turned.rotation, atol=0.1)
    found = [precision(one.query_rows(old, new), labels, old) for one in (blend, turned)]
    assert found[0] > found[1] > precision(old, labels, old)


@pytest.mark.parametrize("seed", range(3))
def test_what_differs_is_turned_where_all_new_rows_are_alike(seed):
    labels, old, new = in_a_cone(seed)
    blend = QueryBlend().fit(old, new, labels)
    u, v = unit_arrays(old, new)
    np.testing.assert_allclose(blend.rotation, reference_sphered(v, u)[0], atol=1e-3)
    assert blend.share > 0
    plain = reference.procrustes(v, u)
    rotated = normalize(torch.from_numpy(v @ plain).float())
    blend.share = 1.0
    assert precision(blend.query_rows(None, new), labels, old) > precision(rotated, labels, old) + 0.1


@pytest.mark.parametrize("fit", [blend_share.whitened, blend_share.sphered])
def test_maps_of_few_rows_are_finite(fit):
    _, old, new = common_directions(n=24, classes=3, width=64)
    matrix, offset = fit(normalize(new), normalize(old))
    assert matrix.isfinite().all() and float(matrix.abs().max()) < 20 and offset.isfinite().all()
    same = torch.ones(5, 3)
    assert all(part.isfinite().all() for part in fit(same, same))


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_fits_and_finds_more_is_left_alone(seed):
    labels, old, new = items(n=600, noise=(1.2, 0.4), turned=False, seed=seed)
    blend = QueryBlend().fit(old, new, labels)
    assert blend.share == 1
    assert blend.rotation.equal(torch.eye(8))
    alone = blend.query_rows(None, new)  # the old model is not asked
    torch.testing.assert_close(alone, blend.query_rows(old, new))
    assert precision(alone, labels, old) >= precision(new, labels, old) > precision(old, labels, old)
    worse = QueryBlend().fit(new, old, labels)  # it fits as well, and finds less
    assert worse.share < 1
    with pytest.raises(ValueError, match="old_query must be given, got None"):
        worse.query_rows(None, old)


@pytest.mark.parametrize("seed", range(3))
def test_without_labels_a_model_that_fits_is_blended_with_the_old_one(monkeypatch, seed):
    """Nothing says that queries will be of classes it learned: what the two agree on decides, and its part is less."""
    _, old, new = items(n=600, noise=(1.2, 0.4), turned=False, seed=seed)
    blend = QueryBlend().fit(old, new)
    assert 0 < blend.share < 1
    right = torch.zeros(11, 600, 10, dtype=torch.float64)
    right[4:, :400] = 1  # by far more than the old one finds, and no blend finds more than the new one
    monkeypatch.setattr(blend_share.ShareJudge, "_found", lambda self, fit: (right, torch.ones(600)))
    assert QueryBlend().fit(old, new).share < 1


@pytest.mark.parametrize("seed", range(2))
def test_a_model_that_fits_is_not_whitened(seed, tmp_path):
    """It knows the items by heart, which lie closer together than others: among these whitening finds more."""
    labels, old, new = common_directions(seed=seed, turned=False)
    blend = QueryBlend().fit(old, new, labels)
    assert blend.rotation.equal(torch.eye(old.shape[1]))
    whitened = normalize(new.double() @ torch.from_numpy(power(*unit_arrays(old), -0.2))).float()
    assert precision(whitened, labels, old) > precision(new, labels, old)
    blend.share = 1.0
    alone = normalize(new)
    torch.testing.assert_close(blend.query_rows(None, new), alone)
    blend.save(tmp_path / "blend.safetensors")
    np.testing.assert_allclose(NumpyQueryBlend(tmp_path / "blend.safetensors")(None, new.numpy()), alone, atol=1e-6)


def judge_that_finds(monkeypatch, found, alone, nearness=None):
    """A judge to which the models seem to fit; at half the share a map finds what ``found`` says, and at the share
    ``alone`` a fifth. A mapped row puts ``nearness`` of all items below its own, or all of them."""
    labels, old, new = items(n=200, noise=(1.2, 1.0), turned=False)
    nearness = nearness or {}

    def found_by(self, fit):
        right = torch.zeros(11, 200, 10, dtype=torch.float64)
        right[5, : int(200 * found.get(fit, 0))] = 1
        right[alone, :40] = 1
        return right, torch.full((200,), nearness.get(fit, 1.0))

    monkeypatch.setattr(blend_share.ShareJudge, "_found", found_by)
    return blend_share.ShareJudge(normalize(old), normalize(new), labels, torch.Generator().manual_seed(0))


def test_of_two_maps_of_a_model_that_fits_the_plain_one_is_kept_unless_another_finds_much_more(monkeypatch):
    """Rotations are fitted to the very rows that a trained model knows by heart."""
    found = {blend_share.as_they_are: 0.5, blend_share.procrustes: 0.51}  # one standard error of two rows
    judge = judge_that_finds(monkeypatch, found, alone=10)  # the new one more than the old one, and less than a blend
    assert judge.choose()[0] is blend_share.as_they_are
    found[blend_share.procrustes] = 0.6
    assert judge.choose()[0] is blend_share.procrustes


def test_of_two_models_that_fit_by_chance_the_new_one_is_turned_unless_no_rotation_finds_much_more(monkeypatch):
    """A model that by itself finds less than the old one was not trained to fit it."""
    found = {blend_share.as_they_are: 0.5, blend_share.procrustes: 0.5}
    judge = judge_that_finds(monkeypatch, found, alone=0)
    assert judge.choose()[0] is blend_share.procrustes
    found[blend_share.as_they_are] = 0.51  # one standard error of two rows
    assert judge.choose()[0] is blend_share.procrustes
    found[blend_share.as_they_are] = 0.6
    assert judge.choose()[0] is blend_share.as_they_are


@pytest.mark.parametrize("nearer", [blend_share.procrustes, blend_share.sphered])
def test_two_models_that_a_map_turns_and_brings_nearer_fit_by_chance(monkeypatch, nearer):
    """Even where the new one by itself finds much more: of items that it knows by heart."""
    found = {blend_share.as_they_are: 0.6, blend_share.procrustes: 0.5}
    nearness = dict.fromkeys((blend_share.as_they_are, blend_share.procrustes, blend_share.sphered), 0.8)
    judge = judge_that_finds(monkeypatch, found, alone=10, nearness=nearness)
    for alike, at, taken in ((False, 0.8, "as_they_are"), (True, 0.81, "as_they_are"), (False, 0.81, "procrustes")):
        monkeypatch.setattr(blend_share, "stand_alike", lambda source, target, alike=alike: alike)
        nearness[nearer] = at
        assert judge.choose()[0].__name__ == taken


@pytest.mark.parametrize("angle", [0.3, 0.6])
def test_models_stand_alike_where_a_rotation_adds_little(angle):
    """All planes of two coordinates turned by an angle: cosines to the own row are its cosine, and 1 turned back."""
    rows = normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)))
    pairs = rows.view(500, 4, 2)
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=2)
    turned = (math.cos(angle) * pairs + math.sin(angle) * across).flatten(1)
    assert stand_alike(turned, rows) == (math.cos(angle) >= 0.9)
    assert stand_alike(rows[:, :5], rows) and stand_alike(rows, rows[:, :5])
    assert not stand_alike(rows.flip(1), rows)


@pytest.mark.parametrize("labelled", [True, False])
def test_with_labels_the_first_place_decides_on_the_share(monkeypatch, labelled):
    """Further down the new model, which knows the items by heart, finds more than it will of others."""
    labels, old, new = items(n=200)
    judge = blend_share.ShareJudge(
        normalize(old), normalize(new), labels if labelled else None, torch.Generator().manual_seed(0)
    )
    right = torch.zeros(11, 200, 10, dtype=torch.float64)
    right[3, :150, 0] = 1  # the best of share 0.3 is the first place, of 0.7 the others
    right[7, :100] = 1
    monkeypatch.setattr(
        blend_share.ShareJudge,
        "_found",
        lambda self, fit: (right, torch.full((200,), 1.0 * (fit is blend_share.procrustes))),
    )
    assert judge.choose() == (blend_share.procrustes, 0.3 if labelled else 0.7)


def test_labels_give_no_larger_share_than_both_models_bear_out(monkeypatch):
    """The new model knows the items' classes by heart, and would lose what the old one tells apart within others."""
    labels, old, new = items(n=200)
    judge = blend_share.ShareJudge(normalize(old), normalize(new), labels, torch.Generator().manual_seed(0))

    def found_by(self, fit):
        right = torch.zeros(11, 200, 10, dtype=torch.float64)
        for share in range(11):
            right[share, : 100 + 8 * share if self.labels is not None else 100 - 20 * max(0, share - 2)] = 1
        return right, torch.zeros(200)

    monkeypatch.setattr(blend_share.ShareJudge, "_found", found_by)
    assert judge.choose()[1] == 0.2
    monkeypatch.setattr(blend_share.ShareJudge, "_borne_out", lambda self, fit: 1.0)
    assert judge.choose()[1] > 0.8


def test_what_both_models_find_bears_out_a_share_up_to_the_first_that_finds_clearly_less(monkeypatch):
    labels, old, new = items(n=200)
    judge = blend_share.ShareJudge(normalize(old), normalize(new), labels, torch.Generator().manual_seed(0))
    right = torch.zeros(11, 200, 10, dtype=torch.float64)
    for step, count in enumerate([150, 160, 149, 100, 170]):
        right[step, :count, 0] = 1
    asked = []
    monkeypatch.setattr(blend_share.ShareJudge, "_found", lambda self, fit: asked.append(self.labels) or (right, None))
    assert judge._borne_out(blend_share.procrustes) == 0.2  # one query less is within two standard errors
    assert asked == [None] and judge.labels is not None
    right[:] = 1
    assert judge._borne_out(blend_share.procrustes) == 1.0


def test_precisions_of_the_first_places_by_hand():
    found = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]).double()
    expected = [(1 + 1 / 2 + 2 / 3) / 3, (0 + 1 / 2 + 1 / 3) / 3, 0]
    torch.testing.assert_close(blend_share._precision(found), torch.tensor([expected]).double())


def test_the_seed_decides():
    labels, old, new = items(n=96)
    state = torch.get_rng_state()
    first, again, other = (QueryBlend().fit(old, new, labels, seed=seed) for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(state)
    assert first.share == again.share and first.rotation.equal(again.rotation)
    torch.testing.assert_close(other.rotation, first.rotation)  # of all rows, in another order


def source_rows(monkeypatch, old, new, labels):
    """Fit, and return which rows of ``new`` each map was fitted to."""
    unit, seen = normalize(new), []

    def recording(fit, source, target):
        distances = torch.cdist(source.double(), unit.double())
        seen.append(set(distances.argmin(1).tolist()))
        assert len(seen[-1]) == len(source) and float(distances.amin(1).max()) < 1e-5
        return fit(source, target)

    for name in ("procrustes", "whitened", "sphered"):
        monkeypatch.setattr(blend_share, name, partial(recording, getattr(blend_share, name)))
    QueryBlend().fit(old, new, labels)
    return seen


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_the_share_is_judged_on_classes_that_the_rotation_has_not_seen(monkeypatch, classes):
    labels, old, new = items(n=48, classes=classes)
    everything = set(range(48))
    folds = [rows for rows in source_rows(monkeypatch, old, new, labels) if rows != everything]
    judged = [everything - rows for rows in folds]
    count = min(4, classes)
    for rows, asked in zip(folds[: 3 * count], judged, strict=False):  # for each of three maps
        assert not {int(labels[row]) for row in rows} & {int(labels[row]) for row in asked}
    assert sorted(row for asked in judged[: 3 * count] for row in asked) == sorted(3 * [*everything])
    borne_out = judged[3 * count :]  # by what both models find, on folds of items
    assert sorted(row for asked in borne_out for row in asked) == sorted(3 * [*everything])


def test_maps_are_compared_at_the_shares_that_they_would_have(monkeypatch):
    """One that finds most at a share that is not borne out is not taken for it."""
    found = dict.fromkeys((blend_share.as_they_are, blend_share.procrustes), 0.5)
    found |= {blend_share.whitened: 0.8, blend_share.sphered: 0.9}
    judge = judge_that_finds(monkeypatch, found, alone=0)
    for bound, taken in ((1.0, blend_share.sphered), (0.0, blend_share.whitened)):
        bounds = {blend_share.sphered: bound}
        monkeypatch.setattr(blend_share.ShareJudge, "_borne_out", lambda self, fit, bounds=bounds: bounds.get(fit, 1.0))
        assert judge.choose() == (taken, 0.5)


def test_without_labels_each_item_is_judged_once(monkeypatch):
    _, old, new = items(n=48)
    judged = [row for rows in source_rows(monkeypatch, old, new, None) for row in set(range(48)) - rows]
    assert sorted(judged) == sorted(3 * [*range(48)])  # of each of three maps


@pytest.mark.parametrize(("size", "neighbors"), [(12, 1), (48, 3), (200, 10)])
def test_without_labels_both_models_say_what_is_right(size, neighbors):
    _, old, new = items(n=size, classes=6, widths=(8, 5))
    old, new = normalize(old).double(), normalize(new).double()
    for i, found in enumerate(blend_share._found_by_both(old, new).tolist()):
        z_scores = []
        for rows in (old.numpy(), new.numpy()):
            cosines = np.array([rows[i] @ row for row in rows])
            z_scores.append((cosines - cosines.mean()) / cosines.std(ddof=1))
        total = sum(z_scores)
        assert found == sorted((j for j in range(size) if j != i), key=lambda j: -total[j])[:neighbors]


def test_of_many_rows_a_sample_is_used(monkeypatch):
    labels, old, new = items()
    monkeypatch.setattr(query_blend, "_ROTATION_ROWS", 60)
    monkeypatch.setattr(query_blend, "_JUDGED_ROWS", 40)
    sizes = sorted(map(len, source_rows(monkeypatch, old, new, labels)))
    assert sizes[-1] == 60 and 20 <= sizes[0] <= sizes[-2] < 40
    first, other = (QueryBlend().fit(old, new, labels, seed=seed).rotation for seed in (0, 1))
    assert not torch.allclose(first, other, atol=1e-3)


def test_blocks_do_not_change_the_fit(monkeypatch):
    labels, old, new = items(n=100)
    whole = [QueryBlend().fit(old, new, given) for given in (labels, None)]
    monkeypatch.setattr(blend_share, "_BLOCK", 7)
    for blend, given in zip(whole, (labels, None), strict=True):
        again = QueryBlend().fit(old, new, given)
        assert again.share == blend.share and again.rotation.equal(blend.rotation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    labels, old, new = items(n=60, noise=(0.8, 0.1))
    single = QueryBlend().fit(old, new, labels)
    expected = single.query_rows(old, new)
    old, new = old.to(dtype), new.to(dtype)
    blend = QueryBlend().fit(old, new, labels)
    assert blend.share == pytest.approx(single.share, abs=0.11)
    blend.share = single.share
    blended = blend.query_rows(old, new)
    assert blended.dtype == old.dtype and blend.rotation.dtype == torch.float32
    torch.testing.assert_close(blended.float(), expected, atol=8 * max(1e-5, torch.finfo(dtype).eps), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_zeros_stay_finite(dtype):
    blend, old, new = fitted(0.5, n=60)
    old, new = old[:4].to(dtype), new[:4].to(dtype)
    old[0], old[1], new[1], new[2] = 0, 0, 0, 0
    blended = blend.query_rows(old, new)
    assert torch.isfinite(blended).all() and not blended[1].any()
    torch.testing.assert_close(blended[2], normalize(old[2:3].float())[0].to(dtype), atol=1e-3, rtol=0)


def test_no_gradient_no_warning_and_no_change():
    labels, old, new = items(n=60)
    given = old.clone().requires_grad_(), new.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blend = QueryBlend().fit(*given, labels)
        blended = blend.query_rows(*given)
    assert not blend.rotation.requires_grad and not blended.requires_grad
    assert given[0].equal(old) and given[1].equal(new)


def test_arrays_memory_maps_and_frozen_embeddings(tmp_path):
    labels, old, new = items(n=60)
    expected = QueryBlend().fit(old, new, labels)
    np.save(tmp_path / "old.npy", old.numpy())
    np.save(tmp_path / "new.npy", new.numpy())
    maps = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("old", "new")]
    frozen = [FrozenEmbeddings.from_array(rows, fingerprint=name) for rows, name in ((old, "a"), (new, "b"))]
    for rows in ((old.numpy(), new.numpy()), maps, frozen):
        blend = QueryBlend().fit(*rows, labels.numpy())
        assert blend.share == expected.share and blend.rotation.equal(expected.rotation)
        assert blend.query_rows(*rows).equal(expected.query_rows(old, new))
    assert (blend.old_fingerprint, blend.new_fingerprint) == ("a", "b")
    assert (expected.old_fingerprint, expected.new_fingerprint) == (None, None)
    with pytest.raises(ValueError, match="old_query must be of the model with fingerprint 'a', got 'b'"):
        blend.query_rows(*frozen[::-1])
    other = FrozenEmbeddings.from_array(new, fingerprint="c")
    with pytest.raises(ValueError, match="new_query must be of the model with fingerprint 'b', got 'c'"):
        blend.query_rows(old, other)
    assert expected.query_rows(old, other).shape == old.shape  # fitted to rows that said nothing


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(("width", "seed"), [(16, 0), (16, 1), (16, 2), (8, 1), (8, 4)])
def test_exchanged_models_are_refused_where_their_widths_are_equal(tmp_path, loaded, width, seed):
    blend, old, new = fitted(n=200, widths=(width, width), noise=(1.2, 0.6), seed=seed)
    if loaded:
        blend.save(tmp_path / "blend.safetensors")
        blend = QueryBlend.load(tmp_path / "blend.safetensors")
    for rows in (8, 100):
        with pytest.raises(ValueError, match=r"old_query must be the old model's .* got them exchanged: after the rot"):
            blend.query_rows(new[:rows], old[:rows])
    assert blend.query_rows(new[:7], old[:7]).shape == (7, width)  # too few rows to tell
    assert blend.query_rows(old[:8], new[:8]).shape == (8, width)


def test_queries_far_from_what_was_fitted_are_no_exchange():
    blend, _, _ = fitted()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        blend._known_to_fit = False
        assert blend.query_rows(*torch.randn(2, 30, 8, generator=generator)).shape == (30, 8)


def test_save_and_load(tmp_path):
    labels, old, new = items(n=60, widths=(8, 5))
    frozen = [FrozenEmbeddings.from_array(rows, fingerprint=name) for rows, name in ((old, "a"), (new, "b"))]
    blend, path = QueryBlend().fit(*frozen, labels), tmp_path / "blend.safetensors"
    blend.share = 0.3  # which float32 does not have
    blend.save(path)
    again = QueryBlend.load(path, old_fingerprint="a", new_fingerprint="b")
    assert again.share == blend.share and again.rotation.equal(blend.rotation) and repr(again) == repr(blend)
    assert (again.old_fingerprint, again.new_fingerprint) == ("a", "b")
    assert again.query_rows(old, new).equal(blend.query_rows(old, new))
    for names, message in (
        ({"old_fingerprint": "c"}, "old_fingerprint must be that of the model it was fitted to, 'a', got 'c'$"),
        ({"new_fingerprint": "c"}, "new_fingerprint must be that of the model it was fitted to, 'b', got 'c'$"),
        ({"old_fingerprint": "b", "new_fingerprint": "a"}, "'a', got 'b'; old and new model are exchanged"),
        ({"new_fingerprint": "a"}, "'b', got 'a'; old and new model are exchanged"),
    ):
        with pytest.raises(ValueError, match=message):
            QueryBlend.load(path, **names)
    assert again.offset.equal(blend.offset)
    fitted()[0].save(path)  # to rows without fingerprints
    with pytest.raises(ValueError, match="old_fingerprint must be that of the model it was fitted to, None, got 'a'"):
        QueryBlend.load(path, old_fingerprint="a")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_onnx_form_gives_the_same_queries(tmp_path, share):
    reference_evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    pytest.importorskip("onnxscript")
    labels, old, new = in_a_cone()
    blend = QueryBlend().fit(old, new, labels)
    blend.share = share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter calls what torch has deprecated
        blend.export(tmp_path / "blend.onnx")
    served = reference_evaluator(str(tmp_path / "blend.onnx"))
    for rows in (1, 30):
        found = served.run(["query"], {"old_query": old[:rows].numpy(), "new_query": new[:rows].numpy()})[0]
        np.testing.assert_allclose(found, blend.query_rows(old[:rows], new[:rows]), atol=1e-4)
    with pytest.raises(ValueError, match=r"path must be an \.onnx file"):
        blend.export(tmp_path / "blend.npz")


def test_files_of_before_there_was_an_offset(tmp_path):
    blend, path = fitted(0.3)[0], tmp_path / "blend.safetensors"
    numbers = torch.tensor([blend.share, blend._agreement], dtype=torch.float64)
    tensors = {"rotation": blend.rotation, "share_and_agreement": numbers}
    save_tensors(path, tensors, {"format": "pml_compat.QueryBlend/1", "direction": "new to old"})
    assert QueryBlend.load(path).query_rows(SOME8, SOME8).equal(blend.query_rows(SOME8, SOME8))
    found = NumpyQueryBlend(path)(SOME8.numpy(), SOME8.numpy())
    np.testing.assert_allclose(found, blend.query_rows(SOME8, SOME8), atol=1e-6)


def test_files_that_hold_no_blend(tmp_path):
    path = tmp_path / "blend.safetensors"
    with pytest.raises(FileNotFoundError):
        QueryBlend.load(path)
    fitted()[0].save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        QueryBlend.load(path)
    OrthogonalTransformation(2, 2).save(path)
    with pytest.raises(ValueError, match=r"path must be a file written by QueryBlend\.save"):
        QueryBlend.load(path)
    save_tensors(path, {"rotation": torch.eye(2)}, {"format": "pml_compat.QueryBlend/1"})
    with pytest.raises(ValueError, match=r"path must be a file written by QueryBlend\.save"):
        QueryBlend.load(path)


def test_not_fitted(tmp_path):
    assert repr(QueryBlend()) == "QueryBlend(not fitted)"
    for call in (
        lambda: QueryBlend().query_rows(torch.eye(2), torch.eye(2)),
        lambda: QueryBlend().save(tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match=r"QueryBlend must be fitted first: call \.fit\(old, new, labels\)"):
            call()
    assert repr(fitted(0.5, widths=(8, 5))[0]) == "QueryBlend(new_features=5, old_features=8, share=0.5)"


SOME = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
SOME8 = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SOME, SOME[1:]), "new must have the items of old, row by row: expected 12 rows, got 11"),
        ((SOME[:1], SOME[:1]), "old must have two rows or more to fit to, got 1"),
        ((SOME.clone().index_fill_(0, torch.tensor(4), torch.nan), SOME), "old must be finite, row 4 has a NaN"),
        (
            (SOME, SOME.clone().index_fill_(0, torch.tensor(5), torch.inf)),
            "new must be finite, row 5 has a NaN or an inf",
        ),
        ((SOME, SOME.long()), "new must be floating point, got torch.int64"),
        ((SOME[:, 0], SOME), r"old must be 2-dimensional, \(N, D\), got shape \(12,\)"),
        ((SOME.tolist(), SOME), "old must be a torch.Tensor or a numpy.ndarray, got list"),
        ((SOME, SOME, torch.arange(11)), "labels must have one entry a row: expected 12, got 11"),
        ((SOME, SOME, SOME[:, 0]), "labels must be integers, got torch.float32"),
        (
            (SOME, SOME, torch.zeros(12, dtype=torch.long)),
            "labels must have two classes .* got 1 classes of at most 12",
        ),
        ((SOME, SOME, torch.arange(12)), "two items of one, got 12 classes of at most 1 items"),
    ],
)
def test_bad_fits(arguments, message):
    with pytest.raises(ValueError, match=message):
        QueryBlend().fit(*arguments)


def test_the_fewest_rows():
    assert QueryBlend().fit(SOME[:2], SOME[:2]).rotation.shape == (3, 3)
    assert QueryBlend().fit(SOME[:3], SOME[:3], torch.tensor([0, 0, 1])).rotation.shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 5), torch.ones(2, 5)), "old_query must be 8 wide, got width 5"),
        ((torch.ones(2, 8), torch.ones(2, 8)), "new_query must be 5 wide, got width 8"),
        ((torch.ones(2, 8), torch.ones(3, 5)), "new_query must have the queries of old_query, 2, got 3"),
        ((torch.ones(8), torch.ones(1, 5)), r"old_query must be 2-dimensional, \(N, D\), got shape \(8,\)"),
    ],
)
def test_bad_queries(arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted(widths=(8, 5), n=60)[0].query_rows(*arguments)


def naive_alignability(old, new):
    old, new = ([reference.unit(row) for row in rows.double().numpy()] for rows in (old, new))
    places = range(len(old))
    squares = [(old[i] @ old[j] - new[i] @ new[j]) ** 2 for i in places for j in places if i != j]
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize("widths", WIDTHS)
def test_alignability_follows_the_formula_and_is_symmetric(widths):
    _, old, new = items(n=40, widths=widths)
    assert alignability(old, new) == pytest.approx(naive_alignability(old, new), rel=1e-5)
    assert alignability(new, old) == pytest.approx(alignability(old, new), rel=1e-6)
    assert alignability(old.numpy(), FrozenEmbeddings.from_array(new)) == alignability(old, new)


def test_alignability_by_hand():
    same, apart = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert alignability(apart, same) == pytest.approx(1.0)
    assert alignability(apart, -same) == pytest.approx(1.0)
    assert alignability(same, same * torch.tensor([[1.0], [-1.0]])) == pytest.approx(2.0)
    one_pair = torch.tensor([[2.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # of three pairs
    assert alignability(torch.eye(3), one_pair) == pytest.approx(math.sqrt(1 / 3))
    assert alignability(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), apart) == 0  # an item and itself do not count


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 3.0])
def test_alignability_bounds_the_error_of_the_best_rotation(noise):
    """With Gram matrices G and H of rank D, min_R |UR - V|^2 <= |G - H|_* <= sqrt(2 D) |G - H|_F."""
    _, old, _ = items(n=80, widths=(6, 6))
    generator = torch.Generator().manual_seed(1)
    turned = old @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    turned = turned + noise * torch.randn(80, 6, generator=generator)
    u, v = (normalize(rows.double()).numpy() for rows in (turned, old))
    residual = ((u @ reference.procrustes(u, v) - v) ** 2).sum(1).mean()
    found = alignability(old, turned)
    assert residual <= math.sqrt(12) * found + 1e-6
    assert (found < 1e-6) == (residual < 1e-6) == (noise == 0)


def test_alignability_of_a_sample():
    _, old, new = items()
    some = torch.randperm(len(old), generator=torch.Generator().manual_seed(5))[:20]
    found = alignability(old, new, max_rows=20, seed=5)
    assert found == pytest.approx(naive_alignability(old[some], new[some]), rel=1e-5)
    assert found != pytest.approx(alignability(old, new), rel=1e-3)


def test_bad_alignability():
    with pytest.raises(ValueError, match="old and new must have the same two items or more, got 12 and 11 rows"):
        alignability(SOME, SOME[1:])
    with pytest.raises(ValueError, match="old and new must have the same two items or more, got 1 and 1 rows"):
        alignability(SOME[:1], SOME[:1])
    with pytest.raises(ValueError, match="new must be finite, row 2 has a NaN"):
        alignability(SOME, SOME.clone().index_fill_(0, torch.tensor(2), torch.nan))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_numpy_blends_one_query_as_it_blends_many(tmp_path, share):
    blend = QueryBlend()
    blend.rotation, blend.offset, blend.share, blend._agreement = torch.eye(8), torch.ones(8) / 9, share, 1.0
    blend.old_fingerprint = blend.new_fingerprint = None
    blend.save(tmp_path / "blend.safetensors")
    server = NumpyQueryBlend(tmp_path / "blend.safetensors")
    old = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    new = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    new[1], new[2], old[3] = 3 * old[1], -old[2], 0  # the same, opposite, nothing
    many = server(old, new)
    blend._known_to_fit = True
    expected = blend.query_rows(torch.from_numpy(old), torch.from_numpy(new))
    np.testing.assert_allclose(np.delete(many, 3, 0), np.delete(expected.numpy(), 3, 0), atol=1e-5)
    for row in range(6):
        for one in (server(old[row], new[row]), server(old[row : row + 1], new[row : row + 1])[0]):
            assert one.shape == (8,) and one.dtype == many.dtype
            np.testing.assert_allclose(one, many[row], atol=1e-6)
