"""Search in two stages: the old index proposes, the new model decides, and the backfill follows the queries."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .._checks import as_tensor, check_embeddings, check_integer
from .vector_cache import VectorCache


class TwoStageSearch:
    """Put the candidates of an old index in the new model's order; candidates are embedded when first asked for.

    Nothing has to be embedded before the new model serves. Each query asks the old index for its ``depth`` nearest
    items; those whose new vector is not kept yet are embedded by the new model, and kept. So the backfill follows what
    is searched for, and ``cache.ids()`` says how far it has come. :func:`two_stage_accuracy` tells which depth is
    enough.

    Args:
        index: of the old vectors: a faiss index, whose row numbers (or own ids, in an ``IndexIDMap``) are the ids of
            the items; or a function ``(queries, depth)`` that returns ``(Q, depth)`` ids, nearest first, as Qdrant's or
            Milvus's clients find them; None or -1 where it found no more.
        embed: called with a list of ids; returns the new model's vectors ``(n, D_new)`` of these items, a tensor or an
            array.
        cache: a :class:`VectorCache`, or the path of one; None keeps vectors in memory.
        depth: candidates a query, 1 or more.
        fingerprint: of the new model, for the cache that is made of a path.
    Example:
        >>> old, new = torch.eye(4), torch.eye(4)[:, [1, 0, 3, 2]]
        >>> def index(queries, depth):
        ...     return (queries @ old.t()).topk(depth).indices
        >>> search = TwoStageSearch(index, lambda ids: new[ids], depth=4)
        >>> scores, ids = search(old[:2], new[:2], k=1)
        >>> ids.tolist(), len(search.cache)
        ([[0], [1]], 4)

    Reference:
        Ours; candidates of one model put in another's order are the usual two-stage search.
    """

    def __init__(
        self,
        index: Any,
        embed: Callable[[list[Any]], Any],
        cache: VectorCache | str | os.PathLike[str] | None = None,
        *,
        depth: int = 50,
        fingerprint: str | None = None,
    ) -> None:
        if not callable(index) and not callable(getattr(index, "search", None)):
            raise ValueError(f"index must be a faiss index or a function (queries, depth), got {type(index).__name__}")
        if not callable(embed):
            raise ValueError(f"embed must be a function of a list of ids, got {type(embed).__name__}")
        self.index, self.embed = index, embed
        self.depth = check_integer(depth, "depth", minimum=1)
        if not isinstance(cache, VectorCache | str | os.PathLike | None):
            raise ValueError(f"cache must be a VectorCache or a path, got {type(cache).__name__}")
        if not isinstance(cache, VectorCache):
            cache = VectorCache(":memory:" if cache is None else cache, fingerprint=fingerprint)
        elif fingerprint is not None and cache.fingerprint != fingerprint:
            raise ValueError(f"fingerprint must be the cache's, {cache.fingerprint!r}, got {fingerprint!r}")
        self.cache = cache

    def __call__(self, old_queries: Any, new_queries: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(Q, k)`` cosines with the new queries, highest first, and the ids of the items.

        Fewer than k candidates are filled up with -inf and None.

        Args:
            old_queries: ``(Q, D_old)``, what the old index is asked with; blended ones find more (``QueryBlend``).
            new_queries: ``(Q, D_new)``, the new model's of the same queries.
            k: items wanted, at most ``depth``.
        Raises:
            ValueError: widths or lengths that differ, NaN or infinity, ``k`` above ``depth``; ``embed`` does not return
                a finite row an id.
        """
        old = check_embeddings(old_queries, "old_queries").detach()
        new = check_embeddings(new_queries, "new_queries").detach()
        if len(old) != len(new):
            raise ValueError(f"new_queries must have the queries of old_queries, {len(old)}, got {len(new)}")
        if check_integer(k, "k", minimum=1) > self.depth:
            raise ValueError(f"k must be at most depth, {self.depth}, got {k}")
        candidates = self._candidates(old)
        vectors, place = self._vectors([value for row in candidates for value in row], new.shape[1])
        queries = new.float().cpu().numpy()
        queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        scores = np.full((len(old), k), -np.inf, dtype=np.float32)
        ids = np.full((len(old), k), None, dtype=object)
        for row, own in enumerate(candidates):
            cosines = vectors[[place[value] for value in own]] @ queries[row] if own else np.empty(0, np.float32)
            order = np.argsort(-cosines, kind="stable")[:k]
            scores[row, : len(order)] = cosines[order]
            ids[row, : len(order)] = [own[number] for number in order]
        return scores, ids

    def _candidates(self, queries: torch.Tensor) -> list[list[Any]]:
        """Return each query's ids, each once, without what the index filled up with."""
        if callable(self.index):
            found = self.index(queries, self.depth)
        else:
            _, found = self.index.search(queries.float().cpu().contiguous().numpy(), self.depth)
        if isinstance(found, torch.Tensor | np.ndarray):
            found = found.tolist()
        if len(found) != len(queries) or not all(hasattr(row, "__iter__") for row in found):
            raise ValueError(f"index must return a row of ids a query, {len(queries)}, got {len(found)}")
        return [list(dict.fromkeys(value for value in row if value is not None and value != -1)) for row in found]

    def _vectors(self, ids: Sequence[Any], width: int) -> tuple[np.ndarray, dict[Any, int]]:
        """Return unit rows of the new vectors of some items, and each one's place among them."""
        asked = list(dict.fromkeys(ids))
        known, vectors = self.cache.get(asked)
        missing = [value for value, there in zip(asked, known, strict=True) if not there]
        if missing:
            made = as_tensor(self.embed(missing), "what embed returns").detach().float().cpu().numpy()
            if made.shape != (len(missing), width):
                raise ValueError(
                    f"embed must return one row an id, as wide as new_queries: ({len(missing)}, {width}), "
                    f"got {made.shape}"
                )
            self.cache.add(missing, made)
            vectors = np.concatenate([vectors.reshape(-1, width), made])
        if vectors.shape[1:] != (width,) and len(vectors):
            raise ValueError(f"new_queries must be as wide as the kept vectors, {vectors.shape[1]}, got {width}")
        order = [value for value, there in zip(asked, known, strict=True) if there] + missing
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors, {value: number for number, value in enumerate(order)}
