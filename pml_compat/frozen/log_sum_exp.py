"""The one costly step of a frozen classifier, in one buffer: the log-sum-exp over the wrong classes."""

from __future__ import annotations

from typing import Any

import torch

# Logits held at once: enough that a block's product outweighs the start of its parallel loops, which is slow where the
# cores are shared with data loaders; on a GPU, enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}


def wrong_class_logsumexp(
    embeddings: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    centers_per_class: int = 1,
) -> torch.Tensor:
    r"""Return :math:`\log \sum_{j \ne y_i} \max_k e^{\langle e_i, w_{jk} \rangle + b_j}` for each sample.

    ``rows`` is frozen, and the gradient in ``embeddings`` is a softmax-weighted mean of its rows, as in attention.
    So the classes are gone through once, in blocks, with a running maximum: a block of logits is made, turned into
    weights in place, used for value and gradient, and dropped. Memory beyond the inputs is one block
    and two ``(B, D)`` tensors, whatever the number of classes.

    Args:
        embeddings: ``(B, D)``, float32 or float64; the only argument that receives a gradient.
        rows: ``(C * K, D)``, the K centres of a class together.
        targets: ``(B,)`` class index of each sample, left out of its sum.
        bias: ``(C * K,)`` or None.
        centers_per_class: K; with more than one, a class's logit is the largest of its centres'.
    Shape:
        - output: ``(B,)``; minus infinity where there is no other class
    """
    return _WrongClassLogSumExp.apply(embeddings, rows, targets, bias, centers_per_class)


class _WrongClassLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        centers_per_class: int,
    ) -> torch.Tensor:
        n, k, dtype = len(embeddings), centers_per_class, embeddings.dtype
        wants_gradient = ctx.needs_input_grad[0]
        elements = _BLOCK_ELEMENTS.get(embeddings.device.type, _BLOCK_ELEMENTS["cuda"])
        block = max(64, elements // n // k) * k
        # A finite floor: subtracting minus infinity from itself would give NaN.
        top = embeddings.new_full((n, 1), torch.finfo(dtype).min)
        total = embeddings.new_zeros(n, 1)
        weighted = torch.zeros_like(embeddings) if wants_gradient else None
        targets = targets[:, None]
        # The embedding product needs full precision whatever the autocast around it: the sum is of exponentials.
        with torch.autocast(embeddings.device.type, enabled=False):
            for start in range(0, len(rows), block):
                part = rows[start : start + block].to(dtype)
                logits = embeddings @ part.t()
                if bias is not None:
                    logits += bias[start : start + block]
                if k > 1:
                    logits, center = logits.unflatten(1, (-1, k)).max(2)
                _drop_targets(logits, targets - start // k)
                higher = torch.maximum(top, logits.amax(1, keepdim=True))
                weights = logits.sub_(higher).exp_()
                shrink = (top - higher).exp_()
                total = total.mul_(shrink).add_(weights.sum(1, keepdim=True))
                if weighted is not None:
                    if k > 1:  # the weight of a class belongs to its largest centre
                        spread = weights.new_zeros(n, weights.shape[1], k)
                        weights = spread.scatter_(2, center[..., None], weights[..., None]).flatten(1)
                    weighted = torch.addmm(weighted.mul_(shrink), weights, part)
                top = higher
        if weighted is not None:
            ctx.save_for_backward(weighted / total.clamp_min(torch.finfo(dtype).tiny))
        return (total.log() + top)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None, None, None


def _drop_targets(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Set each sample's own class to minus infinity where this block holds it, without asking the device which do."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    column = targets.clamp(0, logits.shape[1] - 1)
    logits.scatter_(1, column, torch.where(inside, -torch.inf, logits.gather(1, column)))
