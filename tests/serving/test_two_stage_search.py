import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.serving import TwoStageSearch, two_stage_accuracy
from pml_compat.serving.vector_cache import VectorCache
from tests import reference


def data(queries=15, size=60, classes=6, seed=0):
    """Return queries and gallery of both models, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    query_labels, gallery_labels = torch.arange(queries) % classes, torch.arange(size) % classes
    rows = []
    for width, noise in ((5, 1.5), (7, 0.8)):
        centers = draw(classes, width)
        rows.append(
            (noise * draw(queries, width) + centers[query_labels], noise * draw(size, width) + centers[gallery_labels])
        )
    (old_queries, old_gallery), (new_queries, new_gallery) = rows
    return old_queries, new_queries, old_gallery, new_gallery, query_labels, gallery_labels


class Embedder:
    """Look new vectors up by id, and keep what was asked for."""

    def __init__(self, vectors, ids=None):
        self.vectors, self.place = vectors, {value: row for row, value in enumerate(ids or range(len(vectors)))}
        self.asked = []

    def __call__(self, ids):
        self.asked.append(list(ids))
        return self.vectors[[self.place[value] for value in ids]]


def exact(gallery, ids=None):
    def index(queries, depth):
        rows = (normalize(queries) @ normalize(gallery).t()).topk(min(depth, len(gallery))).indices
        return rows if ids is None else [[ids[row] for row in found] for found in rows.tolist()]

    return index


def faiss_index(gallery):
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(normalize(gallery).numpy())
    return index


def naive(old_query, new_query, old_gallery, new_gallery, depth, k):
    """Return the scores and rows of one query."""
    old = [float(reference.unit(old_query) @ reference.unit(row)) for row in old_gallery]
    new = [float(reference.unit(new_query) @ reference.unit(row)) for row in new_gallery]
    candidates = sorted(range(len(old)), key=lambda j: -old[j])[:depth]
    order = sorted(candidates, key=lambda j: -new[j])[:k]
    return [new[j] for j in order], order


@pytest.mark.parametrize("make", [exact, faiss_index])
@pytest.mark.parametrize("depth", [1, 8, 60])
def test_the_candidates_are_put_in_the_new_order(make, depth):
    old, new, old_gallery, new_gallery, query_labels, gallery_labels = data()
    embed, k = Embedder(new_gallery), min(depth, 5)
    search = TwoStageSearch(make(old_gallery), embed, depth=depth)
    scores, ids = search(old, new, k=k)
    assert scores.shape == ids.shape == (15, k) and scores.dtype == np.float32
    rows = [part.double().numpy() for part in (old, new, old_gallery, new_gallery)]
    expected = [naive(rows[0][i], rows[1][i], *rows[2:], depth, k) for i in range(15)]
    assert ids.tolist() == [order for _, order in expected]
    np.testing.assert_allclose(scores, [row for row, _ in expected], atol=1e-6)
    found = two_stage_accuracy(*data(), depth=depth)[depth]
    first = gallery_labels[torch.tensor(ids[:, 0].astype(int))] == query_labels
    assert float(first.double().mean()) == pytest.approx(found["precision_at_1"])
    assert len(search.cache) == len(embed.asked[0]) == found["embedded"] * 60
    search.cache.close()


def test_by_hand():
    def index(queries, depth):
        assert queries.tolist() == [[1.0, 0.0], [0.0, 1.0]] and depth == 3
        return [["cat", "dog", "owl"], ["owl", "cat", "owl"]]

    new = {"cat": [0.0, 3.0], "dog": [1.0, 1.0], "owl": [2.0, 0.0]}
    search = TwoStageSearch(index, lambda ids: np.array([new[value] for value in ids]), depth=3)
    scores, ids = search(torch.eye(2), torch.tensor([[5.0, 0.0], [0.0, 0.1]]), k=3)
    assert ids.tolist() == [["owl", "dog", "cat"], ["cat", "owl", None]]  # each once
    np.testing.assert_allclose(scores, [[1.0, 0.5**0.5, 0.0], [1.0, 0.0, -np.inf]], atol=1e-6)
    search.cache.close()


def test_each_item_is_embedded_once():
    old, new, old_gallery, new_gallery, *_ = data()
    embed = Embedder(new_gallery)
    search = TwoStageSearch(exact(old_gallery), embed, depth=10)
    whole = [search(old, new, k=5) for _ in range(2)][1]
    assert len(embed.asked) == 1  # nothing was missing the second time
    single = Embedder(new_gallery)
    one_by_one = TwoStageSearch(exact(old_gallery), single, depth=10)
    for row in range(15):
        scores, ids = one_by_one(old[row : row + 1], new[row : row + 1], k=5)
        assert ids[0].tolist() == whole[1][row].tolist()
        np.testing.assert_allclose(scores[0], whole[0][row], atol=1e-6)
    asked = [value for some in single.asked for value in some]
    assert len(asked) == len(set(asked)) and set(asked) == set(embed.asked[0]) == set(one_by_one.cache.ids())
    assert len(single.asked) > 1
    search.cache.close()
    one_by_one.cache.close()


def test_a_second_search_finds_what_the_first_embedded(tmp_path):
    old, new, old_gallery, new_gallery, *_ = data()
    ids = [f"item/{row}" for row in range(60)]
    first = TwoStageSearch(exact(old_gallery, ids), Embedder(new_gallery, ids), tmp_path / "new.db", fingerprint="one")
    expected = first(old, new, k=5)
    first.cache.close()
    assert first.cache.path == str(tmp_path / "new.db")

    def refuse(ids):
        raise AssertionError(f"embedded {ids} anew")

    with VectorCache(tmp_path / "new.db") as cache:
        for again in (cache, str(tmp_path / "new.db")):
            search = TwoStageSearch(exact(old_gallery, ids), refuse, again, depth=50, fingerprint="one")
            found = search(old, new, k=5)
            assert found[1].tolist() == expected[1].tolist() and found[0].tolist() == expected[0].tolist()
        search.cache.close()
        assert TwoStageSearch(exact(old_gallery), refuse, cache).cache is cache
        with pytest.raises(ValueError, match="fingerprint must be the cache's, 'one', got 'two'"):
            TwoStageSearch(exact(old_gallery), refuse, cache, fingerprint="two")
    with pytest.raises(ValueError, match=r"fingerprint must be that of the model whose vectors .* 'one', got 'two'"):
        TwoStageSearch(exact(old_gallery), refuse, tmp_path / "new.db", fingerprint="two")


@pytest.mark.parametrize("make", [exact, faiss_index])
def test_a_small_index_is_filled_up(make):
    old, new, old_gallery, new_gallery, *_ = data(queries=3)
    search = TwoStageSearch(make(old_gallery[:4]), Embedder(new_gallery), depth=50)  # faiss fills up with -1
    scores, ids = search(old, new, k=6)
    assert all(set(row[:4]) == set(range(4)) and row[4:] == [None, None] for row in ids.tolist())
    assert np.isfinite(scores[:, :4]).all() and (scores[:, 4:] == -np.inf).all()
    assert len(search.cache) == 4
    search.cache.close()


def test_places_that_the_index_left_open():
    def index(queries, depth):
        return np.array([[None, 2, -1], [None, None, None], [-1, 0, 2]], dtype=object)

    search = TwoStageSearch(index, Embedder(torch.eye(3)), depth=3)
    scores, ids = search(torch.ones(3, 4), torch.tensor([[1.0, 0.0, 1.0]] * 3), k=2)
    assert ids.tolist() == [[2, None], [None, None], [0, 2]] and search.cache.ids() == [0, 2]
    assert np.isfinite(scores).tolist() == [[True, False], [False, False], [True, True]]
    search.cache.close()


def test_nothing_found_at_all():
    search = TwoStageSearch(lambda queries, depth: [[None]] * len(queries), Embedder(torch.eye(3)), depth=3)
    scores, ids = search(torch.ones(2, 4), torch.ones(2, 3), k=2)
    assert ids.tolist() == [[None, None]] * 2 and (scores == -np.inf).all() and search.embed.asked == []
    search.cache.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_arrays_and_gradients(dtype):
    old, new, old_gallery, new_gallery, *_ = data()
    index = lambda queries, depth: exact(old_gallery)(queries.float(), depth)  # noqa: E731
    with VectorCache(":memory:") as cache, VectorCache(":memory:") as other:
        _, expected = TwoStageSearch(index, Embedder(new_gallery.to(dtype).float()), cache)(
            old.to(dtype).float(), new.to(dtype).float(), k=5
        )
        embed = Embedder(new_gallery.to(dtype).requires_grad_())
        scores, ids = TwoStageSearch(index, embed, other)(old.to(dtype).requires_grad_(), new.to(dtype), k=5)
    assert ids.tolist() == expected.tolist() and scores.dtype == np.float32
    search = TwoStageSearch(index, lambda ids: new_gallery.numpy()[ids])
    assert search(old.numpy(), new.numpy(), k=5)[1].shape == (15, 5)
    search.cache.close()


def test_a_row_of_zeros_scores_0():
    search = TwoStageSearch(lambda queries, depth: [[0, 1]] * 2, lambda ids: torch.zeros(len(ids), 3), depth=2)
    scores, _ = search(torch.ones(2, 4), torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), k=2)
    assert scores.tolist() == [[0.0, 0.0]] * 2
    search.cache.close()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, len), {}, r"index must be a faiss index or a function \(queries, depth\), got int"),
        ((len, 5), {}, "embed must be a function of a list of ids, got int"),
        ((len, len), {"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ((len, len, {}), {}, "cache must be .* got dict"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        TwoStageSearch(*arguments, **options)


@pytest.mark.parametrize(
    ("old", "new", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(1, 4), 1, "new_queries must have the queries of old_queries, 2, got 1"),
        (torch.ones(2, 3), torch.ones(2, 4), 4, "k must be at most depth, 3, got 4"),
        (torch.ones(2, 3), torch.ones(2, 4), 0, "k must be an integer of at least 1, got 0"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 4), 1, "old_queries must be finite, row 0"),
        (torch.ones(2, 3), torch.full((2, 4), torch.inf), 1, "new_queries must be finite, row 0"),
        (torch.ones(3), torch.ones(2, 4), 1, r"old_queries must be 2-dimensional, \(N, D\), got shape \(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 5), 1, r"embed must return one row an id, .* \(2, 5\), got \(2, 4\)"),
    ],
)
def test_bad_calls(old, new, k, message):
    search = TwoStageSearch(lambda queries, depth: [[0, 1]] * 2, lambda ids: torch.ones(len(ids), 4), depth=3)
    with pytest.raises(ValueError, match=message):
        search(old, new, k=k)
    assert len(search.cache) == 0
    search.cache.close()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.ones(1, 4), r"embed must return one row an id, as wide as new_queries: \(2, 4\), got \(1, 4\)"),
        (torch.ones(4), r"embed must return one row an id, as wide as new_queries: \(2, 4\), got \(4,\)"),
        (torch.tensor([[1.0] * 4, [torch.nan] * 4]), "vectors must be finite, the row of id 1 has a NaN"),
        ([[1.0] * 4] * 2, "what embed returns must be a torch.Tensor or a numpy.ndarray, got list"),
    ],
)
def test_bad_vectors_are_not_kept(made, message):
    search = TwoStageSearch(lambda queries, depth: [[0, 1]] * 2, lambda ids: made, depth=3)
    with pytest.raises(ValueError, match=message):
        search(torch.ones(2, 3), torch.ones(2, 4), k=1)
    assert len(search.cache) == 0
    search.cache.close()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([[0]], "index must return a row of ids a query, 2, got 1"),
        (np.array([0, 1]), "index must return a row of ids a query"),
        (torch.ones(2, 1), "ids must be integers of 64 bits or strings, got 1.0"),
    ],
)
def test_bad_candidates(found, message):
    search = TwoStageSearch(lambda queries, depth: found, Embedder(torch.eye(3)), depth=3)
    with pytest.raises(ValueError, match=message):
        search(torch.ones(2, 3), torch.ones(2, 3), k=1)
    search.cache.close()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("width", [2, 6])
def test_queries_of_another_width_than_the_kept_vectors(missing, width):
    candidates = [[0, 1]]
    search = TwoStageSearch(lambda queries, depth: candidates, lambda ids: torch.ones(len(ids), width), depth=3)
    search.cache.add([0, 1], np.ones((2, 4)))
    if missing:
        candidates[0].append(2)
    with pytest.raises(
        ValueError, match=r"must be (as wide as the kept vectors, 4|4 wide, as those that are kept), got"
    ):
        search(torch.ones(1, 3), torch.ones(1, width), k=1)
    assert search.cache.ids() == [0, 1]
    search.cache.close()
