"""Fixed points of an old space: those of a served index, or learned from stored old embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._checks import check_integer, stored_rows
from .._extras import import_extra
from .._rows import at_least_float32, unit_rows

_LEARNED_ON = 256  # rows an anchor, at most


def anchors_of_index(index: Any) -> torch.Tensor:
    """Return what a faiss index divides its space by.

    Args:
        index: a trained faiss index: its lists' centroids where it is an IVF index, whatever its codes, which are those
            of differences from them; otherwise its product quantiser's codebooks. Behind an IDMap, a graph or a
            refinement, or, of an IVF index, maps of the vectors too (OPQ, PCA): the centroids are mapped back.
    Shape:
        - output: ``(K, D)`` centroids, or ``(M, K, D / M)`` codebooks
    Raises:
        ImportError: faiss is not installed.
        ValueError: something else; an index that is not trained, or has neither.
    """
    faiss = import_extra("faiss", "faiss-cpu")
    if not isinstance(index, faiss.Index):
        raise ValueError(f"index must be a faiss index, got {type(index).__name__}; read a file by faiss.read_index")
    if not index.is_trained:
        raise ValueError(f"index must be trained, got {type(index).__name__} that is not; call index.train(vectors)")
    inner, maps = faiss.downcast_index(index), []
    while wrapped := _wrapped_by(faiss, inner):
        if isinstance(inner, faiss.IndexPreTransform):
            chain = inner.chain
            maps += [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]
        inner = faiss.downcast_index(wrapped)
    if isinstance(inner, faiss.IndexIVF):
        rows = np.asarray(inner.quantizer.reconstruct_n(0, inner.nlist))  # a tensor after faiss.contrib.torch_utils
        for one in reversed(maps):
            rows = one.reverse_transform(rows)
        return torch.from_numpy(rows.copy())
    quantiser = getattr(inner, "pq", None)
    if quantiser is None or maps:
        why = "whose codes are of mapped vectors" if maps else "which has neither"
        raise ValueError(
            f"index must have IVF lists or a product quantiser, got {type(inner).__name__}, {why}; learn anchors from "
            "stored old embeddings: SSPLoss.from_embeddings(old_embeddings)"
        )
    codebooks = faiss.vector_to_array(quantiser.centroids)
    return torch.from_numpy(codebooks.reshape(quantiser.M, quantiser.ksub, quantiser.dsub).copy())


def _wrapped_by(faiss: Any, index: Any) -> Any:
    if isinstance(index, faiss.IndexRefine):
        return index.base_index
    if isinstance(index, faiss.IndexHNSW):
        return index.storage
    return index.index if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap) else None


def learned_anchors(embeddings: Any, count: int, subspaces: int, seed: int) -> torch.Tensor:
    """Return codebooks that scikit-learn's k-means learns from the unit rows of old embeddings, each part by itself.

    Args:
        embeddings: ``(N, D)`` tensor, array, memory map or FrozenEmbeddings, of which ``256 * count`` rows at most are
            read.
        count: anchors a subspace, where there are as many rows; 2 or more.
        subspaces: parts of the width, which they divide.
        seed: of the rows and the k-means.
    Shape:
        - output: ``(subspaces, count, D / subspaces)``, float32, on the CPU
    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a number out of its range; embeddings not finite.
    """
    cluster = import_extra("sklearn.cluster", "demo")
    size, width = embeddings.shape
    count = check_integer(count, "count", minimum=2)
    if width % check_integer(subspaces, "subspaces", minimum=1):
        raise ValueError(f"subspaces must divide the width of the embeddings, {width}, got {subspaces}")
    order = np.random.default_rng(check_integer(seed, "seed", minimum=0)).permutation(size)
    some = torch.from_numpy(np.sort(order[: _LEARNED_ON * count]))
    rows = unit_rows(at_least_float32(stored_rows(embeddings, some, "embeddings"))).float().cpu().numpy()
    kmeans = cluster.KMeans(min(count, len(rows)), n_init=1, random_state=seed)
    books = [kmeans.fit(np.ascontiguousarray(part)).cluster_centers_.copy() for part in np.split(rows, subspaces, 1)]
    return torch.from_numpy(np.stack(books))
