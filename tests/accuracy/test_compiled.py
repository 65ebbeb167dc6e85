"""The compiled loops give what torch's path gives, and what brute force does."""

from functools import partial

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator, compiled, ranking
from pml_compat.accuracy.calculator import RANK_METRICS
from pml_compat.accuracy.first_positive import first_ranks
from pml_compat.accuracy.gallery import Gallery
from pml_compat.accuracy.matches import Compared, EqualCodes, SamePosition
from pml_compat.accuracy.rank_metrics import hit_rate
from tests.accuracy import test_ranking

needs_numba = pytest.mark.skipif(compiled.kernels() is None, reason="needs numba (extra fast)")
FIELDS = ("closer", "within", "positives_within")


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    """Every search by one of the two, whatever its size."""
    if request.param == "compiled" and compiled.kernels() is None:
        pytest.skip("needs numba (extra fast)")
    monkeypatch.setattr(compiled, "_WORTH_IT", 0 if request.param == "compiled" else 2**62)
    return request.param


def search(seed, whole, most=60):
    """A small search: ``whole`` embeddings tie often, others never."""
    rng = np.random.default_rng(seed)
    n_query, n_reference, width = (int(rng.integers(1, n + 1)) for n in (10, most, 6))
    classes = int(rng.integers(1, n_reference + 3))  # many labels of one item
    rows = [rng.integers(-2, 3, (n, width)) if whole else rng.normal(size=(n, width)) for n in (n_query, n_reference)]
    query, reference = (torch.from_numpy(side).float() for side in rows)
    labels = [torch.from_numpy(rng.integers(0, classes, n)) for n in (n_query, n_reference)]
    ids = [torch.from_numpy(rng.integers(0, 8, n)) for n in (n_query, n_reference)]
    cameras = [torch.from_numpy(rng.integers(0, 3, n)) for n in (n_query, n_reference)]
    relevant = labels[0][:, None] == labels[1]
    same = relevant & (cameras[0][:, None] == cameras[1])
    excluded = {
        0: [],
        1: [EqualCodes(*ids)],
        2: [EqualCodes(*ids), Compared(lambda queries: same[queries])],
    }[int(rng.integers(0, 3))]
    positives = EqualCodes(*labels) if rng.random() < 0.7 else Compared(lambda queries: relevant[queries])
    return query, reference, positives, excluded


def brute_force(query, reference, positives, excluded):
    """The ranks of every query, by comparing float64 distances of all pairs."""
    distances = (query.double()[:, None] - reference.double()).square().sum(2)
    numbers = torch.arange(len(query))
    out = ranking.mask(excluded, numbers, len(reference))
    right = ranking.mask([positives], numbers, len(reference)) & ~out
    for row, kept, hits in zip(distances, ~out, right, strict=True):
        own = row[hits].sort().values
        yield [[int((row[kept] < d).sum()), int((row[kept] <= d).sum()), int((row[hits] <= d).sum())] for d in own]


def found_ranks(found, n_query):
    out = [None] * n_query
    for numbers, ranks in found:
        for row, number in enumerate(numbers.tolist()):
            assert out[number] is None
            valid = ranks.valid[row]
            assert int(ranks.relevant[row]) == int(valid.sum())
            fields = torch.stack([getattr(ranks, name)[row][valid] for name in FIELDS], dim=1)
            out[number] = fields.tolist()
    return out


def check_against_brute_force(seed):
    data = search(seed, whole=seed % 2 == 0)
    assert found_ranks(ranking.exact_ranks(*data), len(data[0])) == list(brute_force(*data))


def test_brute_force(engine):
    for seed in range(60):
        check_against_brute_force(seed)


@pytest.mark.slow
def test_brute_force_2000_times(engine):
    for seed in range(2000):
        check_against_brute_force(seed)


def both_engines(query, reference, positives, excluded, k):
    """Ranks and doubts of all queries by each engine, before float64 decides any."""
    gallery, cuts = Gallery(reference), () if k is None else (k,)
    plain = ranking.Counting(query, gallery)
    fast = compiled.CompiledCounting(plain.query, gallery, plain.size, plain.tolerance)
    for counting in (plain, fast):
        found, doubts = [], torch.zeros(len(query), dtype=torch.bool)
        for numbers in counting.chunks(positives):
            for part, ranks, unsure in counting.ranks(numbers, positives, excluded, cuts):
                found.append((part, ranks))
                doubts[part] = unsure
        yield found_ranks(found, len(query)), doubts


@needs_numba
@pytest.mark.parametrize("k", [None, 1, 12])
def test_ranks_and_doubts_are_those_of_torch(k, monkeypatch):
    """Products of small whole numbers are exact in float32: nothing may differ, ties and all."""
    monkeypatch.setattr(compiled, "decide", lambda *_: None)
    doubtful = 0
    for seed in range(100):
        query, reference, positives, excluded = search(seed, whole=True, most=400)
        if float(query.abs().amax(1).min()) == 0:
            query[:, 0] = 1
        plain, fast = both_engines(query, reference, positives, excluded, k)
        assert fast[0] == plain[0]
        assert torch.equal(fast[1], plain[1])
        doubtful += int(plain[1].sum())
    assert doubtful


@needs_numba
@pytest.mark.parametrize("classes", [2, 30, 3000])
@pytest.mark.parametrize(("noise", "copies"), [(0.0, 0), (0.5, 0), (3.0, 0), (0.5, 100)])
def test_a_large_gallery_in_several_tiles(classes, noise, copies, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_COLUMNS", 704)
    monkeypatch.setattr(compiled, "_MANY_POSITIVES", 1000)
    monkeypatch.setattr(compiled, "_ROWS", 50)
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(classes, (n,), generator=generator) for n in (120, 6000)]
    centers = torch.randn(classes, 24, generator=generator)
    query, reference = (noise * centers[y] + torch.randn(len(y), 24, generator=generator) for y in labels)
    reference[5000 : 5000 + copies] = reference[100]
    found = []
    for worth_it in (0, 2**62):
        monkeypatch.setattr(compiled, "_WORTH_IT", worth_it)
        calculator = CrossModelAccuracyCalculator(RANK_METRICS, device="cpu")
        found.append(calculator.get_per_query_accuracy(query, labels[0], reference, labels[1]))
    for name in RANK_METRICS:  # at most a thousandth of a query's own value is left to rounding
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-3, atol=0, equal_nan=True)
        means = [float(one[name].nanmean()) for one in found]
        assert means[0] == pytest.approx(means[1], rel=1e-4 if copies else 2e-6)


@needs_numba
def test_the_compiled_loops_are_used_where_they_fit(monkeypatch):
    query, reference, labels = torch.randn(70, 8), torch.randn(60_000, 8), torch.arange(60_000) % 50
    positives = EqualCodes(labels[:70], labels)
    assert compiled.can_compile(query, Gallery(reference), positives)
    assert not compiled.can_compile(query[:5], Gallery(reference), positives)  # too few to load numba for
    assert not compiled.can_compile(query, Gallery(reference), EqualCodes(labels[:70] * 0, labels * 0))
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    assert not compiled.can_compile(query, Gallery(reference), positives)


@pytest.mark.parametrize("nearest_only", [False, True])
def test_the_nearest_item_alone_gives_the_same(engine, nearest_only):
    for seed in range(60):
        query, reference, positives, excluded = search(seed, whole=seed % 2 == 0)
        every, first = (
            found_first(ranks(query, reference, positives, excluded), len(query))
            for ranks in (ranking.exact_ranks, partial(first_ranks, nearest_only=nearest_only))
        )
        torch.testing.assert_close(first, every, rtol=0, atol=1e-12)


def found_first(found, n_query):
    out = torch.zeros(n_query, dtype=torch.float64)
    for numbers, ranks in found:
        out[numbers] = ranking_metric(ranks)
    return out


def ranking_metric(ranks):

    return torch.where(ranks.relevant > 0, hit_rate(ranks, 1), -1.0)


def test_the_nearest_item_alone_is_all_that_precision_at_1_asks_for(monkeypatch):
    query, reference = torch.randn(30, 8), torch.randn(200, 8)
    labels = torch.arange(200) % 7
    calculator = CrossModelAccuracyCalculator(("precision_at_1", "cmc_top_1"), device="cpu")
    expected = CrossModelAccuracyCalculator(device="cpu").get_per_query_accuracy(query, labels[:30], reference, labels)
    monkeypatch.setattr(np, "sort", lambda *_, **__: pytest.fail("sorted"))
    got = calculator.get_per_query_accuracy(query, labels[:30], reference, labels)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_query_that_is_its_own_only_positive_has_none(engine):
    query = torch.randn(20, 4)
    labels = torch.arange(20)
    ((_, ranks),) = ranking.exact_ranks(query, query, EqualCodes(labels, labels), [SamePosition()])
    assert not ranks.valid.any() and not ranks.relevant.any()


def test_near_copies_and_binary_codes_are_decided_in_float64(engine):
    test_ranking.test_near_copies_behind_nearer_items_are_told_apart()
    test_ranking.test_ties_of_binary_codes_count_as_in_scikit_learn("unit")


def test_the_reciprocal_rank_beside_precision_at_1_has_its_place(engine):
    query, reference = torch.randn(40, 8), torch.randn(300, 8)
    labels = torch.arange(300) % 60
    names = ("precision_at_1", "mean_reciprocal_rank", "cmc_top_3")
    alone = CrossModelAccuracyCalculator(names, device="cpu").get_per_query_accuracy(
        query, labels[:40], reference, labels
    )
    every = CrossModelAccuracyCalculator((*RANK_METRICS, "cmc_top_3"), device="cpu")
    every = every.get_per_query_accuracy(query, labels[:40], reference, labels)
    for name in names:
        torch.testing.assert_close(alone[name], every[name])
    assert 0 < alone["mean_reciprocal_rank"].min() < 0.5
