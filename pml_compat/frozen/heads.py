"""What the old loss does with its frozen class weights, sample by sample.

A head says how weights are prepared, what the logits are, and what the loss of one sample is. It holds no tensor.
``head_of`` reads one off a PML loss, with that loss's own margin and scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy, linear, logsigmoid, normalize, one_hot, softplus

from .._host import DotProductSimilarity, LpDistance
from .._host import losses as pml_losses
from .._rows import unit_rows
from .class_weights import all_centers, sub_centers_of, unwrap_loss
from .log_sum_exp import wrong_class_logsumexp

_FEW_ROWS = 512  # up to here torch's cross-entropy over all logits is faster than going through them in blocks
_EDGE = 1e-6  # keeps the gradient of the square root finite at cosines of +-1


@dataclass(frozen=True)
class Head:
    """What every head answers; the ``centers_per_class`` rows of a class stand together."""

    centers_per_class: int = field(default=1, kw_only=True)

    def prepare(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the ``(C * K, D)`` rows in the form that is kept, and handed to the other methods."""
        return normalize(rows, dim=1)

    def logits(self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the ``(B, C)`` logits, without a margin."""
        raise NotImplementedError

    def losses(
        self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the ``(B,)`` losses for the class indices ``targets``."""
        raise NotImplementedError


def _cosines(embeddings: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    return unit_rows(embeddings) @ directions.t().to(embeddings.dtype)


@dataclass(frozen=True)
class SoftmaxHead(Head):
    r"""Cross-entropy over :math:`z_{ij} = s \langle e_i, w_j \rangle + b_j` with a margin on the true class.

    ``margin_type`` changes the true class's cosine: ``"angle"`` to cos(theta + m) (ArcFace, m in radians),
    ``"cosine"`` to cos(theta) - m (CosFace), ``"multiple"`` to cos(m theta) (L-Softmax, SphereFace).
    """

    scale: float = 1.0
    unit_embeddings: bool = True
    unit_rows: bool = True
    margin_type: Literal["none", "angle", "cosine", "multiple"] = "none"
    margin: float = 0.0

    def prepare(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(rows, dim=1) if self.unit_rows else rows

    def _scaled(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (unit_rows(embeddings) if self.unit_embeddings else embeddings) * self.scale

    def logits(self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._logits_of(self._scaled(embeddings), rows, bias)

    def _logits_of(self, scaled: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = linear(scaled, rows.to(scaled.dtype), None if bias is None else bias.to(scaled.dtype))
        return logits.unflatten(1, (-1, self.centers_per_class)).amax(2) if self.centers_per_class > 1 else logits

    def losses(
        self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        scaled = self._scaled(embeddings)
        few = len(rows) <= _FEW_ROWS
        if few and self.margin_type == "none":
            return cross_entropy(self._logits_of(scaled, rows, bias), targets, reduction="none")
        own = rows.unflatten(0, (-1, self.centers_per_class)).index_select(0, targets)  # (B, K, D), not (B, C)
        target = (scaled[:, None] * own).sum(2)
        if self.centers_per_class > 1:
            target, nearest = target.max(1)
            own = own[torch.arange(len(own), device=own.device), nearest]
        else:
            target, own = target[:, 0], own[:, 0]
        if self.margin_type != "none":
            # length is what turns the cosine into the logit: |s e| |w|, or a constant for the unit losses
            length = scaled.norm(dim=1) * own.norm(dim=1)
            target = length * self._with_margin(target / length.clamp_min(torch.finfo(target.dtype).tiny))
        elif bias is not None:
            target = target + bias[targets]
        if few:
            logits = self._logits_of(scaled, rows, bias)
            return cross_entropy(logits.scatter(1, targets[:, None], target[:, None]), targets, reduction="none")
        wrong = wrong_class_logsumexp(scaled, rows, targets, bias, self.centers_per_class)
        return torch.logaddexp(wrong, target) - target

    def _with_margin(self, cosine: torch.Tensor) -> torch.Tensor:
        if self.margin_type == "cosine":
            return cosine - self.margin
        if self.margin_type == "angle":
            sine = (1 - cosine.square()).clamp_min(_EDGE**2).sqrt()
            shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
            # Past theta = pi - m the cosine would rise again; PML goes on in a straight line there, as do we.
            return torch.where(cosine >= -math.cos(self.margin), shifted, cosine - self.margin * math.sin(self.margin))
        with torch.no_grad():
            turns = (self.margin * cosine.clamp(-1, 1).arccos() / math.pi).floor()
        before, multiple = torch.ones_like(cosine), cosine
        for _ in range(int(self.margin) - 1):  # Chebyshev: cos(m t) = 2 cos(t) cos((m-1) t) - cos((m-2) t)
            before, multiple = multiple, 2 * cosine * multiple - before
        return (1 - 2 * (turns % 2)) * multiple - 2 * turns


@dataclass(frozen=True)
class SoftTripleHead(Head):
    """SoftTriple: a class's similarity is the softmax-weighted mean over its centres."""

    scale: float
    gamma: float
    margin: float

    def logits(self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        cosines = _cosines(embeddings, rows).unflatten(1, (-1, self.centers_per_class))
        return self.scale * (torch.softmax(self.gamma * cosines, 2) * cosines).sum(2)

    def losses(
        self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        logits = self.logits(embeddings, rows, bias)
        margin = one_hot(targets, logits.shape[1]).to(logits) * (self.scale * self.margin)
        return cross_entropy(logits - margin, targets, reduction="none")


@dataclass(frozen=True)
class ProxyAnchorHead(Head):
    """Proxy Anchor, which sums over a batch for each proxy: here, its value on each sample as a batch of one."""

    alpha: float
    margin: float

    def logits(self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.alpha * _cosines(embeddings, rows)

    def losses(
        self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        logits, shift = self.logits(embeddings, rows, bias), self.alpha * self.margin
        own = logits.gather(1, targets[:, None])[:, 0]
        wrong = softplus(logits + shift).sum(1) - softplus(own + shift)
        return -logsigmoid(own - shift) + wrong / logits.shape[1]


@dataclass(frozen=True)
class P2SGradHead(Head):
    """P2SGrad: the mean squared difference between the cosines and the one-hot label."""

    def logits(self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _cosines(embeddings, rows)

    def losses(
        self, embeddings: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        cosines = self.logits(embeddings, rows, bias)
        own = cosines.gather(1, targets[:, None])[:, 0]
        return (cosines.square().sum(1) - 2 * own + 1) / cosines.shape[1]


def head_of(loss: Any) -> tuple[Head, torch.Tensor, torch.Tensor | None]:
    """Return the head of an unwrapped PML loss, its ``(C * K, D)`` centres and its bias.

    Raises:
        ValueError: the loss has no class weights, or a distance that its head is not defined for.
    """
    rows = all_centers(loss)
    k = sub_centers_of(loss)
    if isinstance(loss, pml_losses.P2SGradLoss):
        return P2SGradHead(), rows, None
    if isinstance(loss, pml_losses.ProxyNCALoss):
        return _proxy_nca(loss, rows)
    _require_dot_product(loss)
    if isinstance(loss, pml_losses.SoftTripleLoss):
        return SoftTripleHead(float(loss.la), float(loss.gamma), float(loss.margin), centers_per_class=k), rows, None
    if isinstance(loss, pml_losses.ProxyAnchorLoss):
        return ProxyAnchorHead(float(loss.alpha), float(loss.margin)), rows, None
    if isinstance(loss, pml_losses.NormalizedSoftmaxLoss):
        return SoftmaxHead(1 / float(loss.temperature)), rows, None
    scale, margin = float(loss.scale), float(loss.margin)
    if isinstance(loss, pml_losses.ArcFaceLoss):  # and SubCenterArcFaceLoss; PML keeps the margin in radians
        return SoftmaxHead(scale, margin_type="angle", margin=margin, centers_per_class=k), rows, None
    if isinstance(loss, pml_losses.CosFaceLoss):
        return SoftmaxHead(scale, margin_type="cosine", margin=margin), rows, None
    unit_rows = isinstance(loss, pml_losses.SphereFaceLoss)
    return SoftmaxHead(scale, False, unit_rows, margin_type="multiple", margin=margin), rows, None


@torch.no_grad()
def rescale_class_weights_(loss: torch.nn.Module, length: float) -> bool:
    """Give the centres of a PML loss one length, in place; return False, and do nothing, where it uses lengths."""
    loss = unwrap_loss(loss)
    if getattr(loss, "weight_regularizer", None) is not None:
        return False
    try:
        head, rows, _ = head_of(loss)
    except ValueError:  # no class weights, or a distance of the user's own
        return False
    unit_rows = head.prepare(rows)
    if unit_rows is rows:
        return False
    rows.copy_(unit_rows * length)
    return True


def _proxy_nca(loss: Any, proxies: torch.Tensor) -> tuple[SoftmaxHead, torch.Tensor, torch.Tensor | None]:
    """With squared distances, softmax(-s |e - p|^2) is a softmax over 2 s <e, p> - s |p|^2."""
    scale, distance = float(loss.softmax_scale), loss.distance
    if isinstance(distance, LpDistance) and distance.p == 2 and distance.power == 2:
        if distance.normalize_embeddings:
            return SoftmaxHead(2 * scale), proxies, None
        return SoftmaxHead(2 * scale, False, False), proxies, -scale * proxies.square().sum(1)
    _require_dot_product(loss)
    return SoftmaxHead(scale), proxies, None


def _require_dot_product(loss: Any) -> None:
    distance = loss.distance
    if not (
        isinstance(distance, DotProductSimilarity)
        and distance.normalize_embeddings
        and distance.p == 2
        and distance.power == 1
    ):
        raise ValueError(
            f"loss must use its default distance to be frozen, got {type(loss).__name__} with "
            f"{type(distance).__name__}(p={distance.p}, power={distance.power}, "
            f"normalize_embeddings={distance.normalize_embeddings}); "
            "take its weights alone: FrozenClassifier(class_weights(loss), kind='cosine', scale=...)"
        )
