"""Upgrade an embedding model without re-embedding what you have stored.

A plugin for pytorch-metric-learning (PML):

- ``pml_compat.frozen``: the old system, held still (model, classifier, class centres);
- ``pml_compat.losses``: PML losses that train a new model to fit it (:class:`~pml_compat.losses.BCTLoss`);
- :func:`~pml_compat.data.embed` and :func:`~pml_compat.fit_width`: embed a data set, serve its queries;
- ``pml_compat.accuracy``, ``pml_compat.verification``: rankings and pairs measured across models;
- ``pml_compat.upgrade``: what the upgrade gained, and whether to do it;
- ``pml_compat.serving``: two finished models at query time, nothing trained.

Importing the package is cheap: it loads no optional dependency, and nothing of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._rows import fit_width as fit_width
    from .data import embed as embed

__version__ = "0.2.0"
__all__ = ["embed", "fit_width"]


def __getattr__(name: str) -> Any:
    """Import the two functions when they are first asked for."""
    if name == "embed":
        from .data import embed

        return embed
    if name == "fit_width":
        from ._rows import fit_width

        return fit_width
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
