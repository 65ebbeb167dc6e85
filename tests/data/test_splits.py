"""Splits: what each protocol promises for any labels, and every leak told."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from pml_compat.data import check_no_leakage, extended_classes, extended_data, open_classes
from pml_compat.data.splits import UpgradeSplit

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
strategies = hypothesis.strategies
settings = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

seeds = strategies.integers(0, 2**32)
shares = strategies.floats(0.01, 0.99)
test_shares = strategies.floats(0.13, 0.99)  # two of 12 rows and more
LABELS = torch.tensor([3, 3, 3, 3, -1, -1, -1, -1, 7, 7, 7, 7, 2**40, 2**40, 2**40, 2**40])
MAKERS = [extended_data, extended_classes, open_classes]
PARTS = ["old_train", "new_train", "test"]


@strategies.composite
def labellings(draw, most=20):
    """Some classes of 2 rows and more, one of 12, in any order."""
    counts = [12, *draw(strategies.lists(strategies.integers(2, most), min_size=2, max_size=8))]
    names = draw(strategies.lists(strategies.integers(-(2**50), 2**50), min_size=len(counts), max_size=len(counts)))
    hypothesis.assume(len(set(names)) == len(names))
    labels = np.repeat(np.array(names), counts)
    return torch.from_numpy(np.random.default_rng(draw(seeds)).permutation(labels))


def sets(split):
    return tuple(set(getattr(split, part).tolist()) for part in PARTS)


def same(left, right):
    return all(
        torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(UpgradeSplit)
    )


def counts(labels, rows):
    """The classes, and how many of the rows are of each."""
    classes = torch.unique(labels)
    return (labels[rows][:, None] == classes).sum(0), (labels[:, None] == classes).sum(0)


def well_formed(split, labels):
    for part, classes in zip(PARTS, ["old_classes", "new_classes", "test_classes"], strict=True):
        rows = getattr(split, part)
        assert rows.dtype == torch.int64
        assert rows.device.type == "cpu"
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert getattr(split, classes).tolist() == sorted(set(labels[rows].tolist()))
    old, new, test = sets(split)
    assert old
    assert old <= new
    assert not new & test
    return old, new, test


@settings
@hypothesis.given(labellings(), shares, test_shares, seeds)
def test_extended_data_is_stratified(labels, old_share, test_share, seed):
    split = extended_data(labels, old_share=old_share, test_share=test_share, seed=seed)
    _, new, test = well_formed(split, labels)
    assert new | test == set(range(len(labels)))
    assert torch.equal(split.old_classes, torch.unique(labels))
    assert torch.equal(split.new_classes, torch.unique(labels))
    tested, rows = counts(labels, split.test)
    assert ((tested - test_share * rows).abs() < 1).all()
    learned, trained = counts(labels, split.old_train)[0], counts(labels, split.new_train)[0]
    assert ((learned - old_share * trained).abs() < 1).all()
    assert (torch.stack([tested, learned, trained]) >= 1).all()


@settings
@hypothesis.given(labellings(), shares, test_shares, seeds)
def test_extended_classes_takes_all_training_rows_of_some_classes(labels, old_classes, test_share, seed):
    split = extended_classes(labels, old_classes=old_classes, test_share=test_share, seed=seed)
    old, new, test = well_formed(split, labels)
    classes = torch.unique(labels)
    assert new | test == set(range(len(labels)))
    assert len(split.old_classes) == max(1, int(old_classes * len(classes) + 0.5))
    assert torch.equal(split.new_classes, classes)
    assert torch.equal(split.test_classes, classes)
    assert old == {row for row in new if int(labels[row]) in split.old_classes.tolist()}
    tested, rows = counts(labels, split.test)
    assert ((tested - test_share * rows).abs() < 1).all()


@settings
@hypothesis.given(labellings(), strategies.data(), seeds)
def test_open_classes_tests_on_whole_classes_of_nobody(labels, data, seed):
    n = len(torch.unique(labels))
    new_count = data.draw(strategies.integers(1, n - 1))
    old_count = data.draw(strategies.integers(1, new_count))
    test_count = data.draw(strategies.none() | strategies.integers(1, n - new_count))
    kwargs = {"old_classes": old_count, "new_classes": new_count, "test_classes": test_count}
    split = open_classes(labels, **kwargs, seed=seed)
    well_formed(split, labels)
    sizes = [len(classes) for classes in (split.old_classes, split.new_classes, split.test_classes)]
    assert sizes == [old_count, new_count, test_count or n - new_count]
    assert set(split.old_classes.tolist()) <= set(split.new_classes.tolist())
    assert not set(split.new_classes.tolist()) & set(split.test_classes.tolist())
    for part in PARTS:
        taken, rows = counts(labels, getattr(split, part))
        assert ((taken == 0) | (taken == rows)).all()


@settings
@hypothesis.given(labellings(), strategies.sampled_from(MAKERS), seeds)
def test_the_same_seed_the_same_split(labels, make, seed):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    split = make(labels, seed=seed)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(1)
    assert same(make(labels, seed=seed), split)
    assert same(make(labels.numpy(), seed=seed), split)
    assert same(make(labels.tolist(), seed=seed), split)
    ranks = torch.unique(labels, return_inverse=True)[1]
    ranked = make(ranks.to(torch.uint8), seed=seed)
    assert all(torch.equal(getattr(ranked, part), getattr(split, part)) for part in PARTS)


@settings
@hypothesis.given(labellings(), strategies.sampled_from(MAKERS), seeds)
def test_an_order_of_the_rows_changes_no_count(labels, make, seed):
    moved = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    split, other = make(labels, seed=seed), make(moved, seed=seed)
    well_formed(other, moved)
    for part in PARTS:
        got, expected = counts(moved, getattr(other, part)), counts(labels, getattr(split, part))
        assert torch.equal(got[0], expected[0])


@settings
@hypothesis.given(labellings(), shares, shares, seeds)
def test_a_larger_share_only_adds(labels, small, large, seed):
    small, large = sorted((small, large))
    for make, name in ((extended_data, "old_share"), (extended_classes, "old_classes")):
        less, more = make(labels, **{name: small}, seed=seed), make(labels, **{name: large}, seed=seed)
        assert sets(less)[0] <= sets(more)[0]
        assert sets(less)[1:] == sets(more)[1:]


@pytest.mark.parametrize("make", MAKERS)
def test_seeds_differ(make):
    splits = [sets(make(torch.arange(1000) % 20, seed=seed)) for seed in range(3)]
    assert len({tuple(map(frozenset, split)) for split in splits}) == 3


@pytest.mark.parametrize("make", MAKERS)
def test_rows_and_classes_are_drawn_evenly(make):
    """Each row is as often in each part as the others: no place in the class or the file is favoured."""
    labels, draws = torch.arange(100) % 10, 400
    seen = torch.zeros(3, 100)
    for seed in range(draws):
        split = make(labels, seed=seed)
        for part, hits in zip(PARTS, seen, strict=True):
            hits[getattr(split, part)] += 1
    share = seen.mean(1, keepdim=True) / draws
    assert ((seen / draws - share).abs() < 5 * (share * (1 - share) / draws).sqrt()).all()


def test_by_hand():
    labels = torch.arange(10).repeat(10)
    split = extended_data(labels)
    assert [len(rows) for rows in (split.old_train, split.new_train, split.test)] == [20, 80, 20]  # 0.3 of 8 is 2.4
    split = extended_classes(labels)
    assert [len(rows) for rows in (split.old_train, split.new_train, split.test)] == [40, 80, 20]
    split = open_classes(labels)
    assert [len(rows) for rows in (split.old_train, split.new_train, split.test)] == [40, 80, 20]


@pytest.mark.parametrize("make", [extended_data, extended_classes])
def test_no_test_rows_where_the_data_set_has_a_test_part(make):
    split = make([5, 5, 6, 8, 8], test_share=0)
    assert split.test.tolist() == split.test_classes.tolist() == []
    assert split.test.dtype == split.test_classes.dtype == torch.int64
    assert split.new_train.tolist() == [0, 1, 2, 3, 4]
    assert check_no_leakage(split, [5, 5, 6, 8, 8], items=[1, 1, 1, 1, 1]) is split


def test_the_whole_share():
    split = extended_data(LABELS, old_share=1, test_share=0.5)
    assert torch.equal(split.old_train, split.new_train)
    split = extended_classes(LABELS, old_classes=1.0, test_share=0.5)
    assert torch.equal(split.old_train, split.new_train)
    assert len(extended_classes(LABELS, old_classes=1, test_share=0.5).old_classes) == 1


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, torch.tensor, np.int16])
def test_named_classes(kind):
    split = extended_classes(LABELS, old_classes=kind([7, 3]), test_share=0.5)
    assert split.old_classes.tolist() == [3, 7]
    split = open_classes(LABELS, old_classes=kind([7]), new_classes=kind([7, 3]), test_classes=kind([-1]))
    assert (split.old_classes.tolist(), split.new_classes.tolist(), split.test_classes.tolist()) == ([7], [3, 7], [-1])


@pytest.mark.parametrize("seed", range(10))
def test_drawn_classes_go_around_the_named(seed):
    split = open_classes(LABELS, old_classes=[7], new_classes=2, test_classes=[-1], seed=seed)
    assert split.old_classes.tolist() == [7]
    assert 7 in split.new_classes
    assert len(split.new_classes) == 2
    assert split.test_classes.tolist() == [-1]
    split = open_classes(LABELS, old_classes=1, new_classes=[7, 3], test_classes=0.25, seed=seed)
    assert split.old_classes.tolist() in ([7], [3])
    assert split.test_classes.tolist() in ([-1], [2**40])
    split = open_classes(LABELS, old_classes=1, new_classes=3, test_classes=[7], seed=seed)
    assert split.new_classes.tolist() == [-1, 3, 2**40]


def test_drawn_classes_of_the_old_model_do_not_follow_the_order_of_the_names():
    drawn = {
        open_classes(LABELS, old_classes=1, new_classes=[7, 3], seed=seed).old_classes.item() for seed in range(20)
    }
    assert drawn == {3, 7}


@pytest.mark.parametrize("make", MAKERS)
def test_a_million_labels(make):
    labels = np.random.default_rng(0).integers(0, 50_000, 1_000_000)
    split = make(labels)
    assert len(split.new_train) + len(split.test) == len(labels)
    assert check_no_leakage(split, labels, items=np.arange(len(labels))) is split


def test_the_inputs_stay():
    labels = LABELS.clone()
    split = open_classes(labels)
    copy = dataclasses.replace(split, **{part: getattr(split, part).clone() for part in PARTS})
    items = torch.arange(16)
    check_no_leakage(split, labels, items=items)
    assert torch.equal(labels, LABELS)
    assert torch.equal(items, torch.arange(16))
    assert same(split, copy)


# Leaks


@pytest.fixture
def split():
    """Class 0 in rows 0 to 3, 1 in 4 to 7, 2 in 8 and 9, not in the old training."""
    rows = [0, 1, 4, 5], [0, 1, 4, 5, 8], [2, 3, 6, 7, 9]
    classes = [0, 1], [0, 1, 2], [0, 1, 2]
    return UpgradeSplit(*(torch.tensor(values) for values in (*rows, *classes)))


LEAKY = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def leaks(split, message, labels=LEAKY, **kwargs):
    changes = {name: torch.tensor(kwargs.pop(name)) for name in [*kwargs] if name in UpgradeSplit.__annotations__}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_no_leakage(dataclasses.replace(split, **changes), labels, **kwargs)


def test_a_clean_split_passes(split):
    assert check_no_leakage(split, LEAKY) is split
    assert check_no_leakage(split, LEAKY.tolist(), items=range(10)) is split
    backwards = {name: getattr(split, name).flip(0) for name in UpgradeSplit.__annotations__}
    check_no_leakage(dataclasses.replace(split, **backwards), LEAKY, items=np.arange(10))


def test_a_row_in_the_test_and_in_a_training(split):
    leaks(split, "split.test must have no row of split.new_train, got rows 2", new_train=[0, 1, 2, 4, 5, 8])
    leaks(split, "split.test must have no row of split.old_train, got rows 2, 6", old_train=[0, 2, 5, 6])
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    leaks(split, "split.test must have no row of split.new_train, got rows 2, 3, 6 and 2 more", new_train=rows)


@pytest.mark.parametrize("part", PARTS)
def test_a_row_twice(split, part):
    rows = getattr(split, part).tolist()
    leaks(split, f"split.{part} must hold no row twice, got rows {rows[1]}, {rows[2]}", **{part: [*rows, *rows[1:3]]})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there(split, part, row):
    rows = [*getattr(split, part).tolist(), row]
    leaks(split, f"split.{part} must hold rows of labels, from 0 to 9, got rows {row}", **{part: rows})


def test_an_old_class_that_the_new_training_lacks(split):
    message = "split.new_train must have every class of split.old_train, got no rows of 1"
    leaks(split, message, new_train=[0, 1, 8], new_classes=[0, 2])


def test_classes_that_are_not_those_of_the_rows(split):
    message = "split.old_classes must be what labels has in split.old_train, got a difference in 1"
    leaks(split, message, old_classes=[0])
    leaks(
        split,
        "split.test_classes must be what labels has in split.test, got a difference in 5",
        test_classes=[0, 1, 2, 5],
    )
    leaks(split, "split.old_classes must be what labels has in split.old_train, got a difference in 0, 1", LEAKY + 7)


def test_a_class_in_the_test_and_in_a_training(split):
    leaks(split, "split.test must have no class of split.old_train, got classes 0, 1", disjoint_classes=True)
    message = "split.test must have no class of split.new_train, got classes 2"
    leaks(split, message, disjoint_classes=True, test=[9], test_classes=[2])
    apart = dataclasses.replace(split, new_train=split.old_train, new_classes=split.old_classes)
    apart = dataclasses.replace(apart, test=torch.tensor([8, 9]), test_classes=torch.tensor([2]))
    assert check_no_leakage(apart, LEAKY, disjoint_classes=True) is apart


@pytest.mark.parametrize(
    "kind",
    [
        list,
        np.array,
        torch.tensor,
        lambda ids: [f"{i:b}.png" for i in ids],
        lambda ids: np.array(ids)[:, None] / [3, 7],
    ],
)
def test_an_item_under_two_numbers(split, kind):
    ids = [*range(10)]
    leaks(
        split,
        "items must not be in split.test and in a training, got (test, training) rows [3, 8], [6, 0]",
        items=kind([50, 1, 2, 40, 4, 5, 50, 7, 40, 9]),
    )
    check_no_leakage(split, LEAKY, items=kind(ids))
    # Copies on one side are no leak.
    check_no_leakage(split, LEAKY, items=kind([0, 0, 2, 2, 4, 5, 2, 7, 8, 9]))


def test_an_item_that_only_the_old_model_learned(split):
    leaks(split, "rows [2, 4]", old_train=[0, 4], new_train=[0, 5, 8], items=[0, 1, 7, 3, 7, 5, 6, 8, 9, 10])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("layout", ["tensor", "channels_last", "array", "list"])
def test_a_planted_copy_of_an_image(dtype, layout):
    labels = torch.arange(60) % 3
    split = extended_data(labels)
    images = torch.randint(256, (60, 3, 6, 6), generator=torch.Generator().manual_seed(0)) / 255
    images = (images > 0.5) if dtype == torch.bool else (images * 255).to(dtype)

    def given(images):
        if layout == "channels_last":
            return images.contiguous(memory_format=torch.channels_last)
        if layout == "tensor":
            return images
        images = images.float().numpy() if dtype == torch.bfloat16 else images.numpy()
        return images.transpose(0, 2, 3, 1) if layout == "array" else list(images)

    check_no_leakage(split, labels, items=given(images))
    test, train = int(split.test[4]), int(split.new_train[7])
    images[test] = images[train]
    leaks(split, f"got (test, training) rows [{test}, {train}]", labels, items=given(images))
    images[test, 2, 5, 5] = 1 - images[test, 2, 5, 5].int() if dtype == torch.bool else images[test, 2, 5, 5] + 1
    check_no_leakage(split, labels, items=given(images))


def test_contents_are_compared_to_the_last_byte(split):
    """Rows that differ after zeros only, and by the highest bit only."""
    images = np.zeros((10, 4, 4), dtype=np.uint8)
    images.reshape(10, 16)[:, 15] = 16 * np.arange(10)
    check_no_leakage(split, LEAKY, items=images)
    images[2] = images[0]
    leaks(split, "rows [2, 0]", items=images)


@settings
@hypothesis.given(strategies.lists(strategies.integers(0, 40), min_size=30, max_size=30), seeds)
def test_items_against_a_loop(items, seed):
    labels = torch.arange(30) % 3
    split = extended_data(labels, seed=seed)
    train = split.new_train.tolist()
    found = [row for row in split.test.tolist() if items[row] in [items[other] for other in train]]
    if not found:
        assert check_no_leakage(split, labels, items=items) is split
        return
    with pytest.raises(ValueError, match="items must not be") as error:
        check_no_leakage(split, labels, items=items)
    pairs = [[int(row) for row in pair] for pair in re.findall(r"\[(\d+), (\d+)\]", str(error.value))]
    assert [row for row, _ in pairs] == found[:3]
    assert all(items[row] == items[twin] and twin in train for row, twin in pairs)
    assert str(error.value).endswith(f"and {len(found) - 3} more") == (len(found) > 3)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (range(9), "items must have one entry a row of labels: expected 10, got shape (9,)"),
        (5, "items must have one entry a row of labels: expected 10, got shape ()"),
        (np.arange(10) / 7, "items must be (N,) integers or strings, or (N, ...) numbers, got float64 of shape (10,)"),
        ([None] * 10, "got object of shape (10,); convert ids with numpy.asarray(items, dtype=str)"),
        (np.full((10, 2), "a"), "or (N, ...) numbers, got <U1 of shape (10, 2)"),
        (np.zeros((10, 0)), "or (N, ...) numbers, got float64 of shape (10, 0)"),
    ],
)
def test_unusable_items(split, items, message):
    leaks(split, message, items=items)


# Arguments


def fails(make, message, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(*args, **kwargs)


@pytest.mark.parametrize("make", MAKERS)
def test_unusable_labels_and_seeds(make):
    for empty in ([], torch.tensor([]), np.zeros(0, dtype=int)):
        fails(make, "labels must not be empty", empty)
    fails(make, "labels must be integers, got torch.float32", torch.rand(5))
    fails(make, "labels must be integers, got torch.float64", [0.5, 1.5])
    fails(make, "labels must be numbers, got an array of <U1", ["a", "b"])
    fails(make, "labels must be 1-dimensional, (N,), got shape (4, 4)", LABELS.view(4, 4))
    fails(make, "labels must be 1-dimensional, (N,), got shape ()", 5)
    fails(make, "labels must be numbers, got an array of object", None)
    fails(make, "seed must be an integer of at least 0, got -1", LABELS, seed=-1)
    fails(make, "seed must be an integer of at least 0, got None", LABELS, seed=None)


@pytest.mark.parametrize("make", [extended_data, extended_classes])
def test_unusable_test_shares(make):
    for share in (1, 1.0, 3):
        fails(make, f"test_share must be a share below 1, got {share}", LABELS, test_share=share)
    for share in (-0.1, float("nan"), "much", None):
        message = f"test_share must be a finite number of at least 0, got {share!r}"
        fails(make, message, LABELS, test_share=share)
    message = (
        "labels must have two rows of every class to hold one out (or give test_share=0), got one row of classes 4"
    )
    fails(make, message, [4, 5, 5, 5])
    fails(make, "labels must leave some class two test rows", LABELS)  # one of four rows
    assert len(make(LABELS, test_share=0.5).test) == 8


def test_unusable_old_shares():
    for share in (0, -1, float("inf"), [0.1]):
        fails(extended_data, f"old_share must be a finite number above 0, got {share!r}", LABELS, old_share=share)
    fails(extended_data, "old_share must be a share of at most 1, got 1.5", LABELS, old_share=1.5)


@pytest.mark.parametrize("make", [extended_classes, open_classes])
def test_unusable_classes(make):
    for share in (0.0, -0.5, float("nan")):
        fails(make, f"old_classes must be a finite number above 0, got {share}", LABELS, old_classes=share)
    fails(make, "old_classes must be a share of at most 1, got 1.5", LABELS, old_classes=1.5)
    for count in (0, -3, True):
        fails(make, f"old_classes must be an integer of at least 1, got {count}", LABELS, old_classes=count)
    for other in (None, "all"):
        message = f"old_classes must be a share of the classes, a count of them or labels, got {other!r}"
        fails(make, message, LABELS, old_classes=other)
    fails(make, "old_classes must not be empty", LABELS, old_classes=[])
    fails(make, "old_classes must be integers, got torch.float64", LABELS, old_classes=[0.3, 0.4])
    message = "old_classes must be classes of labels, got classes 4, 5, 6 and 1 more"
    fails(make, message, LABELS, old_classes=[3, 4, 5, 6, 8])


def test_more_classes_than_there_are():
    message = "old_classes must be among the 4 classes of labels, got a count of 5"
    fails(extended_classes, message, LABELS, old_classes=5, test_share=0)
    fails(open_classes, "new_classes must be among the 4 classes of labels, got a count of 5", LABELS, new_classes=5)
    message = "old_classes must be among the 2 classes of new_classes, got a count of 3"
    fails(open_classes, message, LABELS, old_classes=3, new_classes=2)
    message = "test_classes must be among the 1 classes that new_classes leaves, got a count of 2"
    fails(open_classes, message, LABELS, new_classes=3, test_classes=2)
    message = "new_classes must be among the 3 classes that test_classes leaves, got a count of 4"
    fails(open_classes, message, LABELS, new_classes=4, test_classes=[7])
    message = "new_classes must leave a class to test on, got all 4 classes of labels"
    fails(open_classes, message, LABELS, new_classes=1.0)
    fails(open_classes, message, LABELS, new_classes=LABELS)


def test_named_classes_that_do_not_fit():
    message = "old_classes must be among the 2 classes of new_classes, got classes -1"
    fails(open_classes, message, LABELS, old_classes=[3, -1], new_classes=[3, 7])
    message = "old_classes must be among the 1 classes of new_classes, got classes "
    fails(open_classes, message, LABELS, old_classes=[3, 7], new_classes=1)
    message = "new_classes must be among the 2 classes that test_classes leaves, got classes 7"
    fails(open_classes, message, LABELS, old_classes=[3], new_classes=[3, 7], test_classes=[7, -1])
    message = "old_classes must be among the 3 classes that test_classes leaves, got classes 3"
    fails(open_classes, message, LABELS, old_classes=[3], test_classes=[3])
    message = "labels must leave some class two test rows"
    fails(open_classes, message, [0, 0, 1, 1, 2, 3], old_classes=1, new_classes=[0, 1])
