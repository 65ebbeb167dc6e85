import math

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.upgrade import compatibility_matrix, is_compatible, update_gain


@pytest.mark.parametrize(
    ("old", "new", "independent", "expected"),
    [(0.4, 0.45, 0.6, 0.25), (0.4, 0.6, 0.6, 1.0), (0.4, 0.4, 0.6, 0.0), (0.4, 0.3, 0.6, -0.5), (0.4, 0.7, 0.6, 1.5)],
)
def test_update_gain_is_a_share_of_the_room(old, new, independent, expected):
    got = update_gain(old_to_old=old, new_to_old=new, independent=independent)
    assert type(got) is float
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("independent", [0.5, 0.3])
def test_update_gain_without_room_is_nan_with_a_warning(independent):
    message = rf"update_gain is undefined: independent \({independent}\) must be above old_to_old \(0.5\)"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert math.isnan(update_gain(old_to_old=0.5, new_to_old=0.6, independent=independent))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("old", "new", "expected"), [(0.4, 0.41, True), (0.4, 0.4, False), (0.4, 0.39, False)])
def test_the_criterion_is_strict(old, new, expected):
    assert is_compatible(old_to_old=old, new_to_old=new) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["old_to_old", "new_to_old", "independent"])
def test_accuracies_must_be_finite(name, value):
    accuracies = {"old_to_old": 0.4, "new_to_old": 0.5, "independent": 0.6} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a finite accuracy, got {value!r}"):
        update_gain(**accuracies)
    del accuracies["independent"]
    if name != "independent":
        with pytest.raises(ValueError, match=rf"{name} must be a finite accuracy, got {value!r}"):
            is_compatible(**accuracies)


@pytest.mark.parametrize(("function", "values"), [(update_gain, 3), (is_compatible, 2)])
def test_accuracies_have_no_order(function, values):
    with pytest.raises(TypeError, match="positional argument"):
        function(*[0.5] * values)


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (30,), generator=generator)
    old = torch.randn(30, 4, generator=generator) + 2 * torch.eye(4)[labels]
    new = torch.nn.functional.pad(old, (0, 2)) + torch.randn(30, 6, generator=generator) / 2
    return {"old": old, "new": new}, labels


@pytest.fixture
def calculator():
    return CrossModelAccuracyCalculator(
        include=("precision_at_1", "mean_average_precision", "cmc_top_5"), device="cpu", fit_width=True
    )


def test_every_model_against_every_model_with_each_item_left_out(models, calculator):
    embeddings, labels = models
    matrix = compatibility_matrix(embeddings, labels, calculator=calculator)
    expected = {
        query: {
            gallery: calculator.get_accuracy(
                embeddings[query], labels, embeddings[gallery], labels, ref_includes_query=True
            )
            for gallery in embeddings
        }
        for query in embeddings
    }
    assert matrix == expected
    assert matrix["new"]["old"] != matrix["old"]["new"]
    assert matrix["old"]["old"]["precision_at_1"] < 1


def test_default_metrics(models):
    embeddings, labels = models
    matrix = compatibility_matrix(embeddings, labels)
    assert list(matrix) == list(matrix["old"]) == ["old", "new"]
    assert set(matrix["old"]["new"]) == {"precision_at_1", "mean_average_precision"}


def test_a_gallery_of_other_items_leaves_nothing_out(models, calculator):
    embeddings, labels = models
    queries, galleries = {"new": embeddings["new"][:10]}, {name: rows[10:] for name, rows in embeddings.items()}
    matrix = compatibility_matrix(queries, labels[:10], galleries, labels[10:], calculator=calculator)
    assert matrix == {
        "new": {
            name: calculator.get_accuracy(queries["new"], labels[:10], gallery, labels[10:])
            for name, gallery in galleries.items()
        }
    }


def test_a_gallery_that_begins_with_the_queries(models, calculator):
    embeddings, labels = models
    queries = {"new": embeddings["new"][:10]}
    galleries = {"old": embeddings["old"]}
    got = compatibility_matrix(queries, labels[:10], galleries, labels, calculator=calculator, ref_includes_query=True)
    expected = calculator.get_accuracy(queries["new"], labels[:10], galleries["old"], labels, ref_includes_query=True)
    assert got == {"new": {"old": expected}}
    assert compatibility_matrix(queries, labels[:10], galleries, labels, calculator=calculator) != got


def test_the_queries_may_be_left_in(models, calculator):
    embeddings, labels = models
    matrix = compatibility_matrix(embeddings, labels, calculator=calculator, ref_includes_query=False)
    assert matrix["old"]["old"]["precision_at_1"] == matrix["new"]["new"]["precision_at_1"] == 1.0


def test_ids_tell_the_same_items_in_any_order(models, calculator):
    embeddings, labels = models
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    ids = np.array([f"item {i}" for i in range(30)])
    galleries = {name: rows[order] for name, rows in embeddings.items()}
    expected = compatibility_matrix(embeddings, labels, calculator=calculator)
    shuffled = compatibility_matrix(
        embeddings, labels, galleries, labels[order], calculator=calculator, query_ids=ids, reference_ids=ids[order]
    )
    own = compatibility_matrix(embeddings, labels, calculator=calculator, query_ids=ids, reference_ids=ids)
    assert shuffled == own == expected


def test_cameras_pass_through(models, calculator):
    embeddings, labels = models
    cameras = {"query_cameras": torch.arange(30) % 2, "reference_cameras": torch.arange(30) % 2}
    got = compatibility_matrix({"old": embeddings["old"]}, labels, calculator=calculator, **cameras)
    expected = calculator.get_accuracy(
        embeddings["old"], labels, embeddings["old"], labels, ref_includes_query=True, **cameras
    )
    assert got == {"old": {"old": expected}}
    assert got["old"]["old"] != compatibility_matrix(embeddings, labels, calculator=calculator)["old"]["old"]


def test_ids_of_none_are_no_ids(models, calculator):
    embeddings, labels = models
    got = compatibility_matrix(embeddings, labels, calculator=calculator, query_ids=None, reference_ids=None)
    assert got == compatibility_matrix(embeddings, labels, calculator=calculator)


@pytest.mark.parametrize("name", ["query_ids", "query_cameras"])
def test_ids_and_cameras_of_the_queries_are_those_of_their_galleries(name, models, calculator):
    embeddings, labels = models
    values = torch.arange(30) % 10
    matrix = compatibility_matrix(embeddings, labels, calculator=calculator, **{name: values})
    assert matrix["old"]["old"] == calculator.get_accuracy(embeddings["old"], labels, **{name: values})


def test_unusable_arguments_are_named(models):
    embeddings, labels = models
    with pytest.raises(ValueError, match="queries must name at least one model, got none"):
        compatibility_matrix({}, labels)
    with pytest.raises(ValueError, match="gallery_labels must be given with galleries, got None"):
        compatibility_matrix(embeddings, labels, embeddings)
    with pytest.raises(ValueError, match="query must be finite, row 3 has a NaN"):
        broken = embeddings["old"].clone()
        broken[3, 0] = math.nan
        compatibility_matrix({"old": broken}, labels)
