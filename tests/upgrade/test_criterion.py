import math

import numpy as np
import pytest
import torch

from pml_compat import fit_width
from pml_compat.upgrade import criterion, pair_criterion


def sample(seed, n_query=13, n_gallery=17, old_width=4, new_width=4):
    rng = np.random.default_rng(seed)
    rows = lambda n, width: torch.from_numpy(rng.normal(size=(n, width)))  # noqa: E731
    labels = [torch.from_numpy(rng.integers(0, 4, n)) for n in (n_query, n_gallery)]
    return rows(n_query, old_width), rows(n_query, new_width), labels[0], rows(n_gallery, old_width), labels[1]


def naive(old_query, new_query, query_labels, gallery, gallery_labels, own=lambda i, j: False):
    good, every = {True: 0, False: 0}, {True: 0, False: 0}
    for i in range(len(old_query)):
        for j in range(len(gallery)):
            if own(i, j):
                continue
            before = math.dist(old_query[i].tolist(), gallery[j].tolist())
            after = math.dist(new_query[i].tolist(), gallery[j].tolist())
            same = int(query_labels[i]) == int(gallery_labels[j])
            every[same] += 1
            good[same] += after <= before if same else after >= before
    return good, every


def agree(got, expected):
    good, every = expected
    assert (got.n_same_label, got.n_different_label) == (every[True], every[False])
    assert got.same_label == pytest.approx(good[True] / every[True])
    assert got.different_label == pytest.approx(good[False] / every[False])
    assert got.all_pairs == pytest.approx(sum(good.values()) / sum(every.values()))


@pytest.mark.parametrize("seed", range(5))
def test_naive_parity(seed):
    data = sample(seed)
    agree(pair_criterion(*data), naive(*data))


@pytest.mark.parametrize("seed", range(3))
def test_naive_parity_without_the_queries_own_items(seed):
    old, new, labels, gallery, gallery_labels = sample(seed)
    gallery_labels[:13] = labels
    expected = naive(old, new, labels, gallery, gallery_labels, own=lambda i, j: i == j)
    agree(pair_criterion(old, new, labels, gallery, gallery_labels, ref_includes_query=True), expected)
    assert expected[1][True] == int((labels[:, None] == gallery_labels).sum()) - 13


def test_the_gallery_is_by_default_the_old_queries():
    old, new, labels, *_ = sample(0)
    expected = naive(old, new, labels, old, labels, own=lambda i, j: i == j)
    agree(pair_criterion(old, new, labels), expected)
    agree(
        pair_criterion(old, new, labels, query_ids=np.arange(13) // 2),
        naive(old, new, labels, old, labels, own=lambda i, j: i // 2 == j // 2),
    )


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, lambda ids: [f"item {i}" for i in ids]])
def test_ids_tell_the_same_items_in_any_order(kind):
    old, new, labels, gallery, gallery_labels = sample(1)
    gallery_labels[:13] = labels
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    ids = [2**40 + i for i in range(17)]
    got = pair_criterion(
        old,
        new,
        labels,
        gallery[order],
        gallery_labels[order],
        query_ids=kind(ids[:13]),
        reference_ids=kind([ids[i] for i in order]),
    )
    assert got == pair_criterion(old, new, labels, gallery, gallery_labels, ref_includes_query=True)
    assert got != pair_criterion(old, new, labels, gallery, gallery_labels)


@pytest.mark.parametrize("new_width", [2, 7])
def test_a_new_model_of_another_width(new_width):
    old, new, labels, gallery, gallery_labels = sample(2, new_width=new_width)
    with pytest.raises(ValueError, match=f"new_query must be as wide as old_gallery, got widths {new_width} and 4"):
        pair_criterion(old, new, labels, gallery, gallery_labels)
    agree(
        pair_criterion(old, new, labels, gallery, gallery_labels, fit_width=True),
        naive(old, fit_width(new, 4), labels, gallery, gallery_labels),
    )


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_blocks_change_nothing(rows, monkeypatch):
    data, seen = sample(3), []
    expected = pair_criterion(*data, query_ids=np.arange(13), reference_ids=np.arange(17) // 2)
    addmm = torch.addmm
    monkeypatch.setattr(criterion, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: seen.append(addmm(*args, **kwargs)) or seen[-1])
    assert pair_criterion(*data, query_ids=np.arange(13), reference_ids=np.arange(17) // 2) == expected
    assert max(max(block.shape) for block in seen) <= rows
    assert sum(block.numel() for block in seen) == 13 * 17


@pytest.mark.parametrize("seed", range(3))
def test_the_order_and_the_names_of_the_classes_do_not_matter(seed):
    old, new, labels, gallery, gallery_labels = sample(seed)
    expected = pair_criterion(old, new, labels, gallery, gallery_labels)
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randperm(13, generator=generator), torch.randperm(17, generator=generator)
    names = torch.tensor([2**60, -5, 7, 2**60 + 1])
    got = pair_criterion(old[one], new[one], names[labels[one]], gallery[other], names[gallery_labels[other]])
    assert got == expected


def test_by_hand():
    old, new = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [12.0]])
    gallery = torch.tensor([[4.0], [-1.0], [20.0]])
    # query 0, label 0: closer to 4 (label 0, good), further from -1 (label 0, bad), closer to 20 (label 1, bad)
    # query 1, label 1: further from 4 (label 0, good) and -1 (label 0, good), closer to 20 (label 1, good)
    got = pair_criterion(old, new, torch.tensor([0, 1]), gallery, torch.tensor([0, 0, 1]))
    assert got == criterion.PairCriterion(2 / 3, 2 / 3, 3, 3)
    assert got.all_pairs == 4 / 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_did_not_change_fulfils_it(dtype):
    old, _, labels, gallery, gallery_labels = sample(4)
    old, gallery = old.to(dtype), gallery.to(dtype)
    got = pair_criterion(old, fit_width(old, 6), labels, gallery, gallery_labels, fit_width=True)
    assert got.same_label == got.different_label == got.all_pairs == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_tell_equal_distances_apart(seed):
    """A reflection that leaves the gallery where it is leaves every distance as it was."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    old = 100 * rng.normal(size=(20, 8))
    gallery = torch.from_numpy(rng.normal(size=(30, 7)) @ basis[:7])
    new = old - 2 * (old @ basis[7])[:, None] * basis[7]
    labels = torch.from_numpy(rng.integers(0, 3, 50))
    got = pair_criterion(torch.from_numpy(old), torch.from_numpy(new), labels[:20], gallery, labels[20:])
    assert got.same_label == got.different_label == 1.0


@pytest.mark.parametrize("new", [[1 + 1e-9, 0.0], [1 + 1e-9, 1.0]])
def test_differences_above_rounding_count(new):
    """A small step, and a large one that turns around the gallery but for a small rest."""
    rows = torch.tensor([[1.0, 0.0], new, [0.0, new[1] / 2], [2.0, new[1] / 2]], dtype=torch.float64)
    old, new, gallery, label = rows[:1], rows[1:2], rows[2:], torch.tensor([0])
    assert pair_criterion(old, new, label, gallery, torch.tensor([0, 0])).same_label == 0.5
    assert pair_criterion(old, new, label, gallery, torch.tensor([1, 1])).different_label == 0.5


def test_kinds_of_pairs_that_there_are_none_of():
    old, new, labels, gallery, gallery_labels = sample(5)
    one_class = pair_criterion(old, new, labels * 0, gallery, gallery_labels * 0)
    assert math.isnan(one_class.different_label) and one_class.n_different_label == 0
    assert one_class.all_pairs == one_class.same_label
    none_shared = pair_criterion(old, new, labels, gallery, gallery_labels + 9)
    assert math.isnan(none_shared.same_label) and none_shared.n_same_label == 0
    assert none_shared.all_pairs == none_shared.different_label


def test_arrays_and_gradients_pass_and_inputs_stay():
    data = sample(6)
    expected, copies = pair_criterion(*data), [part.clone() for part in data]
    assert pair_criterion(*(part.numpy() for part in data)) == expected
    assert pair_criterion(*(p.requires_grad_() if p.is_floating_point() else p for p in data)) == expected
    assert all(torch.equal(part, copy) for part, copy in zip(data, copies, strict=True))


def test_unusable_arguments_are_named():
    old, new, labels, gallery, gallery_labels = sample(0)
    with pytest.raises(ValueError, match="old_gallery must be given with gallery_labels or reference_ids, got None"):
        pair_criterion(old, new, labels, gallery_labels=gallery_labels)
    with pytest.raises(ValueError, match="gallery_labels must be given, got None"):
        pair_criterion(old, new, labels, gallery)
    with pytest.raises(ValueError, match="old_query must be 4 wide, got width 3"):
        pair_criterion(old[:, :3], new, labels, gallery, gallery_labels)
    with pytest.raises(ValueError, match="new_query must have the items of old_query: expected 13 rows, got 12"):
        pair_criterion(old, new[1:], labels, gallery, gallery_labels)
    with pytest.raises(ValueError, match=r"query_labels must have shape \(13,\), got \(12,\)"):
        pair_criterion(old, new, labels[1:], gallery, gallery_labels)
    with pytest.raises(ValueError, match="new_query must be finite, row 2 has a NaN"):
        broken = new.clone()
        broken[2] = math.nan
        pair_criterion(old, broken, labels, gallery, gallery_labels)
    with pytest.raises(ValueError, match="ref_includes_query must be False where query_ids tell"):
        pair_criterion(old, new, labels, gallery, gallery_labels, ref_includes_query=True, query_ids=labels)
    with pytest.raises(ValueError, match="reference_ids must be given with query_ids, got None"):
        pair_criterion(old, new, labels, gallery, gallery_labels, query_ids=labels)
    with pytest.raises(ValueError, match="query_ids must be given with reference_ids, got None"):
        pair_criterion(old, new, labels, gallery, gallery_labels, reference_ids=gallery_labels)
    with pytest.raises(ValueError, match=r"reference_ids must have shape \(17,\), got \(13,\)"):
        pair_criterion(old, new, labels, gallery, gallery_labels, query_ids=labels, reference_ids=labels)
    with pytest.raises(ValueError, match=r"reference must hold every query .* got 5 rows for 13 queries"):
        pair_criterion(old, new, labels, gallery[:5], gallery_labels[:5], ref_includes_query=True)
    with pytest.raises(ValueError, match="old_gallery must hold an item besides the queries' own, got none"):
        pair_criterion(old[:1], new[:1], labels[:1])
