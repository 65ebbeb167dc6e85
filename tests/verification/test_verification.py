import contextlib
import dataclasses
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pml_compat.verification import carry_thresholds, pair_scores, tar_at_far, thresholds, tpir_at_fpir, verification
from tests.pairwise import pairwise

FARS = (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0)


def naive_point(genuine, impostors, far):
    """The (TAR, FAR) of the lowest threshold among all scores whose FAR is at most ``far``: the definition."""
    for threshold in np.unique(np.concatenate([genuine, impostors])):
        if (impostors >= threshold).mean() <= far:
            return (genuine >= threshold).mean(), (impostors >= threshold).mean()
    return 0.0, 0.0


def naive_scores(query, reference, decimals=9):
    """Cosine similarities in float64; rounding makes those equal that are by arithmetic."""
    query, reference = (np.asarray(side, dtype=np.float64) for side in (query, reference))
    norms = [np.maximum(np.sqrt((side**2).sum(1)), 1e-300) for side in (query, reference)]
    return np.round((query / norms[0][:, None]) @ (reference / norms[1][:, None]).T, decimals)


def naive_pairs(query, query_labels, reference, reference_labels, excluded=None, decimals=9):
    scores = naive_scores(query, reference, decimals)
    same = np.asarray(query_labels)[:, None] == np.asarray(reference_labels)
    kept = np.ones_like(same) if excluded is None else ~excluded
    return scores[same & kept], scores[~same & kept]


def naive_verification(*data, fars, excluded=None):
    genuine, impostors = naive_pairs(*data, excluded)
    return {far: naive_point(genuine, impostors, far) for far in fars}


def points(result):
    return {far: (point.tar, point.far) for far, point in result.at_far.items()}


def assert_thresholds_do_what_they_say(result, *pairs):
    genuine, impostors = naive_pairs(*pairs, decimals=14)
    for point in result.at_far.values():
        measured = (genuine >= point.threshold).mean(), (impostors >= point.threshold).mean()
        assert (point.tar, point.far) == measured


def data(seed, ties=False, n=(40, 60), width=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(classes, (rows,), generator=generator) for rows in n]
    if ties:
        sides = [torch.randint(-1, 2, (rows, width), generator=generator).float() for rows in n]
    else:
        centers = torch.randn(classes, width, generator=generator)
        sides = [centers[label] + torch.randn(len(label), width, generator=generator) for label in labels]
    return sides[0], labels[0], sides[1], labels[1]


@contextlib.contextmanager
def settings(module, **values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        yield


def in_bins():
    return settings(thresholds, _float32_is_float32=lambda: False)


class Jitter(TorchDispatchMode):
    """Matrix products whose last bits depend on where a row stands, as those of some BLAS kernels do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.mm:
            column = torch.arange(out.shape[1], dtype=out.dtype)
            out += (column % 3 - 1) * torch.finfo(out.dtype).eps
        return out


# tar_at_far


def test_tar_at_far_by_hand():
    # Impostors at 0.8, 0.5 and 0.1: a third of them is accepted from just above 0.5 on, none from just above 0.8 on.
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1])
    same = np.array([True, False, True, True, False, True, False])
    expected = {0.33: 1 / 4, 0.34: 3 / 4, 0.66: 3 / 4, 0.67: 1.0, 1e-9: 1 / 4, 1.0: 1.0}
    assert tar_at_far(scores, same, list(expected)) == expected
    for far, tar in expected.items():
        got = tar_at_far(scores, same, far)
        assert type(got) is float
        assert got == tar


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_tar_at_far_is_the_definition(seed, ties):
    rng = np.random.default_rng(seed)
    same = rng.random(400) < 0.3
    scores = np.round(rng.normal(size=400) + same, 1 if ties else 12)
    expected = {far: naive_point(scores[same], scores[~same], far)[0] for far in FARS}
    assert tar_at_far(scores, same, FARS) == expected
    assert tar_at_far(torch.from_numpy(scores), torch.from_numpy(same), np.array(FARS)) == expected


def test_tied_impostors_are_accepted_together_or_not_at_all():
    scores = np.array([0.5, 0.5, 0.5, 0.5, 0.2, 0.5, 0.6])
    same = np.array([False] * 5 + [True, True])
    assert tar_at_far(scores, same, [0.2, 0.79, 0.8]) == {0.2: 0.5, 0.79: 0.5, 0.8: 1.0}
    assert tar_at_far(np.zeros(6), np.arange(6) < 3, [0.99, 1.0]) == {0.99: 0.0, 1.0: 1.0}


def test_a_share_that_is_a_whole_number_of_impostors_is_all_of_them():
    for count, number in itertools.product(range(1, 101), (100, 99, 70)):
        if count <= number:
            scores = np.arange(number + 1) / 1.0
            scores[-1] = number - count - 0.5  # genuine: accepted with exactly count impostors
            same = np.arange(number + 1) == number
            assert tar_at_far(scores, same, count / number) == 1.0
            assert tar_at_far(scores, same, np.nextafter(count / number, 0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_scores_of_any_type(dtype):
    scores = torch.tensor([4, 3, 2, 1]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert tar_at_far(scores, torch.tensor([True, False, True, False]), 0.5) == 1.0
    assert tar_at_far(scores, torch.tensor([True, False, True, False]), 0.4) == 0.5


@pytest.mark.parametrize(
    ("scores", "same", "far", "message"),
    [
        (np.ones((2, 2)), np.ones((2, 2), bool), 0.1, r"scores must be 1-dimensional, \(P,\), got shape \(2, 2\)"),
        (np.ones(3), np.ones(3), 0.1, r"same must be bool, got torch.float64; convert it with .bool\(\)"),
        (np.ones(3), np.ones(2, bool), 0.1, r"same must have one entry a score: expected \(3,\), got \(2,\)"),
        (np.ones(2, bool), np.ones(2, bool), 0.1, "scores must be real numbers, got torch.bool"),
        (np.ones(2, complex), np.ones(2, bool), 0.1, "scores must be real numbers, got torch.complex128"),
        ([1.0], np.ones(1, bool), 0.1, "scores must be a torch.Tensor or a numpy.ndarray, got list"),
        (np.array([0.1, math.nan]), np.array([True, False]), 0.1, "scores must be finite, row 1 has a NaN"),
        (np.array([0.1, math.inf]), np.array([True, False]), 0.1, "scores must be finite, row 1 has a NaN or an inf"),
        (np.ones(2), np.ones(2, bool), 0.1, "same must make at least one .* pair, got no impostor pair"),
        (np.ones(2), np.zeros(2, bool), 0.1, "same must make at least one .* pair, got no genuine pair"),
        (np.ones(0), np.zeros(0, bool), 0.1, "got no genuine pair"),
        (np.ones(2), np.array([True, False]), 0.0, r"far must be above 0 and at most 1, got 0.0"),
        (np.ones(2), np.array([True, False]), 1.5, r"far must be above 0 and at most 1, got 1.5"),
        (np.ones(2), np.array([True, False]), math.nan, r"far must be above 0 and at most 1, got nan"),
        (np.ones(2), np.array([True, False]), [0.1, "1"], r"far must be above 0 and at most 1, got '1'"),
        (np.ones(2), np.array([True, False]), True, r"far must be above 0 and at most 1, got True"),
        (np.ones(2), np.array([True, False]), [], r"far must hold at least one rate, got none"),
    ],
)
def test_unusable_scores_are_named(scores, same, far, message):
    with pytest.raises(ValueError, match=message):
        tar_at_far(scores, same, far)


# verification


def test_verification_by_hand():
    # Query at 0 degrees, gallery at 10 and 40 (its own), 20 and 60 (others).
    angles = torch.deg2rad(torch.tensor([10.0, 20.0, 40.0, 60.0]))
    reference = torch.stack([3 * angles.cos(), 3 * angles.sin()], dim=1)
    labels = torch.tensor([7, 8, 7, 9])
    result = verification(torch.tensor([[2.0, 0.0]]), labels[:1], reference, labels, fars=(0.4, 0.5, 1.0))
    assert points(result) == {0.4: (0.5, 0.0), 0.5: (1.0, 0.5), 1.0: (1.0, 1.0)}
    assert (result.genuine_pairs, result.impostor_pairs) == (2, 2)
    expected = [math.cos(math.radians(20)), math.cos(math.radians(60)), -1.0]
    assert list(result.thresholds.values()) == pytest.approx(expected, abs=1e-7)  # float32 gallery
    assert result.thresholds[0.4] == result.at_far[0.4].threshold


@pairwise
@pytest.mark.parametrize("search", [contextlib.nullcontext, in_bins])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_verification_is_the_definition(seed, ties, search):
    for shape in ({}, {"n": (1, 50), "classes": 2}, {"n": (70, 30), "classes": 20, "width": 24}):
        pairs = data(seed, ties, **shape)
        with search():
            result = verification(*pairs, fars=FARS)
        assert points(result) == naive_verification(*pairs, fars=FARS)
        genuine, impostors = naive_pairs(*pairs)
        assert (result.genuine_pairs, result.impostor_pairs) == (len(genuine), len(impostors))
        assert_thresholds_do_what_they_say(result, *pairs)


@pairwise
@pytest.mark.parametrize("search", [contextlib.nullcontext, in_bins])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_item_is_no_pair_with_itself(seed, ties, search):
    old, labels, _, _ = data(seed, ties)
    new = old + torch.randint(-1, 2, old.shape, generator=torch.Generator().manual_seed(seed))
    same = np.eye(40, dtype=bool)
    with search():
        result = verification(new, labels, old, labels, ref_includes_query=True, fars=FARS)
    assert points(result) == naive_verification(new, labels, old, labels, fars=FARS, excluded=same)
    assert result.genuine_pairs + result.impostor_pairs == 40 * 39
    assert points(result) != points(verification(new, labels, old, labels, fars=FARS))


def test_a_gallery_that_goes_on_after_the_queries():
    reference, labels, _, _ = data(0)
    query, own = reference[:15] + 0.1, labels[:15]
    got = verification(query, own, reference, labels, ref_includes_query=True, fars=FARS)
    excluded = np.eye(15, 40, dtype=bool)
    assert points(got) == naive_verification(query, own, reference, labels, fars=FARS, excluded=excluded)


def test_ids_tell_the_same_items_in_any_order():
    old, labels, _, _ = data(1, ties=True)
    new = old.flip(1) + old
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    expected = verification(new, labels, old, labels, ref_includes_query=True, fars=FARS)
    for ids in (np.array([f"item {i}" for i in range(40)]), torch.arange(40) - 7, np.arange(40, dtype=np.uint64)):
        shuffled = {"query_ids": ids, "reference_ids": ids[order]}
        assert verification(new, labels, old[order], labels[order], fars=FARS, **shuffled) == expected
    ids = {"query_ids": torch.arange(40) + 2**60, "reference_ids": np.arange(40, dtype=np.uint64) + 2**60}
    assert verification(new, labels, old, labels, fars=FARS, **ids) == expected


@pytest.mark.parametrize("search", [contextlib.nullcontext, in_bins])
def test_ids_may_be_of_several_items_and_of_several_labels(search):
    pairs = data(2)
    ids = torch.arange(40) % 7, torch.arange(60) % 11
    with search():
        result = verification(*pairs, query_ids=ids[0], reference_ids=ids[1], fars=FARS)
    excluded = (ids[0][:, None] == ids[1]).numpy()
    assert points(result) == naive_verification(*pairs, fars=FARS, excluded=excluded)
    same = (pairs[1][:, None] == pairs[3]).numpy()
    counts = (same & ~excluded).sum(), (~same & ~excluded).sum()
    assert (result.genuine_pairs, result.impostor_pairs) == counts


def test_without_a_gallery_the_queries_are_it():
    query, labels, _, _ = data(3)
    expected = verification(query, labels, query, labels, ref_includes_query=True, fars=FARS)
    assert verification(query, labels, fars=FARS) == expected
    ids = torch.arange(40)
    assert verification(query, labels, fars=FARS, query_ids=ids) == expected
    pairs_of_items = verification(query, labels, fars=FARS, query_ids=ids // 2)
    assert pairs_of_items.genuine_pairs + pairs_of_items.impostor_pairs == 40 * 38


SMALL = [
    {"_BLOCK": (1, 1), "_OWN_LABEL_ROWS": 1},
    {"_BLOCK": (7, 3), "_OWN_LABEL_ROWS": 2, "_GATHERED": 1},
    {"_BLOCK": (16, 8), "_PREPARED": 100, "_OWN_LABEL_ROWS": 5, "_GATHERED": 64},
    {"_BLOCK": (3, 100), "_PREPARED": 1},
]


@pytest.mark.parametrize(
    ("seed", "ties", "jitter"), [(0, False, False), (0, True, True), (1, False, True), (1, True, False)]
)
def test_chunk_sizes_change_nothing(seed, ties, jitter):
    pairs = data(seed, ties, n=(20, 30), classes=6)
    options = {
        "fars": FARS,
        "thresholds": (0.0, 0.5),
        "query_ids": torch.arange(20),
        "reference_ids": torch.arange(30) // 2,
    }
    expected = verification(*pairs, **options)
    with Jitter() if jitter else contextlib.nullcontext():
        for sizes in SMALL:
            with settings(pair_scores, **sizes):
                assert verification(*pairs, **options) == expected
        with settings(pair_scores, **SMALL[2]), in_bins():
            assert verification(*pairs, **options) == expected
        for reach in (0, 1, 3):  # bands that may miss their ranks
            with settings(thresholds, _SURE=0, _AT_LEAST=reach):
                assert verification(*pairs, **options) == expected


@pytest.fixture
def in_bins_calls(monkeypatch):
    calls, count_in_bins = [], thresholds._count_in_bins
    monkeypatch.setattr(thresholds, "_count_in_bins", lambda *args: (calls.append(args), count_in_bins(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("far", "rising"),
    [(1e-5, True), (1e-5, False), (2e-3, True), (0.1, False), (0.5, True), (0.99, False), ((1e-4, 0.01, 0.3), True)],
)
def test_one_pass_serves_any_rate_and_keeps_few_pairs(far, rising, monkeypatch, in_bins_calls):
    sides = torch.linspace(*((1.5, 0.5) if rising else (0.5, 1.5)), 400).double(), torch.linspace(0, 0.3, 50).double()
    query, reference = (torch.stack([angles.cos(), angles.sin()], dim=1) for angles in sides)
    labels = torch.arange(400) // 8, torch.arange(50)
    passes, kept = [], []
    resolve = thresholds._resolve
    for name in ("over_impostor_blocks", "impostor_blocks", "genuine_blocks"):
        call = getattr(pair_scores.PairScores, name)
        monkeypatch.setattr(
            pair_scores.PairScores, name, lambda *args, name=name, call=call: (passes.append(name), call(*args))[1]
        )
    monkeypatch.setattr(
        thresholds, "_resolve", lambda pairs, band, rank: (kept.append(band.size), resolve(pairs, band, rank))[1]
    )
    result = verification(query, labels[0], reference, labels[1], fars=far)
    rates = [far] if isinstance(far, float) else far
    assert points(result) == naive_verification(query, labels[0], reference, labels[1], fars=rates)
    assert passes == ["over_impostor_blocks", "genuine_blocks"]
    assert not in_bins_calls
    assert 0 < max(kept) < 0.35 * result.impostor_pairs


def test_rates_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Blocks of 16 queries: each of four threads has several, of labels that lie across them."""
    pairs, before = data(0, n=(200, 300)), torch.get_num_threads()
    monkeypatch.setattr(pair_scores, "_BLOCK", (16, 64))
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with torch.inference_mode():
                found.append(verification(*pairs, fars=FARS, thresholds=[0.3]))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("reach", [0, 2])
def test_a_band_that_misses_its_rank_is_noticed(reach, monkeypatch, in_bins_calls):
    """Pairs drawn from other scores than there are: bands too high, too low, or too narrow for float32."""
    pairs = data(0, n=(60, 80))
    expected = naive_verification(*pairs, fars=FARS)
    monkeypatch.setattr(thresholds, "_SURE", 0)
    monkeypatch.setattr(thresholds, "_AT_LEAST", reach)
    for shift in (-0.3, 0.0, 0.3):
        draw = pair_scores.PairScores.draw_impostors
        with settings(
            pair_scores.PairScores,
            draw_impostors=lambda self, n, draw=draw, shift=shift: draw(self, n) + shift * pair_scores.GRID,
        ):
            assert points(verification(*pairs, fars=FARS)) == expected
    assert len(in_bins_calls) >= 2


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_and_the_names_of_labels_change_nothing(seed, ties):
    query, query_labels, reference, reference_labels = data(seed, ties)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(40, generator=generator), torch.randperm(60, generator=generator)
    names = torch.tensor([2**62, -(2**63), 2**62 + 1, 0])
    options = {"fars": FARS, "thresholds": [0.5]}
    expected = verification(query, query_labels, reference, reference_labels, **options)
    shuffled = query[rows], names[query_labels[rows]], reference[columns], names[reference_labels[columns]]
    with Jitter():
        assert verification(*shuffled, **options) == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rotations_and_lengths_change_nothing(seed, ties):
    query, query_labels, reference, reference_labels = data(seed, ties)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    expected = verification(query, query_labels, reference, reference_labels, fars=FARS)
    turned = [side.double() @ rotation for side in (query, reference)]
    scaled = [
        side * torch.rand(len(side), 1, generator=generator).add(1e-3).mul(s)
        for side, s in ((query, 1e-20), (reference, 1e20))
    ]
    for sides in (turned, scaled):
        got = verification(sides[0], query_labels, sides[1], reference_labels, fars=FARS)
        assert points(got) == points(expected)
        assert list(got.thresholds.values()) == pytest.approx(list(expected.thresholds.values()), abs=1e-6)


def test_the_near_threshold_pairs_are_told_apart_beyond_float32():
    """Impostors 1e-9 apart: one score in float32."""
    angles = 0.7 + 1e-9 * torch.arange(40, dtype=torch.float64)
    reference = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.arange(40) % 2  # genuine pairs in between
    query, own = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0])
    assert len(set((query.float() @ reference.float().t()).flatten().tolist())) < 5
    expected = {far: (math.ceil(20 * far + 1) / 20, far) for far in (0.05, 0.25, 0.5)}
    for search in (contextlib.nullcontext, in_bins):
        with search():
            assert points(verification(query, own, reference, labels, fars=list(expected))) == expected
            thresholds_of = verification(query, own, reference, labels, fars=0.25).thresholds
            carried = verification(query, own, reference, labels, thresholds=thresholds_of).at_threshold[0.25]
            assert (carried.tar, carried.far) == expected[0.25]


@pytest.mark.parametrize("edge", [-3, 3])
def test_a_band_whose_edge_is_within_rounding_of_its_rank_is_not_relied_on(edge, monkeypatch, in_bins_calls):
    """Impostors 1e-9 apart, on either side of the edge in a float32 whose last bit is not to be trusted."""
    angles = 0.7 + 1e-9 * torch.arange(40, dtype=torch.float64)
    reference, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.arange(40) % 2
    monkeypatch.setattr(thresholds, "_SURE", 0)
    monkeypatch.setattr(thresholds, "_AT_LEAST", 0)
    monkeypatch.setattr(
        pair_scores.PairScores,
        "draw_impostors",
        lambda self, _: np.full(1000, (math.cos(0.7) - edge * self.float32_error) * pair_scores.GRID),
    )
    expected = {far: (math.ceil(20 * far + 1) / 20, far) for far in (0.25, 0.5, 0.75)}
    for far, point in expected.items():
        with Jitter():
            got = verification(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]), reference, labels, fars=far)
        assert points(got) == {far: point}
    assert len(in_bins_calls) == 3


def test_ties_too_many_to_keep_take_the_other_way(monkeypatch, in_bins_calls):
    monkeypatch.setattr(thresholds, "_MOST_KEPT", 1000)
    query = torch.eye(3).repeat(50, 1)
    labels = torch.arange(150) // 2
    for far in (0.01, 0.4):  # among the ones, among the zeros
        expected = naive_verification(query, labels, query, labels, fars=[far])
        assert points(verification(query, labels, query, labels, fars=far)) == expected
    assert len(in_bins_calls) == 2
    genuine, impostors = naive_pairs(query, labels, query, labels)
    got = verification(query, labels, query, labels, fars=1.0, thresholds=[0.0, 1.0]).at_threshold
    assert {t: (point.tar, point.far) for t, point in got.items()} == {
        t: ((genuine >= t).mean(), (impostors >= t).mean()) for t in (0.0, 1.0)
    }
    assert len(in_bins_calls) == 3


@pytest.mark.parametrize("precision", ["high", "medium", None])
def test_products_of_less_than_float32_are_not_relied_on(precision, monkeypatch):
    def told():
        if precision is None:
            raise RuntimeError("mix of the legacy and new APIs")
        return precision

    class Coarse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket is torch.ops.aten.mm and out.dtype == torch.float32:
                out += (torch.arange(out.shape[1]) % 3 - 1) * 2.0**-7
            return out

    monkeypatch.setattr(torch, "get_float32_matmul_precision", told)
    pairs = data(0)
    with Coarse():
        assert points(verification(*pairs, fars=FARS)) == naive_verification(*pairs, fars=FARS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_of_any_type_are_left_as_they_are(dtype):
    query, query_labels, reference, reference_labels = data(4)
    query, reference = query.to(dtype).requires_grad_(), reference.to(dtype).t().contiguous().t()
    before = [side.detach().clone() for side in (query, query_labels, reference, reference_labels)]
    with torch.autocast("cpu", torch.bfloat16):
        got = verification(query, query_labels.int(), reference, reference_labels, fars=FARS)
    for side, copy in zip((query, query_labels, reference, reference_labels), before, strict=True):
        assert torch.equal(side, copy)
        assert side.dtype == copy.dtype
    arrays = (
        query.detach().double().numpy(),
        query_labels.numpy(),
        reference.double().numpy(),
        reference_labels.numpy(),
    )
    assert points(got) == naive_verification(*arrays, fars=FARS)
    if dtype not in (torch.float16, torch.bfloat16):
        arrays = (query.detach().numpy(), query_labels.numpy(), reference.numpy(), reference_labels.numpy())
    assert verification(*arrays, fars=FARS) == got


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
def test_a_query_of_another_width_is_fitted_to_the_gallery(widths):
    pairs = data(5)
    query, reference = pairs[0][:, : widths[0]], pairs[2][:, : widths[1]]
    fitted = np.zeros((40, widths[1]))
    fitted[:, : min(widths)] = query[:, : min(widths)].numpy()
    with pytest.raises(ValueError, match="query must be as wide as reference"):
        verification(query, pairs[1], reference, pairs[3], fars=FARS)
    got = verification(query, pairs[1], reference, pairs[3], fars=FARS, fit_width=True)
    assert points(got) == naive_verification(fitted, pairs[1], reference, pairs[3], fars=FARS)


def test_a_row_of_zeros_is_like_nothing():
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    result = verification(torch.zeros(1, 2), torch.tensor([0]), reference, torch.arange(3), thresholds=[0.0, 1e-9])
    assert [(point.tar, point.far) for point in result.at_threshold.values()] == [(1.0, 1.0), (0.0, 0.0)]


def test_labels_on_one_side_only_count_as_impostors():
    query, reference = torch.eye(2), torch.eye(2).repeat(2, 1)
    result = verification(query, torch.tensor([5, 1]), reference, torch.tensor([1, 0, 9, 1]), fars=1.0)
    assert (result.genuine_pairs, result.impostor_pairs) == (2, 6)
    assert result.at_far[1.0].tar == result.at_far[1.0].far == 1.0


@pairwise
@pytest.mark.parametrize("search", [contextlib.nullcontext, in_bins])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_given_accept_what_equals_them(seed, ties, search):
    pairs = data(seed, ties)
    genuine, impostors = naive_pairs(*pairs)
    given = {"half": 0.5, "right": 0.0, 3: -0.25, "all": -1.0, "none": 1 + 1e-11}
    with search():
        got = verification(*pairs, fars=0.1, thresholds=given)
    assert list(got.at_threshold) == list(given)
    for name, threshold in given.items():
        point = got.at_threshold[name]
        assert point.threshold == pytest.approx(threshold, abs=1e-11)
        assert (point.tar, point.far) == ((genuine >= threshold).mean(), (impostors >= threshold).mean())
    assert got.at_far == verification(*pairs, fars=0.1).at_far
    assert list(verification(*pairs, thresholds=0.5).at_threshold) == [0.5]
    if ties:
        assert (impostors == 0.5).any() and (impostors == 0).any()


@pytest.mark.parametrize("ties", [False, True])
def test_its_own_thresholds_give_a_result_again(ties):
    pairs = data(6, ties)
    first = verification(*pairs, fars=FARS)
    second = verification(*pairs, fars=0.2, thresholds=first.thresholds)
    assert second.at_threshold == first.at_far


@pytest.mark.parametrize("fars", [1e-3, 0.3])
def test_no_matrix_of_all_pairs_is_ever_made(fars):
    class LargestTensor(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    pairs = data(0, n=(3000, 3000), width=4)
    blocks = settings(pair_scores, _BLOCK=(256, 256), _PREPARED=1, _GATHERED=2**14)
    with blocks, settings(thresholds, _MOST_KEPT=50_000), LargestTensor() as largest:
        tracemalloc.start()
        verification(*pairs, fars=fars, thresholds=[0.3])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    block, histogram = 256 * 256 * 8, 0 if fars < 0.1 else thresholds._BIN * 8
    assert largest.bytes <= max(block, histogram) < 3000 * 3000 / 2
    assert peak < 6 * block + 4 * histogram


@pytest.mark.parametrize(("classes", "others", "blocks"), [(1, 0, 4), (2, 0.3, 12), (50, 15, 4), (400, 700, 4)])
def test_genuine_pairs_are_looked_at_with_few_others_in_few_blocks(classes, others, blocks):
    labels = torch.arange(1000) % classes
    with settings(pair_scores, _BLOCK=(512, 1024)):
        pairs = pair_scores.PairScores(torch.ones(1000, 2), labels, torch.ones(1000, 2), labels)
        found = [(block.numel(), int(torch.isfinite(block).sum())) for block in pairs.genuine_blocks()]
    assert sum(finite for _, finite in found) == pairs.genuine
    assert sum(size for size, _ in found) <= (1 + others) * pairs.genuine
    assert len(found) <= blocks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ties", [False, True])
def test_a_gpu_gives_the_same_numbers(ties):
    pairs = data(7, ties)
    expected = verification(*pairs, fars=FARS, thresholds=[0.5])
    assert verification(*pairs, fars=FARS, thresholds=[0.5], device="cuda") == expected
    moved = [side.cuda() for side in pairs]
    assert verification(*moved, fars=FARS, thresholds=[0.5]) == expected
    with in_bins():
        assert verification(*moved, fars=FARS, thresholds=[0.5]) == expected


def test_the_device_is_that_of_the_gallery_unless_named():
    pairs = data(7)
    assert pair_scores.PairScores(*pairs).device == pair_scores.PairScores(*pairs, device="cpu").device
    assert pair_scores.PairScores(*pairs, device="mps").device.type == "cpu"  # no float64 there
    assert verification(*pairs, device=torch.device("cpu")) == verification(*pairs, device=None)


def test_a_result_is_frozen():
    result = verification(*data(0))
    for owner, name in ((result, "at_far"), (result.at_far[1e-3], "tar")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, None)


LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.full((4, 2), math.nan)}, "query must be finite, row 0 has a NaN or an infinity"),
        ({"reference": torch.full((4, 2), math.inf)}, "reference must be finite, row 0 has a NaN or an infinity"),
        ({"query": torch.ones(0, 2)}, r"query must not be empty, got shape \(0, 2\)"),
        ({"reference": torch.ones(0, 2)}, r"reference must not be empty, got shape \(0, 2\)"),
        ({"query": torch.ones(4)}, r"query must be 2-dimensional, \(N, D\), got shape \(4,\)"),
        ({"query_labels": LABELS[:3]}, r"query_labels must have shape \(4,\), got \(3,\)"),
        ({"reference_labels": LABELS[:3]}, r"reference_labels must have shape \(4,\), got \(3,\)"),
        ({"reference_labels": None}, "reference_labels must be given, got None"),
        ({"reference": None}, "reference must be given with reference_labels or reference_ids, got None"),
        ({"reference_labels": LABELS + 2}, "query_labels and reference_labels must make .* got no genuine pair"),
        ({"query_labels": LABELS * 0, "reference_labels": LABELS * 0}, "must make .* got no impostor pair"),
        ({"query_ids": torch.arange(4)}, "reference_ids must be given with query_ids, got None"),
        ({"reference_ids": torch.arange(4)}, "query_ids must be given with reference_ids, got None"),
        (
            {"query_ids": torch.arange(4), "reference_ids": torch.arange(3)},
            r"reference_ids must have shape \(4,\), got \(3,\)",
        ),
        (
            {"query_ids": torch.arange(3), "reference_ids": torch.arange(4)},
            r"query_ids must have shape \(4,\), got \(3,\)",
        ),
        (
            {"ref_includes_query": True, "query_ids": torch.arange(4), "reference_ids": torch.arange(4)},
            "ref_includes_query must be False where query_ids tell which items are the same",
        ),
        (
            {"ref_includes_query": True, "reference": torch.ones(3, 2), "reference_labels": LABELS[:3]},
            "reference must hold every query with ref_includes_query=True, got 3 rows for 4 queries",
        ),
        (
            {"ref_includes_query": True, "reference_labels": LABELS.flip(0)},
            "reference_labels must begin with query_labels with ref_includes_query=True",
        ),
        ({"fars": (0.1, 0)}, "fars must be above 0 and at most 1, got 0"),
        ({"fars": 1.01}, "fars must be above 0 and at most 1, got 1.01"),
        ({"fars": ()}, "fars must hold at least one rate, got none"),
        ({"thresholds": [math.nan]}, "thresholds must be cosine similarities, from -1 to 1, got nan"),
        ({"thresholds": {"strict": 1.5}}, "thresholds must be cosine similarities, from -1 to 1, got 1.5"),
        ({"thresholds": ["0.5"]}, "thresholds must be cosine similarities, from -1 to 1, got '0.5'"),
        ({"thresholds": True}, "thresholds must be cosine similarities, from -1 to 1, got True"),
    ],
)
def test_unusable_arguments_are_named(changes, message):
    arguments = {"query": torch.ones(4, 2), "query_labels": LABELS, "reference": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=message):
        verification(**arguments | {"reference_labels": LABELS} | changes)


def test_excluded_pairs_may_leave_none():
    with pytest.raises(ValueError, match="got no genuine pair"):
        verification(torch.eye(3), torch.arange(3))


# carry_thresholds


@pytest.fixture
def upgrade():
    old, labels, gallery, gallery_labels = data(8, n=(50, 70))
    generator = torch.Generator().manual_seed(8)
    # The new model's embeddings share a direction: all similarities rise.
    new, new_gallery = (
        torch.cat([side + 1.5, torch.randn(len(side), 2, generator=generator)], dim=1) for side in (old, gallery)
    )
    return old, new, labels, gallery, new_gallery, gallery_labels


def test_carried_over_thresholds_of_a_gallery_and_its_re_embedding(upgrade):
    old, new, labels, gallery, new_gallery, gallery_labels = upgrade
    fars = (0.01, 0.1)
    results = carry_thresholds(*upgrade, fars=fars, fit_width=True)
    assert list(results) == ["old_to_old", "new_to_old", "new_to_new"]
    assert results["old_to_old"] == verification(old, labels, gallery, gallery_labels, fars=fars)
    carried = results["old_to_old"].thresholds
    for name, side in (("new_to_old", gallery), ("new_to_new", new_gallery)):
        assert results[name] == verification(
            new, labels, side, gallery_labels, fars=fars, thresholds=carried, fit_width=True
        )
    # By the definition: false accepts of the new pairs at the old threshold.
    fitted = np.pad(new.numpy(), ((0, 0), (0, 0)))[:, :5]
    for far in fars:
        genuine, impostors = naive_pairs(fitted, labels, gallery, gallery_labels)
        point = results["new_to_old"].at_threshold[far]
        assert point.threshold == carried[far]
        assert (point.tar, point.far) == ((genuine >= carried[far]).mean(), (impostors >= carried[far]).mean())
        assert results["new_to_old"].at_far[far].far <= far
        assert results["new_to_new"].at_threshold[far].far > 2 * far


def test_carried_over_thresholds_of_a_gallery_that_stays(upgrade):
    old, new, labels, gallery, _, gallery_labels = upgrade
    results = carry_thresholds(old, new, labels, gallery, None, gallery_labels, fars=0.1, fit_width=True)
    expected = carry_thresholds(*upgrade, fars=0.1, fit_width=True)
    assert results == {name: expected[name] for name in ("old_to_old", "new_to_old")}


def test_carried_over_thresholds_of_queries_that_are_the_gallery(upgrade):
    old, new, labels, *_ = upgrade
    results = carry_thresholds(old, new, labels, fars=0.1, fit_width=True)
    assert results == carry_thresholds(
        old, new, labels, old, new, labels, fars=0.1, ref_includes_query=True, fit_width=True
    )
    assert results["new_to_old"].genuine_pairs + results["new_to_old"].impostor_pairs == 50 * 49
    ids = torch.arange(50) // 2
    results = carry_thresholds(old, new, labels, fars=0.1, query_ids=ids, fit_width=True)
    ids = {"query_ids": ids, "reference_ids": ids}
    assert results == carry_thresholds(old, new, labels, old, new, labels, fars=0.1, **ids, fit_width=True)


def test_a_new_model_that_is_the_old_one_keeps_its_rates(upgrade):
    old, _, labels, gallery, _, gallery_labels = upgrade
    results = carry_thresholds(old, old, labels, gallery, gallery, gallery_labels, fars=(0.01, 0.1))
    for result in results.values():
        assert result.at_far == results["old_to_old"].at_far
    for name in ("new_to_old", "new_to_new"):
        assert results[name].at_threshold == results["old_to_old"].at_far


def test_unusable_upgrades_are_named(upgrade):
    old, new, labels, gallery, new_gallery, gallery_labels = upgrade
    message = "old_reference must be given with new_reference or reference_labels, got None"
    for arguments in ((None, new_gallery), (None, None, gallery_labels)):
        with pytest.raises(ValueError, match=message):
            carry_thresholds(old, new, labels, *arguments)
    with pytest.raises(ValueError, match="new_query must have the rows of old_query: expected 50, got 49"):
        carry_thresholds(old, new[1:], labels)
    with pytest.raises(ValueError, match="new_reference must have the rows of old_reference: expected 70, got 69"):
        carry_thresholds(old, new, labels, gallery, new_gallery[1:], gallery_labels)
    with pytest.raises(ValueError, match="reference_labels must be given, got None"):
        carry_thresholds(old, new, labels, gallery)
    with pytest.raises(TypeError, match="thresholds"):
        carry_thresholds(old, new, labels, thresholds=[0.5])


# tpir_at_fpir


def naive_tpir(query, query_labels, reference, reference_labels, fpir, excluded=None):
    scores = naive_scores(query, reference)
    if excluded is not None:
        scores[excluded] = -np.inf
    same = np.asarray(query_labels)[:, None] == np.asarray(reference_labels)
    known = (same & np.isfinite(scores)).any(1)
    best = scores.max(1)
    right_alone = np.array([(own[row == row.max()]).all() for own, row in zip(same, scores, strict=True)])
    for threshold in (-np.inf, *np.unique(best), np.inf):
        if (best[~known] >= threshold).mean() <= fpir:
            return (right_alone[known] & (best[known] >= threshold)).mean()
    raise AssertionError


def probes(seed, ties):
    query, query_labels, reference, reference_labels = data(seed, ties, n=(40, 25), classes=12)
    return query, query_labels, reference, reference_labels.clamp_max(7)  # labels 8 to 11 are not in the gallery


def test_tpir_by_hand():
    # Gallery a, b at 0 and 90 degrees. Known probes: a at 5, a at 60 (nearer to b), b at 70. Unknown: at 10 and 45.
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    angles = torch.deg2rad(torch.tensor([5.0, 60.0, 70.0, 10.0, 45.0])).double()
    query = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 2, 3])
    expected = {0.4: 1 / 3, 0.5: 2 / 3, 1.0: 2 / 3}
    assert tpir_at_fpir(query, labels, gallery, torch.arange(2), list(expected)) == expected
    got = tpir_at_fpir(query, labels, gallery, torch.arange(2), 0.4)
    assert type(got) is float
    assert got == 1 / 3


def test_a_tie_with_another_label_identifies_nobody():
    gallery, labels = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 1, 1, 1])
    query, query_labels = torch.eye(3)[[0, 1, 2]], torch.tensor([0, 1, 2])
    assert tpir_at_fpir(query, query_labels, gallery, labels, 0.5) == 0.5  # the ties of label 1 with itself are fine


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_tpir_is_the_definition_in_blocks_of_any_size_and_rows_of_any_order(seed, ties):
    pairs = probes(seed, ties)
    rates = (0.01, 0.1, 0.3, 0.99, 1.0)
    expected = {rate: naive_tpir(*pairs, rate) for rate in rates}
    assert tpir_at_fpir(*pairs, rates) == expected
    generator = torch.Generator().manual_seed(seed)
    orders = torch.randperm(40, generator=generator), torch.randperm(25, generator=generator)
    shuffled = (*(side[orders[0]] for side in pairs[:2]), *(side[orders[1]] for side in pairs[2:]))
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    turned = pairs[0].double() @ rotation, pairs[1], pairs[2].double() @ rotation, pairs[3]
    with Jitter():
        for sizes in SMALL:
            with settings(pair_scores, **sizes):
                assert tpir_at_fpir(*shuffled, rates) == expected
                assert tpir_at_fpir(*turned, rates) == expected


@pytest.mark.parametrize("ties", [False, True])
def test_a_probe_is_not_identified_by_itself(ties):
    query, labels, _, _ = data(3, ties, classes=15)
    labels[0] = 99  # alone of its label: unknown once it is left out
    excluded = np.eye(40, dtype=bool)
    rates = (0.1, 0.6, 1.0)
    expected = {rate: naive_tpir(query, labels, query, labels, rate, excluded) for rate in rates}
    assert tpir_at_fpir(query, labels, query, labels, rates, ref_includes_query=True) == expected
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ids = {"query_ids": torch.arange(40), "reference_ids": order}
    assert tpir_at_fpir(query, labels, query[order], labels[order], rates, **ids) == expected


def test_a_probe_with_nothing_left_in_the_gallery_is_unknown_and_raises_no_alarm():
    query, labels = torch.eye(2), torch.tensor([0, 1])
    ids = {"query_ids": torch.tensor([0, 1]), "reference_ids": torch.tensor([1])}
    query_again = torch.cat([query, query[:1]])
    ids["query_ids"] = torch.tensor([0, 1, 2])
    labels = torch.tensor([0, 0, 0])
    got = tpir_at_fpir(query_again, labels, query[:1], torch.tensor([0]), [0.5, 1.0], **ids)
    assert got == {0.5: 1.0, 1.0: 1.0}


def test_tpir_fits_widths():
    pairs = probes(0, False)
    assert tpir_at_fpir(pairs[0], pairs[1], pairs[2][:, :3], pairs[3], 0.2, fit_width=True) == tpir_at_fpir(
        pairs[0][:, :3], pairs[1], pairs[2][:, :3], pairs[3], 0.2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_labels": torch.tensor([0, 1, 1])}, r"query_labels must have some probes .*, got 3 and 0"),
        ({"query_labels": torch.tensor([5, 6, 7])}, r"query_labels must have some probes .*, got 0 and 3"),
        ({"fpir": 0.0}, "fpir must be above 0 and at most 1, got 0.0"),
        ({"fpir": []}, "fpir must hold at least one rate, got none"),
        ({"query": torch.full((3, 2), math.nan)}, "query must be finite, row 0 has a NaN"),
        ({"reference": torch.ones(0, 2)}, "reference must not be empty"),
        ({"query_ids": torch.arange(3)}, "reference_ids must be given with query_ids, got None"),
    ],
)
def test_unusable_probes_are_named(changes, message):
    arguments = {"query": torch.ones(3, 2), "query_labels": torch.tensor([0, 1, 2]), "reference": torch.eye(2)}
    with pytest.raises(ValueError, match=message):
        tpir_at_fpir(**arguments | {"reference_labels": torch.tensor([0, 1]), "fpir": 0.1} | changes)
