"""The blended query for a server without torch: NumPy and safetensors, on the file that ``QueryBlend.save`` wrote."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_SHORT_ARC, _NEAR_OPPOSITE = 1e-4, 2e-3  # radians


class NumpyQueryBlend:
    """:meth:`QueryBlend.query_rows` without its checks. This file can be copied to where pml_compat is not installed.

    Args:
        path: what ``QueryBlend.save`` wrote.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated file, or one that holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.path.exists(path):
            raise FileNotFoundError(f"no file at {os.fspath(path)!r}")
        try:
            arrays = load_file(path)
            self.rotation, self.share = arrays["rotation"], float(arrays["share_and_agreement"][0])
            offset = arrays.get("offset")
            self.offset = offset if offset is not None and offset.any() else None
        except Exception as error:  # safetensors has an exception of its own for every kind of broken file
            raise ValueError(f"path must be a file written by QueryBlend.save, {os.fspath(path)!r} is not") from error

    def __call__(self, old_query: Any, new_query: Any) -> np.ndarray:
        """Return the unit rows ``(N, D_old)``, or one row ``(D_old,)``, to search the old gallery with.

        ``old_query`` may be None where ``share`` is 1.
        """
        v = self._mapped(np.asarray(new_query))
        u = v if old_query is None and self.share == 1 else np.asarray(old_query)
        if u.size == u.shape[-1]:  # one query, as a server gets them: numbers of Python's are faster than arrays of one
            return self._one(u.ravel(), v.ravel()).reshape(u.shape)
        long_u, long_v = np.maximum(_lengths(u), 1e-12), np.maximum(_lengths(v), 1e-12)
        if self.share in (0.0, 1.0):
            return v / long_v if self.share else u / long_u
        angle = np.arccos(np.clip(_dot(u, v) / (long_u * long_v), -1, 1))
        short, opposite = angle < _SHORT_ARC, angle > np.pi - _NEAR_OPPOSITE
        first = np.where(short, 1 - self.share, np.sin((1 - self.share) * angle))
        second = np.where(short, self.share, np.sin(self.share * angle))
        first, second = np.where(opposite, 1, first) / long_u, np.where(opposite, 0, second) / long_v
        blended = first.astype(u.dtype, copy=False) * u + second.astype(v.dtype, copy=False) * v
        return blended / np.maximum(_lengths(blended), 1e-12)

    def _mapped(self, new: np.ndarray) -> np.ndarray:
        v = new @ self.rotation
        if self.offset is None:
            return v
        one = new.size == new.shape[-1]
        return v - (math.sqrt(float(new.ravel().dot(new.ravel()))) if one else _lengths(new)) * self.offset

    def _one(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        long_u, long_v = (max(math.sqrt(float(row.dot(row))), 1e-12) for row in (u, v))
        if self.share in (0.0, 1.0):
            return v / long_v if self.share else u / long_u
        angle = math.acos(min(1.0, max(-1.0, float(u.dot(v)) / (long_u * long_v))))
        first, second = math.sin((1 - self.share) * angle), math.sin(self.share * angle)
        if angle < _SHORT_ARC:
            first, second = 1 - self.share, self.share
        elif angle > math.pi - _NEAR_OPPOSITE:
            first, second = 1.0, 0.0
        blended = u * (first / long_u) + v * (second / long_v)
        return blended / max(math.sqrt(float(blended.dot(blended))), 1e-12)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", first, second)[..., None]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(rows, rows))
