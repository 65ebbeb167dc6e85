"""What has to hold for any embeddings: rotations, row orders, copies of the gallery and chunk sizes."""

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator, ranking
from pml_compat.accuracy.calculator import RANK_METRICS

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
strategies = hypothesis.strategies
# Fixtures are reset once a test, not once an example: monkeypatch is used as a context instead.
settings = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@strategies.composite
def searches(draw):
    """Queries, a gallery, and labels; integer coordinates tie often, others never."""
    n_query, n_reference, width = draw(strategies.tuples(*(strategies.integers(1, n) for n in (12, 40, 6))))
    rng = np.random.default_rng(draw(strategies.integers(0, 2**32 - 1)))
    classes = draw(strategies.integers(1, 5))
    if draw(strategies.booleans()):
        rows = [rng.integers(-2, 3, (n, width)).astype(np.float32) for n in (n_query, n_reference)]
    else:
        rows = [rng.normal(size=(n, width)).astype(np.float32) for n in (n_query, n_reference)]
    return rows[0], rng.integers(0, classes, n_query), rows[1], rng.integers(0, classes, n_reference), rng


def accuracy(*data, k=None):
    return CrossModelAccuracyCalculator(RANK_METRICS, device="cpu", k=k).get_accuracy(*data)


def same(got, expected, tolerance=1e-9):
    for name in expected:
        assert got[name] == pytest.approx(expected[name], abs=tolerance, nan_ok=True), name


@pytest.mark.slow
@settings
@hypothesis.given(searches(), strategies.sampled_from([None, 1, 5]))
def test_row_orders_change_nothing(search, k):
    query, query_labels, reference, reference_labels, rng = search
    rows, columns = rng.permutation(len(query)), rng.permutation(len(reference))
    got = accuracy(query[rows], query_labels[rows], reference[columns], reference_labels[columns], k=k)
    same(got, accuracy(query, query_labels, reference, reference_labels, k=k))


@settings
@hypothesis.given(searches())
def test_a_rotation_of_both_spaces_changes_nothing(search):
    query, query_labels, reference, reference_labels, rng = search
    rotation = np.linalg.qr(rng.normal(size=(query.shape[1], query.shape[1])))[0]
    got = accuracy(query.astype(float) @ rotation, query_labels, reference.astype(float) @ rotation, reference_labels)
    same(got, accuracy(query, query_labels, reference, reference_labels))


@settings
@hypothesis.given(searches(), strategies.integers(2, 3))
def test_a_gallery_of_copies(search, copies):
    """Every place is held ``copies`` times: precisions at the ends of ties stay, and so does every share of places."""
    query, query_labels, reference, reference_labels, _ = search
    expected = accuracy(query, query_labels, reference, reference_labels)
    got = accuracy(query, query_labels, np.tile(reference, (copies, 1)), np.tile(reference_labels, copies))
    for name in ("precision_at_1", "mean_average_precision", "r_precision"):
        assert got[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


@settings
@hypothesis.given(searches(), strategies.integers(1, 60), strategies.integers(1, 60), strategies.integers(1, 5))
def test_chunk_sizes_change_nothing(search, chunk, counted, queries):
    data = search[:4]
    expected = accuracy(*data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_CHUNK_ELEMENTS", chunk)
        patch.setattr(ranking, "_COUNTED_ELEMENTS", counted)
        patch.setattr(ranking, "_MIN_QUERIES", queries)
        same(accuracy(*data), expected, tolerance=1e-12)


@settings
@hypothesis.given(searches(), strategies.floats(1e-3, 1e3))
def test_a_common_scale_changes_nothing(search, scale):
    query, query_labels, reference, reference_labels, _ = search
    scaled = (torch.from_numpy(rows).double() * 2.0 ** round(np.log2(scale)) for rows in (query, reference))
    query_, reference_ = scaled
    same(
        accuracy(query_, query_labels, reference_, reference_labels),
        accuracy(query, query_labels, reference, reference_labels),
    )
