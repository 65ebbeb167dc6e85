import contextlib

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.utils._python_dispatch import TorchDispatchMode

from pml_compat.accuracy import CrossModelAccuracyCalculator, gallery, ranking
from pml_compat.accuracy.gallery import Gallery
from pml_compat.accuracy.matches import Compared, EqualCodes, SamePosition, mask
from pml_compat.accuracy.rank_metrics import average_precision, hit_rate, r_precision, reciprocal_rank
from tests.accuracy import naive_metrics


def masks(relevant, excluded=None):
    """What ``exact_ranks`` takes, from ``(Q, N)`` bools."""
    excluded = torch.zeros_like(relevant) if excluded is None else excluded
    return Compared(lambda queries: relevant[queries]), [Compared(lambda queries: excluded[queries])]


def ranks_of(query, reference, relevant, excluded=None):
    """All the chunks' ranks, as lists of ``(closer, within, positives_within)``, one list a query."""
    out = [None] * len(query)
    for numbers, ranks in ranking.exact_ranks(query, reference, *masks(relevant, excluded)):
        for row, number in enumerate(numbers.tolist()):
            assert out[number] is None
            fields = (ranks.closer, ranks.within, ranks.positives_within)
            out[number] = list(zip(*(field[row][ranks.valid[row]].tolist() for field in fields), strict=True))
    return out


def counted(query, reference, relevant, excluded):
    out = []
    for i in range(len(query)):
        distances = ((query[i] - reference) ** 2).sum(1)
        kept = ~excluded[i]
        positives = kept & relevant[i]
        out.append(
            sorted(
                (
                    int((distances[kept] < d).sum()),
                    int((distances[kept] <= d).sum()),
                    int((distances[positives] <= d).sum()),
                )
                for d in distances[positives]
            )
        )
    return out


def one_query(distances, hits):
    """The ranks of one query whose distances to a gallery on a line are given."""
    reference = torch.tensor(distances, dtype=torch.float64)[:, None]
    ((_, ranks),) = ranking.exact_ranks(torch.zeros(1, 1), reference, *masks(torch.tensor([hits])))
    return ranks


class Jitter(TorchDispatchMode):
    """Matrix products whose last bits depend on where a row stands, as those of some BLAS kernels do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm):
            column = torch.arange(out.shape[-1], dtype=out.dtype)
            out = out + (column % 3 - 1) * out.abs().max() * torch.finfo(out.dtype).eps
        return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("integers", [False, True], ids=["floats", "ties"])
def test_ranks_are_counts(seed, integers):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        query = torch.randint(-2, 3, (20, 3), generator=generator).double()
        reference = torch.randint(-2, 3, (50, 3), generator=generator).double()
    else:
        query, reference = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (20, 50))
    relevant = torch.rand(20, 50, generator=generator) < 0.2
    excluded = torch.rand(20, 50, generator=generator) < 0.2
    relevant[4] = False
    excluded[5] = True
    expected = counted(query, reference, relevant, excluded)
    assert ranks_of(query, reference, relevant, excluded) == expected
    assert expected[4] == expected[5] == []


def test_relevant_counts_positives_that_are_not_excluded():
    relevant = torch.tensor([[True, True, False], [False, False, False]])
    excluded = torch.tensor([[True, False, False], [False, False, False]])
    counts = {}
    for numbers, ranks in ranking.exact_ranks(torch.zeros(2, 1), torch.ones(3, 1), *masks(relevant, excluded)):
        counts |= dict(zip(numbers.tolist(), ranks.relevant.tolist(), strict=True))
    assert counts == {0: 1, 1: 0}


def test_chunks_cover_every_query_once(monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(ranking, "_MIN_QUERIES", 2)
    assert list(ranking.query_chunks(7, 10)) == [slice(0, 5), slice(5, 7)]
    assert list(ranking.query_chunks(3, 1000)) == [slice(0, 2), slice(2, 3)]


def test_distances_order_like_euclidean_ones_in_tiny_blocks(monkeypatch):
    query, reference = torch.randn(9, 4), torch.randn(31, 4)
    expected = torch.cdist(query.double(), reference.double()).argsort(1)
    monkeypatch.setattr(gallery, "_BLOCK", 7)
    assert torch.equal(Gallery(reference).squared_distances(query).argsort(1), expected)


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_gallery_rows_tie_wherever_they_stand(dtype, jitter, monkeypatch):
    monkeypatch.setattr(gallery, "_BLOCK", 77)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 17, generator=generator).to(dtype)
    rows[5, 3] = 0.0
    reference = rows.repeat(3, 1)
    reference[105, 3] = -0.0
    query = torch.randn(100, 17, generator=generator).to(dtype)
    relevant = torch.ones(100, 300, dtype=torch.bool)
    with Jitter() if jitter else contextlib.nullcontext():
        chunks = list(ranking.exact_ranks(query, reference, *masks(relevant)))
    assert all(torch.equal(ranks.within, ranks.closer // 3 * 3 + 3) for _, ranks in chunks)


def test_unequal_gallery_rows_tie_where_their_distances_do():
    normalize = torch.nn.functional.normalize
    for width in (96, 100, 128):
        generator = torch.Generator().manual_seed(0)
        query, reference = (torch.randint(0, 2, (n, width), generator=generator).float() * 2 - 1 for n in (30, 300))
        relevant = torch.rand(30, 300, generator=generator) < 0.2
        assert ranks_of(normalize(query), normalize(reference), relevant) == ranks_of(query, reference, relevant)


def test_one_long_gallery_row_leaves_the_others_ranks_alone():
    generator = torch.Generator().manual_seed(0)
    query, reference = (torch.nn.functional.normalize(torch.randn(50, 16, generator=generator)) for _ in range(2))
    relevant = torch.rand(50, 50, generator=generator) < 0.2
    longer = torch.cat([reference, torch.full((1, 16), 1e6)])
    expected = ranks_of(query, reference, relevant)
    assert ranks_of(query, longer, torch.cat([relevant, torch.zeros(50, 1, dtype=torch.bool)], 1)) == expected


def test_nearest_leaves_out_the_excluded():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    excluded = torch.tensor([[True, False, False, False], [False, False, True, False]])
    query = torch.tensor([[0.1], [2.1]])
    ((distances, found),) = ranking.nearest(query, reference, [Compared(lambda queries: excluded[queries])], 2)
    assert found.tolist() == [[1, 2], [3, 1]]
    assert torch.allclose(distances, torch.tensor([[0.81, 3.61], [0.81, 1.21]], dtype=torch.float64))


def test_listed_ranks_close_the_gaps_of_removed_items():
    indices = torch.tensor([[4, 2, 0, 1], [3, 1, 2, 0]])
    kept = torch.tensor([[True, False, True, True], [True, True, True, True]])
    relevant = torch.tensor([[True, True, True, True, False], [False, False, False, False, True]])
    excluded = torch.tensor([[False, False, True, False, False], [False] * 5])
    ranks = ranking.listed_ranks(indices, kept, relevant, excluded)
    assert ranks.within[0][ranks.valid[0]].tolist() == [2, 3]
    assert ranks.positives_within[0][ranks.valid[0]].tolist() == [1, 2]
    assert not ranks.valid[1].any()
    assert ranks.relevant.tolist() == [3, 1]


TINY = [
    ([1, 1, 1, 1], [1, 0, 0, 0]),
    ([1, 1, 1, 1], [1, 1, 1, 1]),
    ([1, 1, 2, 2, 2], [0, 0, 1, 1, 0]),
    ([1, 2, 2, 2, 3], [1, 0, 1, 0, 1]),
    ([1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1]),
    ([3, 2, 1, 1, 2, 3], [1, 1, 0, 0, 1, 0]),
    ([1, 2, 3, 4], [0, 1, 0, 1]),
    ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]),
    ([1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1]),
]


@pytest.mark.parametrize("k", [None, 1, 2, 3, 5])
@pytest.mark.parametrize(("distances", "hits"), TINY)
def test_ties_average_over_all_orders(distances, hits, k):
    hits = [bool(hit) for hit in hits]
    ranks = one_query(distances, hits)
    expected = naive_metrics.accuracy_with_ties(np.array(distances), np.array(hits), k)
    at_r = ranks.relevant if k is None else ranks.relevant.clamp_max(k)
    assert average_precision(ranks, k).item() == pytest.approx(expected["mean_average_precision"])
    assert average_precision(ranks, at_r).item() == pytest.approx(expected["mean_average_precision_at_r"])
    assert r_precision(ranks, k).item() == pytest.approx(expected["r_precision"])
    assert reciprocal_rank(ranks, k).item() == pytest.approx(expected["mean_reciprocal_rank"])
    assert hit_rate(ranks, 1).item() == pytest.approx(expected["precision_at_1"])


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize(("distances", "hits"), TINY)
def test_hit_rate_is_the_chance_over_all_orders(distances, hits, k, monkeypatch):
    hits = [bool(hit) for hit in hits]
    monkeypatch.setitem(naive_metrics.METRICS, "top_k", lambda ranked, _: float(ranked[:k].any()))
    expected = naive_metrics.accuracy_with_ties(np.array(distances), np.array(hits))["top_k"]
    assert hit_rate(one_query(distances, hits), k).item() == pytest.approx(expected)


def test_average_precision_by_hand():
    # Ranks 2 and 5 hold the positives: (1/2 + 2/5) / 2.
    assert average_precision(one_query([1, 2, 3, 4, 5], [False, True, False, False, True])).item() == 0.45


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_of_integer_embeddings_is_that_of_sklearn(seed):
    generator = torch.Generator().manual_seed(seed)
    query, reference = (torch.randint(-2, 3, (n, 3), generator=generator).double() for n in (15, 60))
    relevant = torch.rand(15, 60, generator=generator) < 0.3
    got = torch.zeros(15, dtype=torch.float64)
    for numbers, ranks in ranking.exact_ranks(query, reference, *masks(relevant)):
        got[numbers] = average_precision(ranks)
    distances = ((query[:, None] - reference) ** 2).sum(2)
    expected = [average_precision_score(relevant[i], -distances[i]) for i in range(15)]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


# Counting float32 scores, against sorted float64 distances


def embeddings(kind, n, seed, width=24):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    if kind == "unit":
        return torch.nn.functional.normalize(rows)
    if kind == "off_centre":
        return rows + 300
    if kind == "long_tailed":
        return rows * torch.logspace(-3, 3, n)[:, None]
    return rows * {"plain": 1.0, "tiny": 1e-4, "huge": 1e12}[kind]


KINDS = ("unit", "plain", "tiny", "huge", "off_centre", "long_tailed")


def scores_of(query, query_labels, reference, reference_labels, exclude=False, k=None):
    positives = EqualCodes(query_labels, reference_labels)
    found = {}
    for numbers, ranks in ranking.exact_ranks(query, reference, positives, [SamePosition()] * exclude, k):
        for name, value in {
            "average precision": average_precision(ranks),
            "first place": hit_rate(ranks, 1),
            "tenth place": hit_rate(ranks, 10),
            "R-precision": r_precision(ranks, k),
            "AP at k": average_precision(ranks, k),
            "reciprocal rank": reciprocal_rank(ranks),
        }.items():
            found.setdefault(name, torch.zeros(len(query), dtype=torch.float64))[numbers] = value.double()
    return found


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counting_gives_what_sorting_does(kind, exclude, monkeypatch):
    query, reference = embeddings(kind, 300, 0), embeddings(kind, 2000, 1)
    query[:150] = reference[:150]  # exact matches, at distance 0
    generator = torch.Generator().manual_seed(2)
    labels = [torch.randint(25, (n,), generator=generator) for n in (300, 2000)]
    labels[0][:20] = 99  # no positives
    got = scores_of(query, labels[0], reference, labels[1], exclude, k=7)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")  # then nothing is counted
    monkeypatch.setattr(ranking.Counting, "ranks", lambda *_: pytest.fail("counted"))
    expected = scores_of(query, labels[0], reference, labels[1], exclude, k=7)
    for name in expected:
        scored = expected[name].isfinite()
        torch.testing.assert_close(got[name][scored].mean(), expected[name][scored].mean(), rtol=0, atol=1e-6)
    for name in ("first place", "tenth place", "reciprocal rank", "R-precision"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("kind", ["unit", "plain", "huge"])
def test_ordinary_embeddings_are_counted(kind, monkeypatch):
    ranked, queries = ranking.sorted_ranks, []
    monkeypatch.setattr(ranking, "sorted_ranks", lambda *a: queries.extend(a[2].tolist()) or ranked(*a))
    labels = torch.arange(2000) % 25
    scores_of(embeddings(kind, 300, 0, 64), labels[:300], embeddings(kind, 2000, 1, 64), labels)
    assert len(queries) < 15


def test_copies_everywhere_are_sorted_at_once(monkeypatch):
    counted, ranks = [], ranking.Counting.ranks
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(ranking.Counting, "ranks", lambda self, n, *a: counted.append(len(n)) or ranks(self, n, *a))
    reference = embeddings("unit", 20, 0).repeat(5, 1)
    labels = torch.arange(100) % 20
    found = scores_of(reference, labels, reference, labels)
    assert counted == [16]  # the first chunk alone
    assert found["average precision"].tolist() == [1.0] * 100


@pytest.mark.parametrize("width", [3, 64, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tolerance_bounds_the_error_of_the_scores(kind, width):
    query, reference = embeddings(kind, 200, 3, width), embeddings(kind, 1000, 4, width)
    tolerance = ranking.Counting(query, Gallery(reference)).tolerance.double()
    exact = reference.double().square().sum(1) / 2 - query.double() @ reference.double().t()
    scores = torch.addmm(reference.square().sum(1) / 2, query, reference.t(), alpha=-1)
    assert ((scores.double() - exact).abs() <= tolerance).all()


def test_autocast_does_not_change_the_ranks():
    query, reference = embeddings("unit", 50, 0), embeddings("unit", 400, 1)
    labels = torch.arange(400) % 20
    expected = scores_of(query, labels[:50], reference, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = scores_of(query, labels[:50], reference, labels)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# Which items belong to a query


def test_equal_codes():
    matches = EqualCodes(torch.tensor([5, -1, 7, 8]), torch.tensor([7, 5, 7, 7, 5, 2]))
    index, valid = matches.lists(torch.tensor([2, 0, 1]))
    assert [index[i][valid[i]].tolist() for i in range(3)] == [[0, 2, 3], [1, 4], []]
    row, item = matches.pairs(torch.tensor([3, 0]))
    assert row.tolist() == [1, 1] and item.tolist() == [1, 4]
    assert mask([matches, SamePosition()], torch.tensor([0, 2]), 6).int().tolist() == [
        [1, 1, 0, 0, 1, 0],
        [1, 0, 1, 1, 0, 0],
    ]


def test_compared_gives_the_lists_of_its_answers():
    answers = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    index, valid = Compared(lambda queries: answers[queries]).lists(torch.tensor([1, 0, 2]))
    assert [index[i][valid[i]].tolist() for i in range(3)] == [[], [0, 2], [1]]


def test_near_copies_behind_nearer_items_are_told_apart():
    """One positive is the nearest of 6,000 near-copies of a vector, behind 11 other items: place 12 in each ranking."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    copies = 3e-8 * torch.randn(6000, 16, generator=generator)
    copies[:, 0] = 1.0
    precision, reciprocal = [], []
    for query in queries:
        nearer = torch.nn.functional.normalize(query + 0.1 * torch.randn(11, 16, generator=generator), dim=1)
        positive = int((copies.double() - query.double()).square().sum(1).argmin())
        labels = torch.ones(6011, dtype=torch.long)
        labels[11 + positive] = 0
        calculator = CrossModelAccuracyCalculator(("mean_average_precision", "mean_reciprocal_rank"), device="cpu")
        found = calculator.get_accuracy(query[None], torch.tensor([0]), torch.cat([nearer, copies]), labels)
        precision.append(found["mean_average_precision"])
        reciprocal.append(found["mean_reciprocal_rank"])
    assert precision == pytest.approx([1 / 12] * 20)
    assert reciprocal == pytest.approx([1 / 12] * 20)


@pytest.mark.parametrize("form", ["bits", "signs", "unit"])
def test_ties_of_binary_codes_count_as_in_scikit_learn(form):
    generator = np.random.default_rng(0)
    query, gallery = generator.integers(0, 2, (10, 200)), generator.integers(0, 2, (20_000, 200))
    labels, gallery_labels = generator.integers(0, 1000, 10), generator.integers(0, 1000, 20_000)
    hamming = (query[:, None] != gallery).sum(2)
    expected = [average_precision_score(gallery_labels == labels[row], -hamming[row]) for row in range(10)]
    sides = [torch.from_numpy(side).float() for side in (query, gallery)]
    if form != "bits":
        sides = [2 * side - 1 for side in sides]
    if form == "unit":
        sides = [torch.nn.functional.normalize(side, dim=1) for side in sides]
    calculator = CrossModelAccuracyCalculator(("mean_average_precision",), device="cpu")
    found = calculator.get_per_query_accuracy(sides[0], labels, sides[1], gallery_labels)
    assert found["mean_average_precision"].tolist() == pytest.approx(expected, rel=1e-6)
