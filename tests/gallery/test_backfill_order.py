import numpy as np
import pytest
import torch

from pml_compat.gallery import backfill_scores
from pml_compat.upgrade import backfill_curve


def naive_scores(gallery, labels, by):
    """The two formulas, one row and one class at a time."""
    unit = [row / np.linalg.norm(row) for row in gallery.double().numpy()]
    labels = labels.tolist()
    means = {}
    for label in set(labels):
        mean = np.mean([row for row, other in zip(unit, labels, strict=True) if other == label], axis=0)
        means[label] = mean / np.linalg.norm(mean)
    found = []
    for row, label in zip(unit, labels, strict=True):
        own = row @ means[label]
        others = [row @ mean for other, mean in means.items() if other != label]
        found.append(max(others) - own if by == "margin" else 1 - own)
    return torch.tensor(found, dtype=torch.float32)


def drawn(n=60, classes=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) * 3 + 2**40  # sparse and large
    return torch.randn(n, width, generator=generator) + labels[:, None] % 5, labels


@pytest.mark.parametrize("by", ["margin", "distance"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_follow_the_formula(by, seed):
    gallery, labels = drawn(seed=seed)
    torch.testing.assert_close(backfill_scores(gallery, labels, by), naive_scores(gallery, labels, by))


@pytest.mark.parametrize("by", ["margin", "distance"])
def test_blocks_lengths_and_dtypes_do_not_change_the_scores(by, monkeypatch):
    gallery, labels = drawn()
    whole = backfill_scores(gallery, labels, by)
    monkeypatch.setattr("pml_compat.gallery.backfill_order._BLOCK_ELEMENTS", 40)
    torch.testing.assert_close(backfill_scores(gallery, labels, by), whole)
    lengths = torch.rand(len(gallery), 1, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(backfill_scores(gallery * lengths, labels, by), whole)
    torch.testing.assert_close(backfill_scores(gallery.double(), labels, by), whole)
    torch.testing.assert_close(backfill_scores(gallery.half(), labels, by), whole, atol=2e-3, rtol=0)


def test_by_hand():
    gallery = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    labels = torch.tensor([4, 9, 9])
    torch.testing.assert_close(backfill_scores(gallery, labels), torch.tensor([-1.0, -1.0, -1.0]))
    torch.testing.assert_close(backfill_scores(gallery, labels, "distance"), torch.zeros(3))
    astray = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])  # the last of class 9, in class 4
    scores = backfill_scores(astray, torch.tensor([4, 9, 9, 9]))
    torch.testing.assert_close(scores, torch.tensor([0.2**0.5 - 1, -(0.8**0.5), -(0.8**0.5), 1 - 0.2**0.5]))


def test_a_memory_map_is_read_in_blocks(tmp_path):
    gallery, labels = drawn()
    np.save(tmp_path / "gallery.npy", gallery.numpy())
    stored = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    torch.testing.assert_close(backfill_scores(stored, labels.numpy()), backfill_scores(gallery, labels))


def test_a_row_of_zeros_is_as_near_to_every_class():
    gallery = torch.cat([torch.eye(3), torch.eye(3), torch.zeros(1, 3)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    scores = backfill_scores(gallery, labels)
    assert scores[-1] == 0 and scores.argmax() == 6
    assert backfill_scores(gallery, labels, "distance")[-1] == 1


def test_no_gradient_and_no_change():
    gallery, labels = drawn()
    given = gallery.clone().requires_grad_()
    assert not backfill_scores(given, labels).requires_grad
    assert torch.equal(given, gallery)


def test_the_order_beats_a_random_one_where_a_map_lost_some_rows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    centers = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator))
    new = torch.nn.functional.normalize(centers[labels] + 0.2 * torch.randn(300, 8, generator=generator))
    spoilt = (torch.arange(300) % 3 == 0)[:, None]
    mapped = torch.where(spoilt, torch.randn(300, 8, generator=generator), new)
    mapped = torch.nn.functional.normalize(mapped)
    areas = {
        name: backfill_curve(new, labels, mapped, new, labels, order=order, ref_includes_query=True).area(
            "mean_average_precision"
        )
        for name, order in (
            ("random", "random"),
            ("margin", backfill_scores(mapped, labels)),
            ("distance", backfill_scores(mapped, labels, "distance")),
        )
    }
    assert areas["margin"] > areas["random"] + 0.05
    assert areas["distance"] > areas["random"] + 0.05


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.eye(3), torch.arange(3), "size"), 'by must be "margin" or "distance", got \'size\''),
        (
            (torch.ones(3, 2), torch.zeros(3, dtype=torch.long)),
            "labels must have two classes or more .* got 1; give by",
        ),
        ((torch.eye(3), torch.arange(2)), "labels must have one entry a row: expected 3, got 2"),
        ((torch.eye(3), None), "labels must be given"),
        ((torch.eye(3), torch.rand(3)), "labels must be integers"),
        ((torch.tensor([[1.0], [float("nan")]]), torch.arange(2)), "gallery must be finite, row 1 "),
        ((torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), "gallery must be a non-empty"),
        ((torch.ones(3), torch.arange(3)), "gallery must be a non-empty .* got shape .3,."),
        ((torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([0, 0, 1])), "the centre of label 0 is"),
        (([[1.0]], [0]), "gallery must be a non-empty .* got list"),
    ],
)
def test_errors(arguments, error):
    with pytest.raises(ValueError, match=error):
        backfill_scores(*arguments)


def test_a_bad_row_is_named_by_its_place_in_the_gallery():
    gallery, labels = drawn(n=9000)
    gallery[8900, 2] = torch.inf
    with pytest.raises(ValueError, match="gallery must be finite, row 8900 has"):
        backfill_scores(gallery, labels)
