"""Names that have moved: the old one works for a release, and says what it is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that some names have left.

    Args:
        old: the module's own name.
        places: the module of each name now.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} has moved: from {places[name]} import {name}; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(places[name]), name)

    return find


def renamed(value: Any, name: str, old_value: Any, old_name: str, stacklevel: int = 3) -> Any:
    """Return the value of an argument that may be given by its old name for a release, None where by neither."""
    if old_value is None:
        return value
    if value is not None:
        raise ValueError(f"{old_name} must not be given beside {name}, whose old name it is; got both")
    message = f"{old_name}= is now {name}=; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
    return old_value
