import numpy as np
import pytest
import torch

from pml_compat.upgrade.per_query import as_vector, complete_queries

nan = np.nan


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 1],
        (True, False, True),
        np.array([1, 0, 1], dtype=np.uint8),
        torch.tensor([True, False, True]),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_numbers_and_bools_of_any_kind(value):
    vector = as_vector(value, "value")
    assert vector.dtype == np.float64
    assert vector.tolist() == [1.0, 0.0, 1.0]


def test_one_number_is_a_row_of_one():
    assert as_vector(0.5, "value").tolist() == as_vector(torch.tensor(0.5), "value").tolist() == [0.5]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], r"value must be numbers, got \['a'\]"),
        ([[1, 2], [3]], r"value must be numbers, got \[\[1, 2\], \[3\]\]"),
        (None, "value must be given, got None"),
        ({1: 2}, r"value must be numbers, got \{1: 2\}"),
        (np.zeros((2, 3)), r"value must be one row of numbers, \(N,\), got shape \(2, 3\)"),
        ([], r"value must be one row of numbers, \(N,\), got shape \(0,\)"),
        ([0.0, 1.0, -np.inf], "value must not be infinite, entry 2 is"),
    ],
)
def test_unusable_values_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        as_vector(value, "value")


def test_queries_without_a_value_in_any_are_left_out_of_all():
    values, kept = complete_queries(first=[1, nan, 3, 4], second=torch.tensor([5.0, 6.0, nan, 8.0]))
    assert values.tolist() == [[1, 4], [5, 8]]
    assert kept.tolist() == [True, False, False, True]


def test_queries_must_be_the_same():
    message = "a and b must have one entry a query, the same queries: got 2 in a, 3 in b"
    with pytest.raises(ValueError, match=message):
        complete_queries(a=[0, 1], b=[0, 1, 1])


def test_a_query_must_be_left():
    with pytest.raises(ValueError, match="a and b must have a query with a value in each, got only NaN"):
        complete_queries(a=[nan, 1], b=[1, nan])
