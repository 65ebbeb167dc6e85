"""Structure similarity preservation: a new embedding lies to fixed points of the old space as the old one does."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import as_tensor, check_finite, check_number, check_same_device
from .._rows import at_least_float32, unit_rows
from ..frozen.anchors import anchors_of_index, learned_anchors
from ._label_free import LabelFreeLoss
from ._reduction import per_sample
from .csd_loss import divergences
from .old_rows import check_old_rows


class SSPLoss(LabelFreeLoss):
    r"""Keep each item's similarities to fixed points of the old space, without labels: a served index has such points.

    .. math:: \ell_i = \operatorname{mean}_m \operatorname{KL}\left(\operatorname{softmax}_k (s M \, o_{im} \cdot
        c_{mk}) \,\middle\|\, \operatorname{softmax}_k (s M \, n_{im} \cdot c_{mk})\right), \quad m = 1, \dots, M

    :math:`n_{im}, o_{im}` are the m-th of M equal parts of the unit rows of item i by the new and the old model,
    :math:`c_{mk}` the anchors of that part: the codebooks of a product quantiser, or, with one part, the centroids of
    an inverted file. The more parts and anchors, the less is left free.

    Args:
        anchors: ``(K, D_old)``, which become unit rows, or codebooks ``(M, K, D_old / M)``, which are scaled together
            to the length of unit rows; tensor or array, K is 2 or more. See :meth:`from_index` and
            :meth:`from_embeddings`. A buffer, in ``state_dict``.
        scale: ``s``, above 0.
        **kwargs: ``reducer`` (one loss a row, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better, 0 or more
    Raises:
        ValueError: ``anchors`` not shaped like this, not floating point, NaN or infinite, or all 0; ``scale`` not above
            0; ``ref_emb`` missing, of another length or not as wide as the anchors; empty, NaN or infinite; another
            device; an ``indices_tuple``.
    Example:
        >>> new, old = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
        >>> SSPLoss(torch.eye(2), scale=1.0)(new, ref_emb=old)  # e / (e + 1) = 0.73 against 0.27
        tensor(0.4621)

    Reference:
        Wu et al., "Structure Similarity Preservation Learning for Asymmetric Image Retrieval", arXiv 2403.00648, 2024,
        with ``s M = 10`` at 16 or 32 parts. Differs from it in: the factor M, as the inner product of a part is one
        M-th of a cosine; the anchors' length. Rows of length 0 have no direction and receive no gradient.
    """

    tells_by_its_value = True

    old_anchors: torch.Tensor

    def __init__(self, anchors: Any, scale: float = 5.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("old_anchors", as_codebooks(anchors))
        self.scale = check_number(scale, "scale", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["scale"], is_stat=False)

    @classmethod
    def from_index(cls, index: Any, **kwargs: Any) -> SSPLoss:
        """Take the anchors of the index that serves the old gallery; it may be empty, as long as it is trained.

        Args:
            index: a trained faiss index (``faiss.read_index(path)``): an IVF index, for the centroids of its lists, or
                one with a product quantiser alone, for its codebooks; also behind an IDMap, a graph or a refinement,
                or, of an IVF index, maps of the vectors (OPQ, PCA).
            **kwargs: see the class.
        Raises:
            ImportError: faiss is not installed.
            ValueError: something else; an index that is not trained, or has neither.
        """
        return cls(anchors_of_index(index), **kwargs)

    @classmethod
    def from_embeddings(
        cls, old_embeddings: Any, *, count: int = 256, subspaces: int | None = None, seed: int = 0, **kwargs: Any
    ) -> SSPLoss:
        """Learn the anchors from stored old embeddings, by scikit-learn's k-means.

        Args:
            old_embeddings: ``(N, D_old)`` tensor, array, memory map or ``FrozenEmbeddings``, of which ``256 * count``
                rows at most are read.
            count: ``K``, 2 or more; the number of rows where that is less.
            subspaces: ``M``, which divides the width; None for parts of two coordinates, or of as few as divide it.
            seed: of the rows that are read and of the k-means.
            **kwargs: see the class.
        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: embeddings that are NaN or infinite, a number out of its range.
        """
        if subspaces is None:
            width = old_embeddings.shape[1]
            subspaces = width // next((part for part in range(2, width) if width % part == 0), width)
        return cls(learned_anchors(old_embeddings, count, subspaces, seed), **kwargs)

    def check_rows(self, embeddings: torch.Tensor, ref_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows as wide as the anchors, and where they are."""
        check_same_device(embeddings, "embeddings", self.old_anchors, "the loss")
        parts, _, width = self.old_anchors.shape
        return check_old_rows(embeddings, ref_emb, width=parts * width)

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row."""
        codebooks = self.scale * len(self.old_anchors) * self.old_anchors.to(new_emb.dtype).transpose(1, 2)
        answers, targets = (
            torch.bmm(unit_rows(rows, dtype).unflatten(1, (len(codebooks), -1)).transpose(0, 1), codebooks)
            for rows in (new_emb, old_emb)
        )
        return {"loss": per_sample(divergences(targets, answers).mean(0))}


def as_codebooks(anchors: Any) -> torch.Tensor:
    """Return anchors as ``(M, K, D / M)``, in float32 or better, as long as parts of unit rows."""
    given = as_tensor(anchors, "anchors").detach()
    if given.ndim not in (2, 3) or 0 in given.shape or given.shape[-2] < 2:
        raise ValueError(
            "anchors must be (K, D) centroids or (M, K, D / M) codebooks, K of 2 or more, got shape "
            f"{tuple(given.shape)}"
        )
    if not given.is_floating_point():
        raise ValueError(f"anchors must be floating point, got {given.dtype}; convert them with .float()")
    check_finite(given, "anchors")
    precise = at_least_float32(given)
    if not bool(precise.any()):
        raise ValueError("anchors must not be all 0")
    if given.ndim == 2:
        return unit_rows(precise)[None]
    return precise / precise.square().sum(2).mean(1).sum().sqrt()  # a row of mean codes then has length 1
