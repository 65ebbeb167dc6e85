"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an ImportError with the pip command of the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f'{error.name} is not installed; run: pip install "pml-compat[{extra}]"') from error
