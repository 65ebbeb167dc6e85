"""Where queries of a class should stand, and what is promised to them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.frozen import ClassCenters
from pml_compat.frozen import class_directions as module
from pml_compat.frozen.class_directions import class_directions, fit_directions, fitting_scale, found_by
from pml_compat.frozen.prototypes import refine_prototypes
from tests import reference

SHARES, POWERS = (0.0, 0.5, 1.0), (0.0, 0.1, 0.2)


def random_rows(seed=0, n=30, classes=4, width=5, dtype=torch.float64):
    """Return unit rows that have nothing to do with their classes, and these."""
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)
    return rows, torch.randint(classes, (n,), generator=generator)


def means_of(rows, classes, count):
    return normalize(rows.new_zeros(count, rows.shape[1]).index_add_(0, classes, rows), dim=1)


def hidden_classes(seed=0, n=120, classes=4):
    """Return rows whose class is plain, but small beside what they have in common and what is not of the class.

    Their means lie close together, and a query there ranks by what is not of the class.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    own = 0.15 * (torch.eye(classes) - 1 / classes)[labels]
    return normalize(torch.cat([torch.ones(n, 1), torch.randn(n, 3, generator=generator), own], 1), dim=1), labels


def distinct_classes(seed=0, n=60, classes=5, noise=0.1, width=8):
    """Return rows that lie around one direction a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return normalize(torch.eye(classes, width)[labels] + noise * torch.randn(n, width, generator=generator)), labels


@pytest.fixture
def few_steps(monkeypatch):
    """What a fit is given, and not how far it gets, is then what a test is about."""
    monkeypatch.setattr(module, "_STEPS", 20)


def as_pair(found):
    return found.precision_at_1, found.mean_average_precision


# Rankings.


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("held", [2**22, 70])  # scores: all rows at once, two at a time
def test_found_by_matches_naive_rankings(seed, held, monkeypatch):
    monkeypatch.setattr(module, "_SCORES", held)
    gallery, classes = random_rows(seed, classes=9)  # some classes have a row alone: nothing to find
    queries, _ = random_rows(seed + 10)
    found = found_by(queries, classes, gallery, classes)
    expected = reference.found_by(queries.numpy(), classes.tolist(), gallery.numpy(), classes.tolist())
    assert as_pair(found) == pytest.approx(expected, rel=1e-6)


def test_found_by_takes_queries_of_another_class_than_their_own_row():
    gallery, classes = random_rows()
    asked = classes.roll(1)
    found = found_by(gallery.roll(1, 0), asked, gallery, classes)
    expected = reference.found_by(gallery.roll(1, 0).numpy(), asked.tolist(), gallery.numpy(), classes.tolist())
    assert as_pair(found) == pytest.approx(expected, rel=1e-6)


def test_found_by_leaves_the_own_row_out():
    """Each row is nearest to itself and next to one of the other class: nothing is found first."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    classes = torch.tensor([0, 1, 0, 1])
    found = found_by(gallery, classes, normalize(gallery, dim=1), classes)
    assert found.precision_at_1 == 0 and found.mean_average_precision == pytest.approx((1 / 2 + 1 / 3) / 2, abs=0.1)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_found_by_with_nothing_to_find_is_0(n):
    rows = torch.eye(3)[:n]
    assert as_pair(found_by(rows, torch.arange(n), rows, torch.arange(n))) == (0.0, 0.0)


# Directions.


def test_directions_find_what_means_do_not():
    rows, labels = hidden_classes()
    centers = ClassCenters.from_embeddings(rows, labels)
    prospects = centers.prospects
    assert prospects.at_means.precision_at_1 < 0.4 and prospects.old.precision_at_1 < 0.4
    assert prospects.at_directions.precision_at_1 > 0.9 and prospects.near_directions.precision_at_1 > 0.9
    assert prospects.fitted_share > 0
    others, _ = hidden_classes(seed=1)  # none of which was seen
    by_directions, by_means = (
        found_by(queries[labels], labels, others, labels) for queries in (centers.directions, centers.centers)
    )
    assert by_directions.precision_at_1 > 0.9 > 0.5 > by_means.precision_at_1
    assert by_directions.mean_average_precision > 2 * by_means.mean_average_precision - 0.1


def test_means_stay_where_nothing_is_better():
    rows, labels = random_rows(n=60, dtype=torch.float32)
    means = means_of(rows, labels, 4)
    directions, flat, prospects = class_directions(rows, labels, means)
    stayed = prospects.fitted_share == prospects.whitening == 0
    assert (flat is None) == (prospects.whitening == 0)
    assert stayed == torch.allclose(directions, means, atol=1e-5)
    rows, labels = distinct_classes(noise=0.01)
    directions, _, prospects = class_directions(rows, labels, means_of(rows, labels, 5))
    assert prospects.at_means == prospects.at_directions  # all of it
    assert as_pair(prospects.at_means) == pytest.approx((1.0, 1.0))


def naive_whitening(rows, power):
    """The power of the second moments, 1 at the largest of them, no moment below a thousandth of their mean."""
    rows = rows.double().numpy()
    moments, axes = np.linalg.eigh(sum(np.outer(row, row) for row in rows) / len(rows))
    moments = np.maximum(moments, 1e-3 * moments.mean()) / moments.max()
    return torch.tensor(sum(m**-power * np.outer(axis, axis) for m, axis in zip(moments, axes.T, strict=True)))


def naive_less_in_common(directions):
    """What directions have in common is at most half as long as what they differ by, root mean square."""
    rows = [reference.unit(row) for row in directions.numpy()]
    common = sum(rows) / len(rows)
    rest = np.sqrt(np.mean([np.sum((row - common) ** 2) for row in rows]))
    kept = min(1.0, 0.5 * rest / np.linalg.norm(common))
    return torch.tensor(np.stack([reference.unit(row - (1 - kept) * common) for row in rows]))


@pytest.mark.parametrize("make", [hidden_classes, distinct_classes])
def test_directions_lie_on_the_way_from_means_to_what_is_fitted_and_are_whitened(make, few_steps):
    rows, labels = make()
    means = means_of(rows, labels, int(labels.max()) + 1)
    directions, flat, prospects = class_directions(rows, labels, means)
    assert prospects.fitted_share in SHARES and prospects.whitening in POWERS
    generator = torch.Generator().manual_seed(0)  # drawn from, in this order, by both fits
    order = torch.randperm(len(rows), generator=generator)
    half = order[: len(rows) // 2]
    fit_directions(rows[half], labels[half], means, generator)
    fitted = fit_directions(rows, labels, means, generator)
    mixed = prospects.fitted_share * fitted + (1 - prospects.fitted_share) * means
    power = prospects.whitening
    expected = naive_less_in_common(mixed.double() @ naive_whitening(rows, power))
    torch.testing.assert_close(directions, expected.float(), rtol=0, atol=1e-4)
    if flat is None:
        assert power == 0
    else:
        torch.testing.assert_close(flat, naive_whitening(rows, power / 2).float(), rtol=0, atol=1e-4)


def test_directions_are_whitened_where_that_finds_more(few_steps, monkeypatch):
    """Where all rows are alike in one direction, which tells no class from another, and not where all is found."""
    rows, labels = hidden_classes()
    _, _, prospects = class_directions(rows, labels, means_of(rows, labels, 4))
    easy, easy_labels = distinct_classes(noise=0.01)
    assert class_directions(easy, easy_labels, means_of(easy, easy_labels, 5))[2].whitening == 0
    monkeypatch.setattr(module, "_POWERS", (0.0,))
    _, _, plain = class_directions(rows, labels, means_of(rows, labels, 4))
    assert prospects.whitening > 0 == plain.whitening
    assert sum(as_pair(prospects.near_directions)) > sum(as_pair(plain.near_directions))


def ranking_error(directions, rows, labels):
    """The objective of the fit where queries do not miss, one row at a time."""
    found = []
    for label, direction in enumerate(directions.double().numpy()):
        scores = [16.0 * float(direction @ row) for row in rows.double().numpy()]
        others = [score for score, y in zip(scores, labels.tolist(), strict=True) if y != label]
        own = [score for score, y in zip(scores, labels.tolist(), strict=True) if y == label]
        found.append(np.mean([np.log1p(sum(np.exp(other - score) for other in others)) for score in own]))
    return np.mean(found)


@pytest.mark.parametrize("make", [hidden_classes, distinct_classes])
def test_a_fit_lowers_its_error_and_gives_unit_rows(make):
    rows, labels = make(n=30)
    means = means_of(rows, labels, int(labels.max()) + 1)
    before = means.clone()
    fitted = fit_directions(rows, labels, means, torch.Generator().manual_seed(0))
    assert ranking_error(fitted, rows, labels) < 0.9 * ranking_error(means, rows, labels)
    torch.testing.assert_close(fitted.norm(dim=1), torch.ones(len(means)))
    assert means.equal(before) and not means.requires_grad and not fitted.requires_grad


def test_more_rows_and_classes_than_a_step_takes(monkeypatch):
    monkeypatch.setattr(module, "_GALLERY_ROWS", 30)
    monkeypatch.setattr(module, "_QUERIES", 6)
    rows, labels = distinct_classes(noise=0.3)
    means = means_of(rows, labels, 5)
    fitted = fit_directions(rows, labels, means, torch.Generator().manual_seed(0))
    assert ranking_error(fitted, rows, labels) < ranking_error(means, rows, labels)


def in_a_cone(rows, spread=0.1):
    """Return rows of another spread about their mean: a row of what they have in common is put before each."""
    return normalize(torch.cat([torch.ones(len(rows), 1), spread * rows], 1), dim=1)


@pytest.mark.parametrize("spread", [0.1, 0.03])
def test_directions_find_as_much_where_all_rows_lie_close_together(spread):
    """What ranks rows is how they differ, and not how little."""
    rows, labels = distinct_classes(n=120, noise=0.2)
    rows = torch.cat([rows, 2 * torch.randn(120, 2, generator=torch.Generator().manual_seed(1))], 1)
    rows = normalize(rows - rows.mean(0), dim=1)  # the two columns at the end say nothing of the class
    close = in_a_cone(rows, spread)
    found, found_close = (
        found_by(fitted[labels], labels, given, labels)
        for given in (rows, close)
        for fitted in [fit_directions(given, labels, means_of(given, labels, 5), torch.Generator().manual_seed(0))]
    )
    assert found.mean_average_precision > 0.9
    assert found_close.mean_average_precision > found.mean_average_precision


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_directions_keep_little_of_what_all_have_in_common(share):
    """However close together the old embeddings lie: a new model has to keep classes apart."""
    close = in_a_cone(distinct_classes(n=120)[0], 0.1)
    means = means_of(close, distinct_classes(n=120)[1], 5)
    fitted = normalize(means + 0.1 * torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    found = module._mixed(fitted, means, share, torch.eye(9))
    common = found.mean(0)
    rest = (found - common).norm(dim=1).square().mean().sqrt()
    assert means.mean(0).norm() > 9 * (means - means.mean(0)).norm(dim=1).max()
    assert 0.3 < common.norm() / rest < 0.7  # a half before rows are made as long as each other again
    apart = normalize(torch.eye(4) - 0.2, dim=1)
    torch.testing.assert_close(module._mixed(apart, apart, 0.0, torch.eye(4)), apart)  # nothing to take off


# Edges.

EDGES = {
    "one class": (torch.eye(4), torch.zeros(4, dtype=torch.long), 1),
    "one row a class": (torch.eye(4), torch.arange(4), 4),
    "two rows": (torch.eye(4)[:2], torch.arange(2), 2),
    "two rows of one class": (torch.eye(4)[:2], torch.zeros(2, dtype=torch.long), 1),
    "one row": (torch.eye(4)[:1], torch.zeros(1, dtype=torch.long), 1),
    "no rows": (torch.eye(4)[:0], torch.zeros(0, dtype=torch.long), 2),
    "rows of length 0": (torch.zeros(6, 4), torch.arange(6) % 2, 2),
    "rows alike": (torch.eye(4)[:1].repeat(6, 1), torch.arange(6) % 2, 2),
    "a class without rows": (torch.eye(4).repeat(2, 1), torch.arange(8) % 2, 3),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_give_unit_rows_and_finite_prospects(name, few_steps):
    rows, classes, count = EDGES[name]
    means = normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    directions, flat, prospects = class_directions(rows, classes, means)
    assert directions.shape == means.shape and directions.dtype == means.dtype
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(count))
    for found in (prospects.old, prospects.at_means, prospects.at_directions, prospects.near_directions):
        assert all(0 <= value <= 1 for value in as_pair(found))
    assert prospects.fitted_share in SHARES and (flat is None) == (prospects.whitening == 0)
    if count == 1:
        torch.testing.assert_close(directions, means)


@pytest.mark.parametrize("name", [name for name in EDGES if name not in ("no rows", "rows of length 0")])
def test_centres_of_few_embeddings_have_directions(name, few_steps):
    rows, labels, _ = EDGES[name]
    centers = ClassCenters.from_embeddings(rows * 3, labels)
    assert centers.is_measured and centers.directions.shape == centers.centers.shape
    torch.testing.assert_close(centers.directions.norm(dim=1), torch.ones(len(centers)))
    assert centers.scale is None or centers.scale > 0
    assert str(centers.summary()).splitlines()[-1].startswith("  queries near their direction")


@pytest.mark.parametrize("make", [random_rows, hidden_classes, distinct_classes])
@pytest.mark.parametrize("seed", [0, 1])
def test_prospects_are_shares(make, seed, few_steps):
    rows, labels = make(seed)
    prospects = class_directions(rows.float(), labels, means_of(rows.float(), labels, int(labels.max()) + 1))[2]
    for found in (prospects.old, prospects.at_means, prospects.at_directions, prospects.near_directions):
        assert all(0 <= value <= 1 for value in as_pair(found))


# What they depend on.


def test_the_same_rows_give_the_same_directions_and_torchs_generator_is_not_touched(few_steps):
    rows, labels = hidden_classes()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ClassCenters.from_embeddings(rows, labels)
    first.directions  # noqa: B018 (fits them)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(6)
    second = ClassCenters.from_embeddings(rows, labels)
    assert second.directions.equal(first.directions)
    assert second.prospects == first.prospects and second.scale == first.scale
    assert first.directions is first.directions  # fitted once


def test_neither_batches_nor_lengths_nor_the_names_of_labels_count(few_steps):
    rows, labels = hidden_classes(n=80)
    expected = ClassCenters.from_embeddings(rows, labels)
    in_batches = ClassCenters.from_batches(list(zip(rows.split(7), labels.split(7), strict=True)))
    torch.testing.assert_close(in_batches.directions, expected.directions, rtol=0, atol=1e-4)
    longer = ClassCenters.from_embeddings(rows * torch.linspace(0.5, 3, 80)[:, None], labels)
    torch.testing.assert_close(longer.directions, expected.directions, rtol=0, atol=1e-3)
    renamed = ClassCenters.from_embeddings(rows, 7 * labels + 3)
    torch.testing.assert_close(renamed.directions, expected.directions, rtol=0, atol=1e-4)


def test_rows_in_another_order_give_directions_that_find_as_much():
    """Other rows are drawn then, so that the directions are others; no more is promised."""
    rows, labels = hidden_classes()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    found = [ClassCenters.from_embeddings(rows[o], labels[o]) for o in (slice(None), order)]
    seen = [found_by(centers.directions[labels], labels, rows, labels) for centers in found]
    assert seen[0].precision_at_1 == pytest.approx(seen[1].precision_at_1, abs=0.05)
    assert seen[0].mean_average_precision == pytest.approx(seen[1].mean_average_precision, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_directions_have_the_dtype_of_the_centres(dtype, few_steps):
    rows, labels = hidden_classes(n=40)
    centers = ClassCenters.from_embeddings(rows.to(dtype), labels)
    assert centers.directions.dtype == centers.centers.dtype == torch.promote_types(dtype, torch.float32)


def test_directions_are_fitted_without_gradients_too(few_steps):
    rows, labels = hidden_classes(n=40)
    expected = ClassCenters.from_embeddings(rows, labels).directions
    with torch.no_grad():
        found = ClassCenters.from_embeddings(rows, labels).directions
    assert found.equal(expected) and not found.requires_grad
    attached = ClassCenters.from_embeddings(rows.clone().requires_grad_(), labels).directions
    assert attached.equal(expected) and not attached.requires_grad


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_directions_are_the_same_wherever_they_are_first_asked_for(context, few_steps):
    rows, labels = hidden_classes(n=40)
    expected = ClassCenters.from_embeddings(rows, labels).directions
    centers = ClassCenters.from_embeddings(rows, labels)
    with context():
        found = centers.directions
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_refined_prototypes_have_directions_of_the_old_embeddings():
    rows, labels = hidden_classes(n=80)
    new = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    prototypes = refine_prototypes(rows, new, labels + 5)
    assert prototypes.is_measured and prototypes.prospects.fitted_share in SHARES
    found, by_prototypes = (
        found_by(queries[labels], labels, rows, labels) for queries in (prototypes.directions, prototypes.centers)
    )
    assert found.precision_at_1 > 0.9
    assert found.mean_average_precision > by_prototypes.mean_average_precision + 0.2


def test_no_more_than_a_sample_is_kept(monkeypatch, few_steps):
    monkeypatch.setattr("pml_compat.frozen.measured_classes.SAMPLE_ROWS", 20)
    rows, labels = distinct_classes(n=200)
    centers = ClassCenters.from_batches(list(zip(rows.split(9), labels.split(9), strict=True)))
    kept, classes = centers._sample
    assert kept.shape == (20, 8) and classes.shape == (20,)
    index = [int((rows - row).norm(dim=1).argmin()) for row in kept]
    assert len(set(index)) == 20 and labels[index].equal(centers.labels[classes])
    assert index != list(range(20)) and max(index) > 150  # of all batches
    remembered = ClassCenters(centers.centers, centers.labels).remember(rows, labels)
    assert remembered._sample[0].shape == (20, 8)
    torch.testing.assert_close(remembered.directions.norm(dim=1), torch.ones(5))
    assert remembered._sample is None and remembered.prospects is not None


# The scale.


def naive_scale(rows, labels, count):
    """The scale of the smallest mean cross-entropy of the rows that the means are not of; of equal ones the first."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    half = (len(rows) + 1) // 2
    seen, judged = order[:half], order[half:]
    means = []
    for label in range(count):
        own = [rows[i].double().numpy() for i in seen.tolist() if labels[i] == label]
        means.append(reference.unit(sum(own)))
    given, targets = [rows[i].double().numpy() for i in judged.tolist()], labels[judged].tolist()
    given_rows = [row.double().numpy() for row in rows]
    center = sum(given_rows) / len(given_rows)
    spread = np.sqrt(np.mean([np.sum((row - center) ** 2) for row in given_rows]))
    scales = [scale for step in range(40) if (scale := 2 ** (step / 2)) <= 64.01 / spread]

    def error(scale):
        found = []
        for row, target in zip(given, targets, strict=True):
            logits = [scale * float(row @ mean) for mean in means]
            found.append(np.log1p(sum(np.exp(z - logits[target]) for j, z in enumerate(logits) if j != target)))
        return round(float(np.mean(found)), 6)

    return min(scales, key=error)


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_scale_is_where_the_naive_cross_entropy_is_smallest(noise, seed, few_steps):
    rows, labels = distinct_classes(seed, n=100, noise=noise)
    found = fitting_scale(rows, labels, 5)
    assert found == naive_scale(rows, labels, 5)
    assert ClassCenters.from_embeddings(rows, labels).scale == found


def test_classes_that_are_told_apart_have_a_larger_scale():
    scales = [fitting_scale(*distinct_classes(noise=noise, n=100), 5) for noise in (0.05, 0.4, 1.5)]
    assert scales == sorted(scales, reverse=True) and scales[0] > 16 and scales[2] < 8


def test_a_scale_grows_as_rows_come_closer_together():
    rows, labels = distinct_classes(noise=0.6, n=100)
    scales = [fitting_scale(in_a_cone(rows - rows.mean(0), spread), labels, 5) for spread in (1.0, 0.1, 0.01)]
    assert scales[0] < scales[1] / 5 < scales[2] / 25 and scales[2] > 64


def test_judged_rows_are_not_in_the_means(monkeypatch):
    monkeypatch.setattr(module, "_JUDGED_ROWS", 30)
    rows, labels = distinct_classes(n=100, noise=0.6)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    spoilt = rows.clone()
    spoilt[order[:30]] = -rows[order[:30]]  # the judged ones: if they had a part in the means, these would cancel
    assert fitting_scale(rows, labels, 5) > 1.0 == fitting_scale(spoilt, labels, 5)


@pytest.mark.parametrize(("n", "classes"), [(0, 2), (1, 1), (30, 1), (9, 5)])
def test_too_few_rows_to_tell_a_scale(n, classes):
    rows = normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert fitting_scale(rows, torch.arange(n) % classes, classes) is None
