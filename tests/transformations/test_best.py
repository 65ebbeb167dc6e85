import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pml_compat.frozen import FrozenEmbeddings
from pml_compat.transformations import (
    FCTTransformation,
    LinearTransformation,
    LowRankTransformation,
    NumpyTransformation,
    OrthogonalTransformation,
    ScaledOrthogonalTransformation,
    best,
    fit,
    fit_best,
    load_transformation,
)

CLOSED_FORMS = ["unchanged", "rotation", "scaled rotation", "linear", "linear, rank 3", "linear, rank 1"]
NAMES = [*CLOSED_FORMS, "residual bottleneck", "FCT"]


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    monkeypatch.setattr(fit, "_STEPS", 20)
    monkeypatch.setattr(fit, "_FEWEST_EPOCHS", 4)


@pytest.fixture
def closed_forms(monkeypatch):
    every = best.candidates
    monkeypatch.setattr(best, "candidates", lambda *w: {k: v for k, v in every(*w).items() if k in CLOSED_FORMS})


def rows(n=200, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def turn(seed=0):
    return torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed + 100)))[0]


def means(target, mapped, labels):
    return tuple(float(scores.mean()) for scores in best.retrieval(target, mapped, labels))


def naive(target, mapped, labels):
    """Return P@1 and mAP by a loop over queries and items; of items that tie for the first place each has its share."""
    first, average = [], []
    for i in range(len(target)):
        items = [j for j in range(len(mapped)) if labels is None or j != i]
        right = np.array([j == i if labels is None else labels[j] == labels[i] for j in items], dtype=bool)
        if not right.any():
            continue
        cosines = np.array(
            [np.dot(target[i], mapped[j]) / np.linalg.norm(target[i]) / np.linalg.norm(mapped[j]) for j in items]
        )
        cosines = cosines.round(6)
        first.append(right[cosines == cosines.max()].mean())
        average.append(average_precision_score(right, cosines))
    return np.mean(first), np.mean(average)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classes", [None, 3, 20])
def test_scores_match_a_loop(seed, classes):
    generator = np.random.default_rng(seed)
    target, mapped = generator.normal(size=(2, 40, 3))
    mapped[10:20] = mapped[:10]  # copies, of other classes too
    mapped[20] = mapped[5]
    labels = None if classes is None else generator.integers(classes, size=40)
    found = means(*(torch.tensor(a) for a in (target, mapped)), None if labels is None else torch.tensor(labels))
    np.testing.assert_allclose(found, naive(target, mapped, labels), atol=1e-12)


def test_scores_by_hand():
    target = torch.eye(3)
    # item 0 is found; 1 stands second; 2 shares the first place with 0 and 1
    mapped = torch.tensor([[1.0, 0.6, 0.5], [0.5, 0.5, 0.5], [0.0, 0.0, 0.5]])
    first, average = means(target, mapped[[0, 1, 1]], None)
    assert means(target, target, None) == (1.0, 1.0)
    # query 0: item 0. query 1: two of three tie for the first place. query 2: the same two
    assert first == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert average == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_a_map_to_one_point_finds_nothing():
    found = means(rows(50), torch.ones(50, 6), None)
    assert found == pytest.approx((0.02, 0.02))


@pytest.mark.parametrize("labels", [torch.zeros(50, dtype=torch.long), torch.arange(50)])
def test_classes_that_tell_nothing_do_not_count(labels):
    assert means(rows(50), rows(50, 1), labels) == means(rows(50), rows(50, 1), None)


def scores(precision, average):
    return torch.tensor(precision), torch.full((len(precision),), average)


def test_the_rule_of_the_choice():
    right, most, half = [1.0] * 16, [1.0] * 14 + [0.0] * 2, [1.0, 0.0] * 8
    # two queries of 16 less: 2 / 16 by a standard error of sqrt(14 / 8 / 15) / 4 = 0.085; eight less: 0.5 by 0.129
    assert best.choose({"a": scores(right, 0.5), "b": scores(most, 0.6), "c": scores(half, 0.9)}) == "b"
    assert best.choose({"a": scores(right, 0.6), "b": scores(most, 0.5)}) == "a"
    assert best.choose({"a": scores(most, 0.5), "b": scores(most, 0.5)}) == "a"
    assert best.choose({"c": scores(half, 0.9), "a": scores(right, 0.1)}) == "a"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x, LinearTransformation),
        (lambda x: x @ turn(), OrthogonalTransformation),
        (lambda x: x @ turn() * torch.tensor([3.0, 3, 3, 1, 1, 1]), ScaledOrthogonalTransformation),
        (lambda x: x @ torch.diag(torch.arange(1.0, 7)) @ turn() + 2, LinearTransformation),
    ],
)
def test_the_map_that_made_the_rows_is_found(make, kind):
    """And after it, as it finds everything, no other is tried."""
    found = fit_best(rows(), make(rows()), progress=False)
    assert type(found) is kind
    perfect = [each["mean_average_precision"] == 1 for each in found.tried.values()]
    assert perfect == [False] * (len(perfect) - 1) + [True]


def test_a_low_rank_is_found_where_one_direction_is_all_that_is_shared(monkeypatch):
    every = best.candidates
    monkeypatch.setattr(best, "candidates", lambda *w: {k: v for k, v in every(*w).items() if k.startswith("linear")})
    labels = torch.arange(200) % 2
    shared = torch.nn.functional.pad(2.0 * labels[:, None] - 1, (0, 5))
    found = fit_best(rows() + shared, (rows(seed=1) + 4 * shared) @ turn(), labels, progress=False)
    assert type(found) is LowRankTransformation and found.rank == 1


@pytest.mark.parametrize("labelled", [False, True])
def test_everything_is_tried_and_the_best_is_returned(labelled):
    labels = torch.arange(200) % 4
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    source = centers[labels] + rows()
    found = fit_best(source, source.abs() @ turn(), labels if labelled else None, progress=False)
    assert list(found.tried) == NAMES and not found.training
    chosen = found.tried.best
    arrays = {"source": source, "target": source.abs() @ turn()}
    expected = best.fitted(chosen, best.candidates(6, 6, None), arrays, 0)
    torch.testing.assert_close(found(source), expected(source))


def test_without_the_trained_maps_the_others_are_judged_alike():
    source, labels = rows(), torch.arange(200) % 4
    found = fit_best(source, source.abs() @ turn(), labels, side_info=source, trained=False, progress=False)
    every = fit_best(source, source.abs() @ turn(), labels, progress=False)
    assert list(found.tried) == CLOSED_FORMS and found.tried.best in CLOSED_FORMS
    for name in CLOSED_FORMS:
        assert {**found.tried[name], "seconds": 0} == {**every.tried[name], "seconds": 0}


@pytest.mark.parametrize("labels", [None, torch.arange(200) % 4])
def test_queries_judge_and_nothing_is_fitted_to_them(closed_forms, labels):
    source, target, queries = rows(), rows(seed=1), rows(seed=2)
    found = fit_best(source, target, labels, queries=queries, progress=False, seed=3)
    training, judged = best.hold_out(200, labels, torch.Generator().manual_seed(3))
    mapped = LinearTransformation(6, 6).fit(source[training], target[training])(source[judged])
    expected = means(queries[judged], mapped.detach(), None if labels is None else labels[judged])
    assert (found.tried["linear"]["precision_at_1"], found.tried["linear"]["mean_average_precision"]) == expected
    assert expected != means(target[judged], mapped.detach(), None if labels is None else labels[judged])
    again = fit_best(source, target, labels, queries=queries.numpy(), progress=False, seed=3)
    torch.testing.assert_close(again(source), found(source))


def test_scores_are_those_of_rows_that_no_map_has_seen(closed_forms):
    source, target = rows(), rows(seed=1)
    found = fit_best(source, target, progress=False, seed=3)
    training, judged = best.hold_out(200, None, torch.Generator().manual_seed(3))
    assert list(found.tried) == CLOSED_FORMS
    mapped = LinearTransformation(6, 6).fit(source[training], target[training])(source[judged])
    expected = means(target[judged], mapped.detach(), None)
    assert (found.tried["linear"]["precision_at_1"], found.tried["linear"]["mean_average_precision"]) == expected


def test_the_table():
    tried = fit_best(rows(), rows() @ turn(), progress=False).tried
    lines = str(tried).splitlines()
    assert len(lines) == 4
    assert lines[0] == "| map | P@1 | mAP | seconds |" and lines[3].startswith("| **rotation** | 100.0 | 100.0 | 0.")


def test_the_same_seed_gives_the_same_and_no_generator_moves():
    source, target = rows(60), rows(60).abs() @ turn()
    state = torch.get_rng_state()
    first, second = (fit_best(source, target, progress=False) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert first(source).equal(second(source))
    for name, each in first.tried.items():
        assert each["precision_at_1"] == second.tried[name]["precision_at_1"]
        assert each["mean_average_precision"] == second.tried[name]["mean_average_precision"]


@pytest.mark.parametrize("widths", [(6, 4), (4, 6), (6, 1), (1, 3)])
def test_widths_that_differ(widths):
    source, target = rows()[:, : widths[0]], (rows().abs() @ turn())[:, : widths[1]]
    assert fit_best(source, target, progress=False)(source).shape == (200, widths[1])


def test_side_information_reaches_fct():
    side = torch.randn(200, 3)
    target = torch.cat([side, side @ torch.randn(3, 3)], dim=1) + 0.1 * rows()
    found = fit_best(rows(), target, side_info=side, progress=False)
    assert isinstance(found, FCTTransformation) and found.side_features == 3
    assert found(rows(), side).shape == (200, 6)
    plain = fit_best(rows(), rows() @ turn(), side_info=side, progress=False)
    assert plain.side_features is None


@pytest.mark.parametrize("n", [1, 2, 10, 19])
@pytest.mark.parametrize("labelled", [False, True])
def test_too_few_rows_to_judge_by(n, labelled):
    labels = torch.zeros(n, dtype=torch.long) if labelled else None
    with pytest.warns(UserWarning, match=f"must have 20 rows or more to compare maps by, got {n}: the linear one is"):
        found = fit_best(rows(n), rows(n) @ turn(), labels, progress=False)
    assert type(found) is LinearTransformation and found.tried == {}
    assert torch.isfinite(found(rows(n))).all()


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        (rows(20), None),
        (rows(25), torch.zeros(25, dtype=torch.long)),
        (rows(40), torch.arange(40)),
        (rows(1).expand(60, 6), None),
        (torch.zeros(60, 6), torch.arange(60) % 3),
        (rows(30).repeat(2, 1), torch.arange(60) % 30),
    ],
    ids=["20 rows", "one class", "classes of one", "one row, copied", "zeros", "two of each"],
)
def test_poor_rows(source, labels):
    found = fit_best(source, source @ turn(), labels, progress=False)
    assert found.tried and torch.isfinite(found(source)).all()


@pytest.mark.parametrize("form", ["array", "memory map", "frozen", "float16", "float64"])
def test_stored_rows_of_every_form(form, tmp_path):
    source, target = rows(), rows() @ turn()
    expected = fit_best(source, target, progress=False)(source)
    if form == "memory map":
        np.save(tmp_path / "rows.npy", source.numpy())
        given = np.load(tmp_path / "rows.npy", mmap_mode="r")
    elif form == "frozen":
        given = FrozenEmbeddings.from_array(source.numpy())
    else:
        given = source.numpy() if form == "array" else source.to(getattr(torch, form))
    found = fit_best(given, target, progress=False)
    torch.testing.assert_close(found(source), expected, rtol=1e-2, atol=1e-2)


def test_saved_exported_and_copied(tmp_path):
    found = fit_best(rows(), rows() @ turn(), progress=False)
    found.save(tmp_path / "map.safetensors")
    found.export(tmp_path / "map.npz")
    expected = found(rows()).detach()
    torch.testing.assert_close(load_transformation(tmp_path / "map.safetensors")(rows()), expected)
    torch.testing.assert_close(torch.from_numpy(NumpyTransformation(tmp_path / "map.npz")(rows().numpy())), expected)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert copied.tried == found.tried and str(copied.tried) == str(found.tried)


def with_nan():
    broken = rows()
    broken[7, 2] = np.nan
    return broken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((rows(), rows()[1:]), r"target must have one row for each row of source: expected 200, got 199"),
        ((with_nan(), rows()), r"source must be finite, row 7 has a NaN"),
        ((rows(), with_nan()), r"target must be finite, row 7 has a NaN"),
        ((rows()[:0], rows()[:0]), r"source must not be empty"),
        ((rows()[0], rows()[0]), r"source must be 2-dimensional"),
        ((rows().long(), rows()), r"source must be floating point"),
        ((rows().tolist(), rows()), r"source must be a torch.Tensor or a numpy.ndarray, got list"),
        ((rows(), rows(), torch.arange(3)), r"labels must have one entry a row: expected 200, got 3"),
        ((rows(), rows(), torch.rand(200)), r"labels must be integers"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_best(*arguments, progress=False)


def test_side_information_of_another_length():
    with pytest.raises(ValueError, match=r"side_info must have one row for each row of source: expected 200, got 3"):
        fit_best(rows(), rows(), side_info=torch.ones(3, 2), progress=False)


def test_queries_of_another_form():
    with pytest.raises(ValueError, match=r"queries must have one row for each row of source: expected 200, got 3"):
        fit_best(rows(), rows(), queries=torch.ones(3, 6), progress=False)
    with pytest.raises(ValueError, match=r"queries must be 6 wide, got width 2"):
        fit_best(rows(), rows(), queries=torch.ones(200, 2), progress=False)
    with pytest.raises(ValueError, match=r"queries must be finite, row 7 has a NaN"):
        fit_best(rows(), rows(), queries=with_nan(), progress=False)
