import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pml_compat.frozen import ClassCenters
from tests import reference
from tests.pairwise import pairwise


def data(seed=0, n=60, d=5, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) * 3 + 2  # 2, 5, 8, ...: not 0 to C-1
    return torch.randn(n, d, generator=generator, dtype=dtype) + labels[:, None] / 4, labels


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("boundary", ["max", "iqr"])
def test_matches_naive_loop(seed, normalize, boundary):
    embeddings, labels = data(seed)
    embeddings[0] *= -3  # an outlier, so that the rules differ
    centers = ClassCenters.from_embeddings(embeddings, labels, normalize=normalize, boundary=boundary)
    expected = reference.class_centers(embeddings.numpy(), labels, normalize, boundary)
    assert centers.labels.tolist() == list(expected)
    for row, (center, limit, count) in enumerate(expected.values()):
        np.testing.assert_allclose(centers.centers[row], center, atol=1e-12)
        assert float(centers.boundaries[row]) == pytest.approx(limit, abs=1e-7)
        assert int(centers.counts[row]) == count


def test_by_hand():
    centers = ClassCenters.from_embeddings(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]]), torch.tensor([4, 4, 1]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(centers.centers, torch.tensor([[0.0, -1.0], [half, half]]))
    torch.testing.assert_close(centers.boundaries, torch.tensor([0.0, math.pi / 4]))
    assert centers.counts.tolist() == [1, 2]


def test_iqr_drops_the_outlier():
    angles = torch.tensor([-0.02, -0.01, 0.0, 0.01, 0.02, 0.03, -0.03, 1.0])
    embeddings = torch.stack([angles.cos(), angles.sin()], 1).double()
    labels = torch.zeros(8, dtype=torch.long)
    widest = float(ClassCenters.from_embeddings(embeddings, labels).boundaries)
    trimmed = float(ClassCenters.from_embeddings(embeddings, labels, boundary="iqr").boundaries)
    assert widest > 0.8 and trimmed < 0.2


@pytest.mark.parametrize("boundary", ["max", "iqr", None])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_give_what_the_whole_gives(size, boundary):
    embeddings, labels = data()
    batches = [(embeddings[s : s + size].numpy(), labels[s : s + size].numpy()) for s in range(0, 60, size)]
    ours = ClassCenters.from_batches(batches, boundary=boundary)
    whole = ClassCenters.from_embeddings(embeddings, labels, boundary=boundary)
    torch.testing.assert_close(ours.centers, whole.centers, rtol=0, atol=1e-12)
    assert ours.labels.equal(whole.labels) and ours.counts.equal(whole.counts)
    if boundary is None:
        assert ours.boundaries is None
    else:
        torch.testing.assert_close(ours.boundaries, whole.boundaries, rtol=0, atol=1e-7)


def test_many_classes_that_appear_late():
    labels = torch.arange(1000).flip(0)
    batches = [(torch.randn(10, 3), labels[s : s + 10]) for s in range(0, 1000, 10)]
    centers = ClassCenters.from_batches(batches)
    assert centers.labels.equal(torch.arange(1000))
    torch.testing.assert_close(centers.centers[5], torch.nn.functional.normalize(batches[99][0][4], dim=0))


def test_a_generator_gives_centers_without_boundaries():
    embeddings, labels = data()
    one_shot = ((embeddings[s : s + 9], labels[s : s + 9]) for s in range(0, 60, 9))
    with pytest.raises(ValueError, match=r"readable twice.*boundary=None"):
        ClassCenters.from_batches(one_shot)
    centers = ClassCenters.from_batches(one_shot, boundary=None)
    torch.testing.assert_close(centers.centers, ClassCenters.from_embeddings(embeddings, labels).centers)


def test_second_reading_with_other_samples_is_refused():
    class Shrinking(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(self[: 3 - self.reads])

    batches = Shrinking([data(seed) for seed in range(3)])
    with pytest.raises(ValueError, match=r"same samples at both readings, got 120 and then 60"):
        ClassCenters.from_batches(batches)


def test_reads_a_memory_map(tmp_path):
    embeddings, labels = data(dtype=torch.float32)
    np.save(tmp_path / "old.npy", embeddings.numpy())
    mapped = np.load(tmp_path / "old.npy", mmap_mode="r")
    torch.testing.assert_close(
        ClassCenters.from_embeddings(mapped, labels).centers, ClassCenters.from_embeddings(embeddings, labels).centers
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_in_float32(dtype):
    embeddings, labels = data(dtype=torch.float32)
    centers = ClassCenters.from_embeddings(embeddings.to(dtype), labels)
    assert centers.centers.dtype == centers.boundaries.dtype == torch.float32
    torch.testing.assert_close(
        centers.centers, ClassCenters.from_embeddings(embeddings, labels).centers, atol=2e-2, rtol=0
    )


def test_a_zero_embedding_moves_no_boundary():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0]])
    centers = ClassCenters.from_embeddings(embeddings, torch.zeros(3, dtype=torch.long))
    assert float(centers.boundaries) < 0.1


def test_index_of_and_repr():
    centers = ClassCenters(torch.eye(3), torch.tensor([9, 2, 2**60]))
    assert centers.index_of(torch.tensor([2, 9, 2**60, 2**60 + 1, 0, -1])).tolist() == [1, 0, 2, -1, -1, -1]
    assert "classes=3" in repr(centers) and len(centers) == 3


def test_centers_are_unit_rows_and_buffers():
    centers = ClassCenters(torch.tensor([[3.0, 4.0]]), torch.tensor([0]), torch.tensor([0.5]), torch.tensor([7]))
    torch.testing.assert_close(centers.centers, torch.tensor([[0.6, 0.8]]))
    assert not list(centers.parameters())
    assert centers.double().centers.dtype == torch.float64
    assert centers.to("meta").boundaries.device.type == "meta"


@pytest.mark.parametrize("boundary", ["max", None])
def test_save_and_load(tmp_path, boundary):
    centers = ClassCenters.from_embeddings(*data(), boundary=boundary)
    centers.save(tmp_path / "folder" / "centers.safetensors")
    loaded = ClassCenters.load(tmp_path / "folder" / "centers.safetensors")
    state, expected = loaded.state_dict(), centers.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-15)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["centers.safetensors"]


@pytest.mark.parametrize("directions", [True, False])
def test_directions_and_scale_are_saved(tmp_path, directions):
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    flat = torch.diag(torch.arange(1.0, 7))
    given = {"directions": 3 * rows.flip(0), "whitening": flat, "scale": 2**0.5} if directions else {}
    centers = ClassCenters(rows, torch.tensor([8, 3, 5, 0]), **given)
    centers.save(tmp_path / "centers.safetensors")
    loaded = ClassCenters.load(tmp_path / "centers.safetensors")
    assert loaded.is_measured == centers.is_measured == directions
    assert loaded.scale == centers.scale == given.get("scale") and loaded.prospects is None
    torch.testing.assert_close(loaded.directions, centers.directions, rtol=0, atol=1e-6)
    expected = rows.flip(0) if directions else rows  # the centres, where there are none
    torch.testing.assert_close(loaded.directions, torch.nn.functional.normalize(expected, dim=1))
    assert loaded.whitening.equal(flat) if directions else loaded.whitening is None


@pytest.mark.parametrize(("flat", "message"), [(torch.ones(2, 4), "square"), (torch.eye(3), "4"), (None, "")])
def test_a_whitening_is_as_wide_as_the_centres(flat, message):
    if flat is None:
        assert ClassCenters(torch.randn(3, 4), torch.arange(3), whitening=torch.eye(4)).whitening.equal(torch.eye(4))
        return
    with pytest.raises(ValueError, match=f"whitening .*{message}"):
        ClassCenters(torch.randn(3, 4), torch.arange(3), whitening=flat)


def whitened_centers(seed=0):
    """Centres of embeddings that are mostly alike, whose queries find more whitened."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(120) % 4
    own = 0.15 * (torch.eye(4) - 1 / 4)[labels]
    return ClassCenters.from_embeddings(
        torch.cat([torch.ones(120, 1), torch.randn(120, 3, generator=generator), own], 1), labels
    )


def test_the_whitening_goes_along_with_the_directions(monkeypatch):
    monkeypatch.setattr("pml_compat.frozen.class_directions._STEPS", 20)
    first, second = whitened_centers(), whitened_centers(1)
    flat = first.whitening
    assert flat is not None and flat.shape == (8, 8) and flat.dtype == first.directions.dtype
    assert first.fitted_directions is not None and first.prospects.whitening > 0  # measured together
    assert not second.whitening.equal(flat)
    second.load_state_dict(first.state_dict())
    assert second.whitening.equal(flat) and second.directions.equal(first.directions)
    for dtype, width in ((torch.float32, 8), (torch.float16, 8), (torch.float64, 11), (torch.float32, 5)):
        rows = torch.randn(9, width, generator=torch.Generator().manual_seed(3)).to(dtype)
        fitted = torch.zeros(9, 8, dtype=torch.float64)
        fitted[:, :width] = rows.double()[:, :8]
        expected = torch.nn.functional.normalize(fitted @ flat.double(), dim=1)
        found = second.query_rows(rows)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps)
    plain = ClassCenters(first.centers, first.labels, first.boundaries, first.counts, directions=first.directions)
    second.load_state_dict(plain.state_dict())
    assert second.whitening is None
    rows = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(second.query_rows(rows), torch.nn.functional.normalize(rows, dim=1))
    with pytest.raises(ValueError, match="embeddings must be 2-dimensional"):
        second.query_rows(rows[0])
    with pytest.raises(ValueError, match="the ClassCenters"):
        second.query_rows(rows.to("meta"))
    assert first.to("meta").whitening.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_queries_of_known_classes_are_drawn_half_way_to_the_nearest_direction(monkeypatch, dtype):
    monkeypatch.setattr("pml_compat.frozen.known_classes._BLOCK", 7)  # two queries at a time
    draw = torch.Generator().manual_seed(0)
    directions, queries = torch.randn(3, 5, generator=draw), torch.randn(11, 5, generator=draw).to(dtype)
    queries[4] = 0
    centers = ClassCenters(torch.randn(3, 5, generator=draw), torch.tensor([4, 0, 2]), directions=directions)
    found = centers.known_class_rows(queries)
    assert found.dtype == dtype
    for query, row in zip(queries.double(), found.double(), strict=True):
        unit = torch.nn.functional.normalize(query, dim=0)
        aims = torch.nn.functional.normalize(directions.double(), dim=1)
        nearest = max(aims, key=lambda aim: float(aim @ unit))
        expected = torch.nn.functional.normalize(unit + nearest, dim=0) if query.any() else query
        torch.testing.assert_close(row, expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps)


def test_queries_of_known_classes_find_more():
    """Spread about their class's direction, as queries of a model that was trained to fit are."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 8
    means = torch.nn.functional.normalize(torch.randn(8, 16, generator=draw), dim=1)
    old, new = (means[labels] + noise * torch.randn(400, 16, generator=draw) for noise in (0.35, 0.2))
    centers = ClassCenters(means, torch.arange(8))

    def precision(queries):
        cosines = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(old, dim=1).t()
        return float((labels[cosines.fill_diagonal_(-2).argmax(1)] == labels).float().mean())

    drawn = centers.known_class_rows(new)
    assert precision(drawn) > precision(new) + 0.02 > precision(old)
    with pytest.raises(ValueError, match=r"queries.*16"):
        centers.known_class_rows(new[:, :8])
    with pytest.raises(ValueError, match="queries must be on the device of"):
        centers.known_class_rows(new.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_queries_are_drawn_to_the_class_that_another_model_names(dtype):
    draw = torch.Generator().manual_seed(0)
    queries, directions = torch.randn(6, 5, generator=draw).to(dtype), torch.randn(3, 5, generator=draw)
    centers = ClassCenters(torch.randn(3, 5, generator=draw), torch.tensor([4, 0, 2]), directions=directions)
    labels = torch.tensor([2, 2, 4, 0, 0, 4])
    found = centers.known_class_rows(queries, labels)
    unit, aims = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (queries, directions))
    expected = torch.nn.functional.normalize(unit + aims[[2, 2, 0, 1, 1, 0]], dim=1).to(dtype)
    torch.testing.assert_close(found, expected)
    assert centers.known_class_rows(queries, centers.nearest_labels(queries)).equal(centers.known_class_rows(queries))
    with pytest.raises(ValueError, match=r"labels must be of classes that have a centre, got \[5, 9\] of 2 others"):
        centers.known_class_rows(queries, torch.tensor([2, 9, 9, 5, 0, 4]))
    with pytest.raises(ValueError, match="labels"):
        centers.known_class_rows(queries, labels[:5])
    with pytest.raises(ValueError, match="labels must be on the device of"):
        centers.known_class_rows(queries, labels.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nearest_labels(monkeypatch, dtype):
    monkeypatch.setattr("pml_compat.frozen.known_classes._BLOCK", 7)  # two rows at a time
    draw = torch.Generator().manual_seed(0)
    rows, directions = torch.randn(11, 5, generator=draw).to(dtype), torch.randn(3, 5, generator=draw)
    centers = ClassCenters(-directions, torch.tensor([4, 0, 2]), directions=directions)
    angles = [[reference.angle(row, aim) for aim in directions.double().numpy()] for row in rows.double().numpy()]
    assert centers.nearest_labels(rows).tolist() == [[4, 0, 2][one.index(min(one))] for one in angles]
    with pytest.raises(ValueError, match=r"embeddings.*5"):
        centers.nearest_labels(rows[:, :4])
    with pytest.raises(ValueError, match="embeddings must be on the device of"):
        centers.nearest_labels(rows.to("meta"))


def test_two_finished_models_find_old_rows_of_known_classes():
    """The new model, in a space of its own, names the class; the old centres know where it is found."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 8
    means = torch.randn(2, 8, 16, generator=draw)
    old, new = (
        rows[labels] + noise * torch.randn(800, 16, generator=draw)
        for rows, noise in zip(means, (2.0, 0.8), strict=True)
    )
    (old_gallery, old_queries), (known, new_queries) = old.split(400), new.split(400)
    labels = labels[:400]
    named = ClassCenters.from_embeddings(known, labels).nearest_labels(new_queries)
    centers = ClassCenters.from_embeddings(old_gallery, labels)
    unit = torch.nn.functional.normalize(old_gallery, dim=1)

    def precision(queries):
        return float((labels[(queries @ unit.t()).argmax(1)] == labels).float().mean())

    drawn = centers.known_class_rows(old_queries, named)
    assert precision(drawn) > precision(centers.known_class_rows(old_queries)) + 0.1
    assert precision(drawn) > precision(torch.nn.functional.normalize(old_queries, dim=1)) + 0.1


def test_measured_directions_are_saved_though_nobody_asked_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr("pml_compat.frozen.class_directions._STEPS", 20)
    embeddings, labels = data(dtype=torch.float32)
    ClassCenters.from_embeddings(embeddings, labels).save(tmp_path / "centers.safetensors")
    loaded, expected = (
        ClassCenters.load(tmp_path / "centers.safetensors"),
        ClassCenters.from_embeddings(embeddings, labels),
    )
    torch.testing.assert_close(loaded.directions, expected.directions, rtol=0, atol=1e-6)
    assert loaded.is_measured and loaded.scale == expected.scale is not None


def test_files_from_before_there_were_directions_load(tmp_path):
    rows, labels = torch.nn.functional.normalize(torch.randn(3, 4), dim=1), torch.tensor([4, 0, 2])
    save_file(
        {"centers": rows, "labels": labels}, tmp_path / "old.safetensors", {"format": "pml_compat.ClassCenters/1"}
    )
    loaded = ClassCenters.load(tmp_path / "old.safetensors")
    assert not loaded.is_measured and loaded.scale is None and loaded.prospects is None
    torch.testing.assert_close(loaded.directions, rows)


def test_what_was_asked_of_centres_does_not_keep_their_state_from_loading():
    """An audit in the middle of a training, say: the next one has to go on from its state."""
    first, second = (ClassCenters.from_embeddings(*data(dtype=torch.float32)) for _ in range(2))
    first.summary()
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.directions, first.directions)


def test_directions_follow_to():
    centers = ClassCenters(torch.eye(3), torch.arange(3), directions=torch.eye(3).flip(0))
    assert centers.double().directions.dtype == torch.float64
    assert centers.to("meta").directions.device.type == "meta"


def test_directions_that_are_not_measured_are_the_centres():
    centers = ClassCenters(torch.randn(3, 4), torch.arange(3))
    assert centers.directions is centers.centers and not centers.is_measured
    assert centers.scale is None and centers.prospects is None


def test_state_dict_restores_the_label_lookup():
    source = ClassCenters(torch.eye(2), torch.tensor([8, 3]))
    target = ClassCenters(torch.eye(2), torch.tensor([0, 1]))
    target.load_state_dict(source.state_dict())
    assert target.index_of(torch.tensor([3, 8, 0])).tolist() == [1, 0, -1]


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        ClassCenters.load(tmp_path / "missing.safetensors")
    whole = tmp_path / "whole.safetensors"
    ClassCenters.from_embeddings(*data()).save(whole)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(whole.read_bytes()[:-8])
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    for path in (truncated, empty):
        with pytest.raises(ValueError, match=rf"whole safetensors file.*{path.name}"):
            ClassCenters.load(path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.eye(2)}, foreign)
    with pytest.raises(ValueError, match=r"written by ClassCenters.save.*'weight'"):
        ClassCenters.load(foreign)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), torch.tensor([1, 1])), r"labels must not repeat, got 1"),
        ((torch.eye(2), torch.tensor([-1, 1])), r"labels must be 0 or more, got -1"),
        ((torch.eye(2), torch.tensor([1])), r"labels must have one entry a row: expected 2, got 1"),
        ((torch.eye(2), torch.tensor([0.0, 1.0])), r"labels must be integers, got torch.float32"),
        ((torch.ones(2), LABELS), r"centers must be 2-dimensional"),
        ((torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), LABELS), r"centers must be finite, row 1"),
        ((torch.tensor([[1.0, 0.0], [0.0, 0.0]]), LABELS), r"centre of label 1 is"),
        ((torch.eye(2), LABELS, torch.tensor([0.1, 4.0])), r"boundaries must be angles in radians in \[0, pi\]"),
        ((torch.eye(2), LABELS, torch.tensor([0.1])), r"boundaries must be floating point of shape \(2,\)"),
        ((torch.eye(2), LABELS, torch.tensor([0.1, torch.inf])), r"boundaries must be finite, row 1"),
        ((torch.eye(2), LABELS, None, torch.tensor([0, 3])), r"counts must be 1 or more, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassCenters(*arguments)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.eye(3), r"directions must be 2 wide, got width 3"),
        (torch.eye(2)[:1], r"directions must be one a centre, 2, got 1"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), r"directions must be finite, row 0"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), r"must not be 0"),
    ],
)
def test_bad_directions(directions, message):
    with pytest.raises(ValueError, match=message):
        ClassCenters(torch.eye(2), LABELS, directions=directions)


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (torch.eye(2), LABELS, {"boundary": "median"}, r"boundary must be 'max', 'iqr' or None, got 'median'"),
        (torch.eye(2), None, {}, r"labels must be given"),
        (torch.eye(2), torch.tensor([0]), {}, r"labels must have one entry a row: expected 2, got 1"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), {}, r"embeddings must not be empty"),
        (torch.tensor([[1.0, torch.inf]]), torch.tensor([0]), {}, r"embeddings must be finite, row 0"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([5, 5]), {}, r"centre of label 5 is"),
        ([[1.0, 2.0]], torch.tensor([0]), {}, r"embeddings must be an \(N, D\) tensor or array, got list"),
    ],
)
def test_bad_embeddings(embeddings, labels, options, message):
    with pytest.raises(ValueError, match=message):
        ClassCenters.from_embeddings(embeddings, labels, **options)


def test_no_batches_and_batches_of_other_widths():
    with pytest.raises(ValueError, match=r"batches must not be empty"):
        ClassCenters.from_batches([])
    with pytest.raises(ValueError, match=r"embeddings must be 2 wide, got width 3"):
        ClassCenters.from_batches([(torch.eye(2), LABELS), (torch.eye(3), torch.arange(3))])
