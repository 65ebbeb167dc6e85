"""Which old embeddings are worth training on: the others lie far from their class, or between classes."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from .._checks import check_number
from .class_means import ClassMeans, class_means, pieces

Rule = Literal["nearest", "entropy"]
_BLOCK_ELEMENTS = 2**22  # distances held at once


def credible_mask(
    embeddings: Any,
    labels: Any,
    *,
    rule: Rule = "nearest",
    share: float = 0.9,
    max_entropy: float = 0.5,
    normalize: bool = True,
) -> torch.Tensor:
    r"""Tell the credible old embeddings from those that a new model had better not learn from.

    ``"nearest"`` keeps, of the n samples of each class, the :math:`\lceil share \cdot n \rceil` nearest to the mean
    of the class (of equally near ones the first): at least one, and all of a class of one.

    ``"entropy"`` keeps a sample where the old model is sure of *some* class, which its own label does not enter into:

    .. math:: H(p_i) \le max\_entropy \cdot \ln C, \quad p_{ic} \propto \exp(-\lVert \hat f_i - m_c \rVert^2 / v_c)

    with :math:`m_c` the mean and :math:`v_c` the mean squared distance to it in class c; a class without spread takes
    the mean over all samples. What it keeps depends on how compact the classes are, so look at the mask's mean.

    Args:
        embeddings: ``(N, D)`` old embeddings of the training set: tensor, array, memory map or
            :class:`FrozenEmbeddings`; read in pieces.
        labels: ``(N,)`` integers, in any order.
        rule: ``"nearest"``, O(N D); or ``"entropy"``, O(N C D) in blocks, for one run before a training.
        share: of each class that ``"nearest"`` keeps; in (0, 1].
        max_entropy: of ``"entropy"``, as a share of the highest entropy, ln C; in [0, 1].
        normalize: measure unit rows, as a cosine search does; False measures the embeddings as they are.
    Shape:
        - output: ``(N,)`` bool, on the device of ``embeddings``
    Raises:
        ValueError: unknown ``rule``; ``share`` or ``max_entropy`` outside its range; embeddings empty, NaN or
            infinite; labels of another length.
    Example:
        >>> old = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.0]])
        >>> credible_mask(old, torch.tensor([3, 3, 3, 8]), share=0.6)
        tensor([ True, False,  True,  True])

    Reference:
        ``"nearest"``: Liang et al., "MixBCT: Towards Self-Adapting Backward-Compatible Training", 2023.
        ``"entropy"``: Wu et al., "Neighborhood Consensus Contrastive Learning for Backward-Compatible
        Representation", AAAI 2022. Differs from the public code in: rows alone are brought to unit length, not
        columns after them; the entropy is over all C classes, not over a sample's own, which is always 0; the
        distance is squared, so that its ratio to the variance has no unit.
    """
    check_rule(rule, share, max_entropy)
    classes = class_means(embeddings, labels, normalize=normalize)
    if rule == "nearest":
        return _nearest(classes, share)
    limit = max_entropy * math.log(len(classes.labels))
    return _entropies(embeddings, classes, normalize) <= limit


def check_rule(rule: str, share: float, max_entropy: float) -> None:
    """Check the arguments of :func:`credible_mask`.

    Raises:
        ValueError: unknown ``rule``; ``share`` or ``max_entropy`` outside its range.
    """
    if rule not in ("nearest", "entropy"):
        raise ValueError(f"rule must be 'nearest' or 'entropy', got {rule!r}")
    if check_number(share, "share", minimum=0, exclusive=True) > 1:
        raise ValueError(f"share must be at most 1, got {share!r}")
    if check_number(max_entropy, "max_entropy", minimum=0) > 1:
        raise ValueError(f"max_entropy must be at most 1, got {max_entropy!r}")


def kept(counts: torch.Tensor, share: float) -> torch.Tensor:
    """Return how many samples ``"nearest"`` keeps of classes of ``counts``, ``(C,)``."""
    # 0.55 * 100 is a little above 55 in floating point, and no reason to keep 56
    return (counts.double() * share - 1e-6).ceil().long().clamp(min=1)


def _nearest(classes: ClassMeans, share: float) -> torch.Tensor:
    order = torch.argsort(classes.distances, stable=True)
    order = order[torch.argsort(classes.rows[order], stable=True)]  # by class, and by distance within it
    first = torch.cumsum(classes.counts, 0) - classes.counts
    rows = classes.rows[order]
    rank = torch.arange(len(order), device=order.device) - first[rows]
    return torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, rank < kept(classes.counts, share)[rows])


def _entropies(embeddings: Any, classes: ClassMeans, normalize: bool) -> torch.Tensor:
    """Return the entropy of each sample's distribution over the classes, ``(N,)``, in blocks of rows."""
    variances = classes.variances()
    means = classes.means.double()
    lengths = means.square().sum(1)
    size = max(1, _BLOCK_ELEMENTS // len(means))
    found = []
    for _, piece in pieces(embeddings, normalize, size):
        apart = torch.addmm(lengths, piece, means.t(), alpha=-2).add_(piece.square().sum(1, keepdim=True)).clamp_(min=0)
        found.append(torch.special.entr(torch.softmax(-apart / variances, dim=1)).sum(1))
    return torch.cat(found)
