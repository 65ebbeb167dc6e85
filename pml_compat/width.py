"""The old place of :func:`pml_compat.fit_width`; it goes with the next release."""

from ._moved import moved

__getattr__ = moved(__name__, {"fit_width": "pml_compat"})
