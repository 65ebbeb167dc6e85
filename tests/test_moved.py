import importlib
import inspect

import pytest

import pml_compat.accuracy
import pml_compat.gallery
import pml_compat.report

ROOMS = (
    "accuracy",
    "data",
    "frozen",
    "gallery",
    "report",
    "serving",
    "trainers",
    "transformations",
    "upgrade",
    "verification",
)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("pml_compat.accuracy", "update_gain", "pml_compat.upgrade"),
        ("pml_compat.accuracy", "negative_flips", "pml_compat.upgrade"),
        ("pml_compat.accuracy", "verification", "pml_compat.verification"),
        ("pml_compat.accuracy", "open_classes", "pml_compat.data"),
        ("pml_compat.gallery", "MixedGallery", "pml_compat.serving"),
        ("pml_compat.report", "Evaluation", "pml_compat.upgrade"),
        ("pml_compat.width", "fit_width", "pml_compat"),
    ],
)
def test_an_old_path_works_and_names_the_new_one(old, name, new):
    with pytest.warns(DeprecationWarning, match=f"from {new} import {name}"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)


def test_every_name_that_moved_is_where_it_is_said_to_be():
    found = 0
    for name in ROOMS:
        room = importlib.import_module(f"pml_compat.{name}")
        places = inspect.getclosurevars(room.__getattr__).nonlocals["places"]
        for one, place in places.items():
            with pytest.warns(DeprecationWarning, match=f"from {place} import {one}"):
                assert getattr(room, one) is getattr(importlib.import_module(place), one)
            found += 1
    assert found > 50


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match=r"module 'pml_compat\.gallery' has no attribute 'QueryBlend'"):
        _ = pml_compat.gallery.QueryBlend
