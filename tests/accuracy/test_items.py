import math
import uuid

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.accuracy.items import codes, item_codes
from pml_compat.upgrade import pair_criterion
from pml_compat.verification import verification

NAMES = ("query_labels", "reference_labels")
RNG = np.random.default_rng(0)
BIG = 2**60


def equalities(query, reference):
    one, other = codes(query, reference, NAMES, (len(query), len(reference)))
    return (one[:, None] == other).tolist()


@pytest.mark.parametrize(
    ("query", "reference"),
    [
        ([1, 2], [2, 1, 3]),
        (["a", "b"], np.array(["b", "long name"])),
        (np.array([b"a", b"b"]), ["b", "a"]),
        ([True, False], np.array([0, 1, 1], dtype=np.uint8)),
        (np.array([1, 2], dtype=np.uint16), torch.tensor([2, 5])),
        (np.array([1, 2**64 - 1], dtype=np.uint64), np.array([2**64 - 1, 3], dtype=np.uint64)),
        (np.array([1, 2**63], dtype=np.uint64), np.array([1, -(2**63)])),
        (torch.tensor([2.0**60, 1.0], dtype=torch.float64), torch.tensor([BIG + 1, BIG, 1])),
        (torch.tensor([2.0**24]), torch.tensor([2**24 + 1, 2**24])),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), torch.tensor([2, 3])),
        ([BIG + 1, 0.5], [float(BIG), 0.5, BIG + 1]),
        (np.array(["2020-01-01"], dtype="M8[D]"), np.array(["2020-01-01T00", "2020-01-02"], dtype="M8[h]")),
        ([uuid.UUID(int=1)], [uuid.UUID(int=2), uuid.UUID(int=1)]),
        ([-0.0], [0.0]),
    ],
)
def test_values_match_where_python_says_they_are_equal(query, reference):
    def plain(values):
        values = [one.item() if hasattr(one, "item") else one for one in values]
        return [one.decode() if isinstance(one, bytes) else one for one in values]

    if isinstance(query, np.ndarray) and query.dtype.kind == "M":
        query, reference = query.astype("M8[s]"), reference.astype("M8[s]")
    expected = [[bool(one == other) for other in plain(reference)] for one in plain(query)]
    assert equalities(query, reference) == expected


@pytest.mark.parametrize("unknown", [None, math.nan, np.float32("nan")])
def test_what_is_unknown_matches_nothing(unknown):
    assert equalities([unknown, 1], [unknown, 1, 2]) == [[False] * 3, [False, True, False]]
    assert equalities([None, "a"], ["a", None]) == [[False, False], [True, False]]
    assert equalities([unknown], [unknown]) == [[False]]
    assert equalities(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])) == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("query", "reference", "message"),
    [
        ([1], ["1"], "query_labels and reference_labels must be of one kind, got numbers and text"),
        ([1, "a"], [1], "query_labels must be numbers .* all of one kind, got int and str"),
        ([1j], [1], "query_labels must be numbers .*, got complex"),
        (None, [1], "query_labels must be given, got None"),
    ],
)
def test_what_cannot_be_compared_is_an_error(query, reference, message):
    with pytest.raises(ValueError, match=message):
        codes(query, reference, NAMES, (len(query or [0]), 1))


QUERY, GALLERY = torch.eye(3), torch.eye(3) + 0.1 * torch.eye(3).flip(0)


def precision(query_labels, gallery_labels, **ids):
    calculator = CrossModelAccuracyCalculator(include=("precision_at_1",), device="cpu")
    return calculator.get_accuracy(QUERY, query_labels, GALLERY, gallery_labels, **ids)["precision_at_1"]


@pytest.mark.parametrize(
    "labels",
    [
        ["cat", "dog", "cow"],
        np.array(["cat", "dog", "cow"]),
        np.arange(3, dtype=np.uint16),
        np.arange(3, dtype=np.uint64),
        torch.tensor([0, 1, 2], dtype=torch.uint32),
        [10**30, 1, 2],
    ],
    ids=["list", "array", "uint16", "uint64", "uint32", "huge"],
)
def test_labels_of_any_type_rank(labels):
    assert precision(labels, labels) == 1
    assert precision(labels, labels[[1, 2, 0]] if not isinstance(labels, list) else labels[1:] + labels[:1]) == 0
    assert verification(QUERY, labels, GALLERY, labels, fars=0.1).at_far[0.1].tar == 1
    assert pair_criterion(QUERY, QUERY, labels, GALLERY, labels).n_same_label == 3


def test_bools_rank():
    labels = torch.tensor([True, False, True])
    assert precision(labels, labels) == precision(labels.long(), labels.long())


def test_a_float_label_is_no_neighbouring_integer():
    query = torch.tensor([2.0**24, 2.0**25, 1])
    assert precision(query, torch.tensor([2**24 + 1, 2**25 + 1, 1])) == 1  # the two others have no positive
    assert precision(query, torch.tensor([1, 2**24 + 1, 2**25 + 1])) == 0


def test_an_unknown_label_shifts_nothing():
    query, gallery = torch.randn(40, 4), torch.randn(60, 4)
    labels, gallery_labels = torch.randint(0, 5, (40,)).float(), torch.randint(0, 5, (60,)).float()
    labels[::7], gallery_labels[::5] = math.nan, math.nan
    per_query = CrossModelAccuracyCalculator(device="cpu").get_per_query_accuracy
    found = per_query(query, labels, gallery, gallery_labels)
    numbered = labels.nan_to_num(-1), gallery_labels.nan_to_num(-2)
    expected = per_query(query, numbered[0], gallery, numbered[1])
    assert found["mean_average_precision"][::7].isnan().all()
    for metric, values in expected.items():
        assert torch.equal(found[metric].nan_to_num(-1), values.nan_to_num(-1)), metric


def test_a_missing_id_leaves_nothing_out():
    labels = ["a", "b", "c"]
    missing = {"query_ids": [None, "x", math.nan], "reference_ids": [None, "y", None]}
    assert precision(labels, labels, **missing) == 1
    as_floats = {"query_ids": np.array([math.nan, 1, math.nan]), "reference_ids": np.array([math.nan, 2, math.nan])}
    assert precision(labels, labels, **as_floats) == 1
    same_pairs = pair_criterion(QUERY, QUERY, labels, GALLERY, labels, **missing).n_same_label
    assert same_pairs == verification(QUERY, labels, GALLERY, labels, **missing).genuine_pairs == 3


def test_a_known_id_is_left_out_everywhere():
    labels, ids = ["a", "a", "c"], {"query_ids": ["x", "y", None], "reference_ids": np.array(["z", "y", "x"])}
    gallery_labels = ["c", "a", "a"]
    pairs = pair_criterion(QUERY, QUERY, labels, GALLERY, gallery_labels, **ids)
    found = verification(QUERY, labels, GALLERY, gallery_labels, **ids)
    assert (pairs.n_same_label, pairs.n_different_label) == (found.genuine_pairs, found.impostor_pairs) == (3, 4)


def test_ids_of_two_kinds_are_refused_everywhere():
    labels, ids = [0, 1, 2], {"query_ids": [0, 1, 2], "reference_ids": ["0", "1", "2"]}
    message = "query_ids and reference_ids must be of one kind, got numbers and text"
    with pytest.raises(ValueError, match=message):
        precision(labels, labels, **ids)
    with pytest.raises(ValueError, match=message):
        verification(QUERY, labels, GALLERY, labels, **ids)
    with pytest.raises(ValueError, match=message):
        pair_criterion(QUERY, QUERY, labels, GALLERY, labels, **ids)


def test_an_item_has_one_label():
    ids = {"query_ids": ["x", "y", "z"], "reference_ids": ["z", "q", "x"]}
    with pytest.raises(ValueError, match=r"must give an item one label, the item 'x' has two \(1 such items\)"):
        precision([5, 6, 7], [7, 8, 9], **ids)
    frames = {"query_ids": ["x", "y", "z"], "reference_ids": ["x", "x", "y"]}  # of a film: no items
    assert item_codes(codes([5, 6, 7], [7, 8, 9], NAMES, (3, 3)), False, *frames.values(), (3, 3)) is not None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64, torch.uint16, torch.bool])
def test_whole_numbers_rank_as_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    top = 2 if dtype is torch.bool else 100
    query, gallery = (torch.randint(0, top, (n, 8), generator=generator) for n in (20, 50))
    labels = torch.randint(0, 4, (20,), generator=generator), torch.randint(0, 4, (50,), generator=generator)
    calculator = CrossModelAccuracyCalculator(exclude=("NMI", "AMI"), device="cpu")
    found = calculator.get_accuracy(query.to(dtype), labels[0], gallery.to(dtype), labels[1])
    assert found == calculator.get_accuracy(query.double(), labels[0], gallery.double(), labels[1])
    one = verification(query.to(dtype), labels[0], gallery.to(dtype), labels[1])
    assert one == verification(query.double(), labels[0], gallery.double(), labels[1])
    assert pair_criterion(query.to(dtype), query.to(dtype), labels[0], gallery.to(dtype), labels[1]).same_label == 1
