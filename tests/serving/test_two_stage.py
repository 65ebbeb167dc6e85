import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.frozen import FrozenEmbeddings
from pml_compat.serving import depth_for_gain, two_stage, two_stage_accuracy
from tests import reference
from tests.pairwise import pairwise

BOTH = ("precision_at_1", "mean_average_precision")


def data(queries=13, size=40, classes=6, widths=(5, 7), seed=0, same_items=False):
    """Return queries and gallery of both models, and their labels; the last class is in the queries alone."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    gallery_labels = torch.randint(classes - 1, (size,), generator=generator)
    query_labels = torch.randint(classes, (queries,), generator=generator)
    query_labels[:2] = torch.tensor([0, classes - 1])
    if same_items:
        gallery_labels[:queries] = query_labels
    found = []
    for width, noise in zip(widths, (1.5, 0.8), strict=True):
        centers = draw(classes, width)
        found += [centers[labels] + noise * draw(len(labels), width) for labels in (query_labels, gallery_labels)]
    old, old_gallery, new, new_gallery = found
    if same_items:
        old_gallery[:queries], new_gallery[:queries] = old, new
    numbers = torch.arange(classes) * 3 + 2**40  # sparse and large
    return old, new, old_gallery, new_gallery, numbers[query_labels], numbers[gallery_labels]


def named(*values):
    return dict(zip((*BOTH, "embedded"), values, strict=True))


def naive(old_queries, new_queries, old_gallery, new_gallery, query_labels, gallery_labels, depth, same_items):
    rows = (old_queries, new_queries, old_gallery, new_gallery)
    old_queries, new_queries, old_gallery, new_gallery = (
        [reference.unit(row) for row in part.double().numpy()] for part in rows
    )
    first, average, embedded = [], [], set()
    for i, wanted in enumerate(query_labels.tolist()):
        order = np.argsort([-float(old_queries[i] @ row) for row in old_gallery]).tolist()
        if same_items:
            order.remove(i)
        candidates, rest = order[:depth], order[depth:]
        embedded.update(candidates)
        candidates.sort(key=lambda j: -float(new_queries[i] @ new_gallery[j]))
        hits = [gallery_labels[j].item() == wanted for j in [*candidates, *rest]]
        if not any(hits):
            continue
        first.append(float(hits[0]))
        precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        average.append(sum(precisions) / len(precisions))
    return named(sum(first) / len(first), sum(average) / len(average), len(embedded) / len(old_gallery))


@pairwise
@pytest.mark.parametrize("same_items", [False, True])
@pytest.mark.parametrize("widths", [(5, 7), (6, 6), (8, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_sorts_of_each_query(seed, widths, same_items):
    given, depths = data(seed=seed, widths=widths, same_items=same_items), [1, 3, 10, 39, 40, 500]
    found = two_stage_accuracy(*given, depth=depths, same_items=same_items)
    assert list(found) == depths
    for depth in depths:
        assert found[depth] == pytest.approx(naive(*given, depth, same_items), rel=1e-6), depth
        assert two_stage_accuracy(*given, depth=depth, same_items=same_items) == {depth: found[depth]}


def measured(queries, query_labels, gallery, gallery_labels, same_items):
    calculator = CrossModelAccuracyCalculator(include=BOTH)
    rows = normalize(queries), query_labels, normalize(gallery), gallery_labels
    return calculator.get_accuracy(*rows, ref_includes_query=same_items)


@pytest.mark.parametrize("same_items", [False, True])
def test_the_shallowest_is_the_old_gallery_and_the_deepest_the_new_one(same_items):
    given = old, new, old_gallery, new_gallery, query_labels, gallery_labels = data(60, 300, same_items=same_items)
    found = two_stage_accuracy(*given, depth=(1, 300), same_items=same_items)
    before = measured(old, query_labels, old_gallery, gallery_labels, same_items)
    after = measured(new, query_labels, new_gallery, gallery_labels, same_items)
    assert {name: found[1][name] for name in BOTH} == pytest.approx(before)
    assert {name: found[300][name] for name in BOTH} == pytest.approx(after)
    assert before["precision_at_1"] != after["precision_at_1"] and found[300]["embedded"] == 1


def test_by_hand():
    degrees = lambda *angles: torch.tensor([[np.cos(a), np.sin(a)] for a in np.radians(angles)])  # noqa: E731
    old_gallery = degrees(10, 20, 30, 40, 190)  # places 1 to 5 of the first stage
    new_gallery = degrees(50, 5, 60, 1, 0)  # of these, the candidates at depth 3 stand in the order 2, 1, 3
    labels = torch.tensor([7, 8, 7, 8, 7])
    given = degrees(0), degrees(0), old_gallery, new_gallery, labels[:1], labels
    found = two_stage_accuracy(*given, depth=[1, 3, 5])
    # By class: 7 8 7 8 7, then 8 7 7 8 7, then 7 8 8 7 7.
    assert found[1] == pytest.approx(named(1.0, (1 + 2 / 3 + 3 / 5) / 3, 0.2))
    assert found[3] == pytest.approx(named(0.0, (1 / 2 + 2 / 3 + 3 / 5) / 3, 0.6))
    assert found[5] == pytest.approx(named(1.0, (1 + 2 / 4 + 3 / 5) / 3, 1.0))


def test_embedded_is_what_any_query_asked_for():
    old = torch.eye(6)
    queries = old[[0, 0, 3]] + 0.1 * old[[1, 2, 4]]  # of depth 2: 0 and 1, 0 and 2, 3 and 4
    found = two_stage_accuracy(queries, queries, old, old, torch.tensor([1, 1, 5]), torch.arange(6), depth=(1, 2))
    assert found[1]["embedded"] == pytest.approx(2 / 6) and found[2]["embedded"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("same_items", [False, True])
def test_tiles_do_not_change_the_numbers(monkeypatch, same_items):
    given, depths = data(seed=4, same_items=same_items), (2, 5, 39, 60)
    whole = two_stage_accuracy(*given, depth=depths, same_items=same_items)
    for queries, rows, gathered in ((3, 7, 1), (256, 1, 100), (1, 16384, 2**23)):
        monkeypatch.setattr(two_stage, "_QUERIES", queries)
        monkeypatch.setattr(two_stage, "_GALLERY_ROWS", rows)
        monkeypatch.setattr(two_stage, "_GATHERED", gathered)
        again = two_stage_accuracy(*given, depth=depths, same_items=same_items)
        assert all(again[depth] == pytest.approx(whole[depth], rel=1e-6) for depth in depths)


def test_lengths_and_types_do_not_change_the_numbers(tmp_path):
    given = data()
    whole = two_stage_accuracy(*given, depth=5)
    rows, labels = given[:4], given[4:]
    scales = [torch.linspace(0.1, 7, len(part))[:, None] for part in rows]
    scaled = [part * scale for part, scale in zip(rows, scales, strict=True)]
    maps = []
    for number, part in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", part.numpy())
        maps.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    frozen = [FrozenEmbeddings.from_array(part) for part in rows[2:]]
    arrays = [label.numpy() for label in labels]
    for other in (
        [*scaled, *labels],
        [*maps, *arrays],
        [*rows[:2], *frozen, *labels],
        [*map(torch.Tensor.double, rows), *labels],
    ):
        assert two_stage_accuracy(*other, depth=5)[5] == pytest.approx(whole[5], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_single(dtype):
    given = data()
    half = [part.to(dtype) for part in given[:4]]
    expected = two_stage_accuracy(*(part.float() for part in half), *given[4:], depth=5)
    assert two_stage_accuracy(*half, *given[4:], depth=5) == expected


def test_candidates_alone_are_read_of_the_new_gallery():
    given = data()
    found = two_stage_accuracy(*given, depth=1)
    new_gallery = given[3].clone()
    nearest = (normalize(given[0]) @ normalize(given[2]).t()).argmax(1)
    unread = torch.ones(40, dtype=torch.bool).index_fill_(0, nearest, False)
    assert unread.any()
    new_gallery[unread] = torch.nan
    assert two_stage_accuracy(*given[:3], new_gallery, *given[4:], depth=1) == found
    new_gallery[nearest[0]] = torch.nan
    with pytest.raises(ValueError, match=f"new_gallery must be finite, row {int(nearest[0])} has a NaN"):
        two_stage_accuracy(*given[:3], new_gallery, *given[4:], depth=1)


def test_copies_keep_the_place_of_the_first_stage():
    """What the new model cannot tell apart stays in the old order."""
    old, new = torch.tensor([[1.0, 0.2], [1.0, 0.1], [1.0, 0.3]]), torch.ones(3, 2)
    found = two_stage_accuracy(
        torch.tensor([[1.0, 0.0]]), new[:1], old, new, torch.tensor([1]), torch.tensor([0, 1, 0]), depth=(1, 2, 3)
    )
    assert [found[depth]["precision_at_1"] for depth in (1, 2, 3)] == [1, 1, 1]


def test_one_metric_alone():
    given = data()
    both = two_stage_accuracy(*given, depth=(2, 5))
    for name in BOTH:
        found = two_stage_accuracy(*given, depth=(2, 5), include=[name])
        assert found == {depth: {key: both[depth][key] for key in (name, "embedded")} for depth in (2, 5)}


def test_first_places_alone_need_no_full_ranking(monkeypatch):
    def ranked(*_):
        raise AssertionError("ranked past the candidates")

    monkeypatch.setattr(two_stage, "exact_ranks", ranked)
    two_stage_accuracy(*data(), depth=5, include=("precision_at_1",))
    with pytest.raises(AssertionError, match="ranked past the candidates"):
        two_stage_accuracy(*data(), depth=5)


def test_queries_without_a_right_item():
    given = data()
    counted = given[4] != given[4].max()
    assert 0 < counted.sum() < len(counted)
    queries = [part[counted] for part in (*given[:2], given[4])]
    fewer = two_stage_accuracy(*queries[:2], *given[2:4], queries[2], given[5], depth=40)[40]
    assert two_stage_accuracy(*given, depth=40)[40] == pytest.approx(fewer)
    none = two_stage_accuracy(*given[:4], torch.zeros_like(given[4]), given[5], depth=40)[40]
    assert np.isnan([none[name] for name in BOTH]).all() and none["embedded"] == 1


def test_an_item_is_not_right_for_itself():
    """With ``same_items`` the only items of their class have nothing to find."""
    rows, labels = torch.eye(4), torch.tensor([0, 0, 1, 2])
    found = two_stage_accuracy(rows, rows, rows, rows, labels, labels, depth=3, same_items=True)
    alone = two_stage_accuracy(rows[:2], rows[:2], rows, rows, labels[:2], labels, depth=3, same_items=True)
    assert {name: found[3][name] for name in BOTH} == {name: alone[3][name] for name in BOTH}
    only = two_stage_accuracy(rows[:1], rows[:1], rows[:1], rows[:1], labels[:1], labels[:1], depth=3, same_items=True)
    assert np.isnan(only[3]["precision_at_1"]) and only[3]["embedded"] == 0


def test_no_gradient_and_no_change():
    given = data()
    leaves = [part.clone().requires_grad_() for part in given[:4]]
    assert two_stage_accuracy(*leaves, *given[4:], depth=5) == two_stage_accuracy(*given, depth=5)
    assert all(leaf.equal(part) for leaf, part in zip(leaves, given[:4], strict=True))


def test_numpy_depths():
    given = data()
    assert two_stage_accuracy(*given, depth=np.int64(5)) == two_stage_accuracy(*given, depth=5)
    assert list(two_stage_accuracy(*given, depth=np.array([5, 2]))) == [5, 2]


def changed(place, value):
    given = list(data())
    given[place] = value(given[place])
    return given


def spoilt(rows):
    return rows.clone().index_fill_(0, torch.tensor(3), torch.nan)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (data(), {"depth": 0}, "depth must be an integer of at least 1, got 0"),
        (data(), {"depth": (5, -1)}, "depth must be an integer of at least 1, got -1"),
        (data(), {"depth": (5, 2.5)}, "depth must be an integer of at least 1, got 2.5"),
        (data(), {"depth": True}, "depth must be an integer of at least 1, got True"),
        (data(), {"depth": ()}, "depth must be a number or some numbers, got none"),
        (
            data(),
            {"include": ()},
            r"include must name some of \['precision_at_1', 'mean_average_precision'\], got \[\]",
        ),
        (data(), {"include": ["r_precision"]}, r"include must name some of .* got \['r_precision'\]"),
        (data(), {"same_items": True}, "gallery_labels must begin with query_labels with same_items=True"),
        (data(50, 40), {"same_items": True}, "gallery_labels must begin with query_labels with same_items=True"),
        (changed(0, spoilt), {}, "old_queries must be finite, row 3 has a NaN"),
        (changed(1, spoilt), {}, "new_queries must be finite, row 3 has a NaN"),
        (changed(2, spoilt), {}, "old_gallery must be finite, row 3 has a NaN"),
        (changed(3, spoilt), {"depth": 40}, "new_gallery must be finite, row 3 has a NaN"),
        (
            changed(1, lambda rows: rows[1:]),
            {},
            "new_queries must have the items of old_queries, .* expected 13, got 12",
        ),
        (
            changed(3, lambda rows: rows[1:]),
            {},
            "new_gallery must have the items of old_gallery, .* expected 40, got 39",
        ),
        (changed(2, lambda rows: rows[:, 1:]), {}, "old_gallery must be 5 wide, got width 4"),
        (changed(3, lambda rows: rows[:, 1:]), {}, "new_gallery must be 7 wide, got width 6"),
        (changed(4, lambda labels: labels[1:]), {}, "query_labels must have one entry a row: expected 13, got 12"),
        (changed(5, lambda labels: labels.double()), {}, "gallery_labels must be integers, got torch.float64"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        two_stage_accuracy(*arguments, **options)


def test_a_bad_row_is_named_by_its_place_in_the_gallery(monkeypatch):
    monkeypatch.setattr(two_stage, "_GALLERY_ROWS", 2)
    with pytest.raises(ValueError, match="old_gallery must be finite, row 3 has a NaN"):
        two_stage_accuracy(*changed(2, spoilt), depth=2)


def test_depth_for_gain_by_hand():
    found = {
        200: {"precision_at_1": 0.799, "mean_average_precision": 0.5},
        10: {"precision_at_1": 0.70, "mean_average_precision": 0.5},
        50: {"precision_at_1": 0.79, "mean_average_precision": 0.6},
    }
    assert depth_for_gain(found, old=0.6, new=0.8) == 50  # from 0.79 on
    assert depth_for_gain(found, 0.6, 0.8, share=0.5) == 10
    assert depth_for_gain(found, 0.6, 0.8, share=0.99) == 200
    assert depth_for_gain(found, 0.6, 0.8, share=1.0) is None
    assert depth_for_gain(found, 0.4, 0.6, share=0.8, metric="mean_average_precision") == 50
    assert depth_for_gain({}, 0.6, 0.8) is None
