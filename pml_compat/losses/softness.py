"""How soft a contrast with old embeddings is, by how far apart these lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._rows import at_least_float32, spread_of, unit_rows
from ._base import NamedTermsLoss

_USUAL_SPREAD = 0.6


@contextmanager
def softness_by_spread(loss: torch.nn.Module, rows: torch.Tensor) -> Iterator[None]:
    r"""Multiply a loss's temperature, for a while, by how far apart old embeddings lie.

    .. math:: \tau' = \tau \, \sigma / 0.6

    :math:`\sigma` is the spread of the rows about their mean, root mean square. Where an old model leaves all of them
    within a few degrees of one another, cosines with them hardly differ: at a temperature meant for others every row
    counts alike, and a contrast draws to where the classes' means differ, not to where their rows are found.

    Args:
        loss: one of PML's with a temperature, as ``SupConLoss`` and ``NTXentLoss``; others are left as they are.
        rows: ``(N, D)``, old embeddings.
    """
    given = None if isinstance(loss, NamedTermsLoss) else getattr(loss, "temperature", None)
    if given is None:
        yield
        return
    loss.temperature = given * (spread_of(unit_rows(at_least_float32(rows.detach()))) / _USUAL_SPREAD)
    try:
        yield
    finally:
        loss.temperature = given
