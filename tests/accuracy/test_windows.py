"""Float64 decisions about the items near positives alone give what sorting all items does, to the last tie."""

import pytest
import torch

from pml_compat.accuracy import compiled, mixed_ranks, ranking
from pml_compat.accuracy.gallery import Gallery
from pml_compat.accuracy.matches import EqualCodes
from tests.accuracy.test_compiled import brute_force, found_ranks, search

SORTED = ranking.sorted_ranks  # before a test looks at who asks for it
pytestmark = pytest.mark.skipif(compiled.kernels() is None, reason="needs numba (extra fast)")


@pytest.fixture(autouse=True)
def every_query_is_unsure(monkeypatch):
    find = compiled.find_places

    def find_and_doubt(own, size, *others):
        ranks, unsure = find(own, size, *others)
        unsure[:] = torch.from_numpy(size > 0)
        return ranks, unsure

    monkeypatch.setattr(compiled, "_WORTH_IT", 0)
    monkeypatch.setattr(compiled, "find_places", find_and_doubt)
    monkeypatch.setattr(mixed_ranks, "find_places", find_and_doubt)


@pytest.fixture
def sorted_queries(monkeypatch):
    """The numbers of queries that windows leave to sorting."""
    queries, sort = [], ranking.sorted_ranks
    for module in (ranking, mixed_ranks):
        monkeypatch.setattr(module, "sorted_ranks", lambda *a: queries.extend(a[2].tolist()) or sort(*a))
    return queries


def by_sorting(query, reference, positives, excluded):
    found = SORTED(query, Gallery(reference), torch.arange(len(query)), positives, excluded)
    return found_ranks(found, len(query))


def check(query, reference, positives, excluded):
    found = found_ranks(ranking.exact_ranks(query, reference, positives, excluded), len(query))
    assert found == by_sorting(query, reference, positives, excluded)


def near_ties(kind, seed):
    """A search in which float32 leaves much open."""
    query, reference, positives, excluded = search(seed, whole=kind == "whole", most=400)
    generator = torch.Generator().manual_seed(seed)
    n = len(reference)
    if kind == "copies":
        reference = reference[torch.randint(max(1, n // 4), (n,), generator=generator)]
    elif kind == "one vector":
        reference = reference[:1].repeat(n, 1)
    elif kind == "near copies":
        reference = reference[torch.randint(max(1, n // 4), (n,), generator=generator)]
        reference = reference + 1e-8 * torch.randn(reference.shape, generator=generator)
    elif kind == "near copies in float64":
        reference = reference.double()[torch.randint(max(1, n // 4), (n,), generator=generator)]
        reference = reference + 1e-8 * torch.randn(reference.shape, generator=generator, dtype=torch.float64)
        query = query.double() + 1e-9
    elif kind == "scaled":
        scale = 1e12 * (1 + 1e-7 * torch.randn(n, 1, generator=generator))
        query, reference = query * 1e10, reference[torch.randint(max(1, n // 4), (n,), generator=generator)] * scale
    elif kind in ("half", "bfloat16"):
        dtype = torch.half if kind == "half" else torch.bfloat16
        query, reference = query.to(dtype), reference.to(dtype)
    elif kind == "unit":
        query, reference = (torch.nn.functional.normalize(rows + 1e-3) for rows in (query, reference))
    if float(query.abs().amax(1).min()) == 0:
        query[:, 0] = 1
    return query, reference, positives, excluded


KINDS = (
    "plain",
    "whole",
    "unit",
    "copies",
    "one vector",
    "near copies",
    "near copies in float64",
    "scaled",
    "half",
    "bfloat16",
)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_what_sorting_does(kind, sorted_queries):
    for seed in range(60):
        check(*near_ties(kind, seed))
    assert not sorted_queries


def test_windows_give_what_brute_force_does(sorted_queries):
    for seed in range(0, 100, 2):
        data = search(seed, whole=True, most=400)
        if float(data[0].abs().amax(1).min()) == 0:
            data[0][:, 0] = 1
        assert found_ranks(ranking.exact_ranks(*data), len(data[0])) == list(brute_force(*data))
    assert not sorted_queries


@pytest.mark.parametrize("kind", ["plain", "near copies", "unit"])
@pytest.mark.parametrize("classes", [2, 30, 3000])
def test_a_large_gallery_in_several_tiles(kind, classes, sorted_queries, monkeypatch):
    """Hardly a wrong item is near, in rows of which few scores matter and in others."""
    monkeypatch.setattr(compiled, "_MOST_COLUMNS", 700)
    monkeypatch.setattr(compiled, "_ROWS", 50)
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(classes, (n,), generator=generator) for n in (120, 6000)]
    query, reference = (torch.randn(n, 24, generator=generator) for n in (120, 6000))
    if kind == "near copies":
        reference[3000:] = reference[:3000] + 1e-8 * torch.randn(3000, 24, generator=generator)
    if kind == "unit":
        query, reference = torch.nn.functional.normalize(query), torch.nn.functional.normalize(reference)
    check(query, reference, EqualCodes(*labels), [])
    assert not sorted_queries


def test_hardly_a_row_is_looked_at(monkeypatch):
    """Not by sorting, nor by having everything listed: 20 positives have few neighbours."""
    listed, decide = [], compiled.decide
    monkeypatch.setattr(compiled, "decide", lambda *a: listed.extend(a[4].size.tolist()) or decide(*a))
    query, reference = torch.randn(50, 16), torch.randn(5000, 16)
    positives = EqualCodes(torch.arange(50) % 250, torch.arange(5000) % 250)
    check(query, reference, positives, [])
    assert 0 < sum(listed) / 50 < 10


def test_too_many_items_near_are_sorted(sorted_queries, monkeypatch):
    """Room for 3 rows a query: one with more of them is not decided here, and the others are."""
    monkeypatch.setattr(compiled.CompiledCounting, "near_rows", lambda self, n: compiled.np.empty(3 * n, "int32"))
    query, reference = torch.randn(40, 8), torch.randn(900, 8)
    labels = torch.arange(900) % 50
    reference[100:106] = reference[0].clone()  # items of labels 0 to 5
    check(query, reference, EqualCodes(labels[:40], labels), [])
    assert sorted(sorted_queries) == [0, 1, 2, 3, 4, 5]


def test_all_items_tied_in_a_large_gallery_are_sorted(sorted_queries, monkeypatch):
    monkeypatch.setattr(compiled, "_NEAR_BYTES", 2**12)
    query, reference = torch.randn(40, 8), torch.randn(1, 8).repeat(900, 1)
    labels = torch.arange(900) % 50
    check(query, reference, EqualCodes(labels[:40], labels), [])
    assert len(sorted_queries) == 40


def test_a_query_is_taken_as_it_was_given(sorted_queries):
    """In float32 the positive would be the nearer of the two."""
    query = torch.tensor([[1 + 1e-9]], dtype=torch.float64)
    reference = torch.tensor([[0.5], [1.5 + 1.5e-9], [7.0]], dtype=torch.float64)
    data = query, reference, EqualCodes(torch.tensor([0]), torch.tensor([0, 1, 1])), []
    check(*data)
    ((_, ranks),) = ranking.exact_ranks(*data)
    assert ranks.closer.tolist() == [[1]] and not sorted_queries


@pytest.mark.parametrize("longer", [1e4, 1e9])
def test_a_tie_that_may_leave_its_window_is_sorted(longer, sorted_queries):
    """To a query far longer than the gallery's rows float64 cannot tell items apart that float32 may."""
    generator = torch.Generator().manual_seed(0)
    query, reference = longer * torch.randn(20, 8, generator=generator), torch.randn(900, 8, generator=generator)
    labels = torch.arange(900) % 50
    check(query, reference, EqualCodes(labels[:20], labels), [])
    assert len(sorted_queries) == (20 if longer > 1e6 else 0)


def test_a_long_chain_of_ties_is_sorted(sorted_queries):
    """Neighbours tie all along a gallery, whose ends are as far apart as float32 begins to tell."""
    query = torch.full((1, 2), 1e-6, dtype=torch.float64)
    for size, decided in ((20_000, True), (200_000, False)):
        reference = 1 + 5e-15 * torch.arange(size, dtype=torch.float64)[:, None].expand(-1, 2)
        labels = (torch.arange(size) != size // 2).long()
        check(query, reference, EqualCodes(torch.tensor([0]), labels), [])
        assert sorted_queries == ([] if decided else [0])


def test_distances_are_computed_a_few_queries_at_a_time(sorted_queries, monkeypatch):
    from pml_compat.accuracy import windows

    monkeypatch.setattr(windows, "_BYTES", 1000)
    for seed in range(20):
        check(*near_ties("copies", seed))
    assert not sorted_queries


@pytest.mark.parametrize("kind", ["plain", "whole", "copies", "near copies", "near copies in float64", "unit"])
def test_galleries_that_are_replaced_step_by_step(kind, sorted_queries):
    for seed in range(30):
        query, old, positives, excluded = near_ties(kind, seed)
        new = near_ties(kind, seed)[1].roll(1, 1)
        if seed % 2:
            new[::2] = old[::2]
        steps = sorted({0, len(old) // 3, len(old) // 2, len(old)})
        found = [[] for _ in steps]
        for step, *part in mixed_ranks.mixed_ranks(query, old, new, positives, excluded, steps):
            found[step].append(part)
        for step, until in enumerate(steps):
            expected = by_sorting(query, torch.cat([new[:until], old[until:]]), positives, excluded)
            assert found_ranks(found[step], len(query)) == expected
    assert not sorted_queries


@pytest.mark.slow
def test_windows_give_what_sorting_does_2000_times(sorted_queries):
    for seed in range(2000):
        check(*near_ties(KINDS[seed % len(KINDS)], seed))
    assert not sorted_queries
