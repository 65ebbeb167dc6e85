"""The transformation of FastFill: it predicts its own error, by which a backfill is ordered."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch

from .base import Transformation
from .fct import FCTTransformation
from .linear_path import LinearPath
from .pairs import PairMoments

LOWEST, HIGHEST = -10.0, 10.0


class FastFillTransformation(Transformation):
    r"""Map an old embedding into the new space, and predict how far off it lands.

    .. math:: [\,h(f_o, s), \log \sigma^2(f_o, s)\,] = \operatorname{mix}([\,\operatorname{branch}_1(f_o),
        \operatorname{branch}_2(s)\,])

    The layers are those of :class:`FCTTransformation`; the last one has an output more, the log variance of one
    coordinate of :math:`f_n - h`. Called, exported or in a chain, the transformation gives ``h`` alone. Train it with
    :class:`pml_compat.losses.FastFillLoss`, and give :meth:`uncertainty` to ``backfill_curve(order=...)``: the items
    that are mapped worst are embedded anew first.

    Args:
        old_features: width of the old embeddings.
        new_features: width of the new embeddings.
        side_features: width of the side-information; None without.
        hidden_features: width of the two inner layers of ``mix``.
        variance_gradient: whether the variance trains the layers that it shares with ``h``. Without it the prediction
            reads what ``h`` has learned and cannot spoil it.
    Shape:
        - embeddings ``(N, old_features)``; side_info ``(N, side_features)``, where there is any
        - output: ``(N, new_features)``; in training a batch of one row gets the running statistics
        - ``with_log_variance``: the same, and ``(N,)`` in [-10, 10]; ``uncertainty``: ``(N,)``
    Raises:
        ValueError: a width below 1; in a call: see :class:`Transformation`.
    Example:
        >>> transformation = FastFillTransformation(8, 4, hidden_features=16)
        >>> gallery = torch.randn(100, 8)
        >>> transformation(gallery).shape
        torch.Size([100, 4])
        >>> transformation.uncertainty(gallery, progress=False).shape
        torch.Size([100])

    Note:
        The bounds keep a diverging prediction from a variance of 0. They are far off where the coordinates of a new
        embedding are about 1. Errors below 0.007 a coordinate are all under the lower one, so that their rows tie:
        unit rows of a thousand coordinates and more are better multiplied by :math:`\sqrt{d}` before the training
        (and the transformed ones normalised after it, ``apply_to(..., normalize=True)``).

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023. The bounds are ours, and
        so is the place of the variance, beside ``h`` in the last layer.
    """

    def __init__(
        self,
        old_features: int,
        new_features: int,
        side_features: int | None = None,
        hidden_features: int = 2048,
        variance_gradient: bool = True,
    ) -> None:
        super().__init__(old_features, new_features, side_features)
        self.variance_gradient = bool(variance_gradient)
        self.layers = FCTTransformation(old_features, new_features, side_features, hidden_features)
        self.hidden_features = self.layers.hidden_features
        self.layers.mix[-1] = torch.nn.Linear(self.hidden_features, self.out_features + 1)
        self.layers.out_features += 1  # h and, last, the log variance

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``h(f_o, s)``."""
        return self.layers.transform(embeddings, side_info)[:, : self.out_features]

    def with_log_variance(self, embeddings: torch.Tensor, side_info: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``h`` and the predicted log variance, ``(N, new_features)`` and ``(N,)``, from one pass."""
        if self.variance_gradient:
            both = self.layers(embeddings, side_info)
            return both[:, : self.out_features], both[:, -1].clamp(LOWEST, HIGHEST)
        hidden: list[torch.Tensor] = []
        last = cast(torch.nn.Linear, self.layers.mix[-1])
        with last.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0])):
            mapped = self(embeddings, side_info)
        log_variance = torch.nn.functional.linear(hidden[0].detach(), last.weight[-1:], last.bias[-1:])[:, 0]
        if self.layers.linear_path is not None:
            log_variance = log_variance + self.layers.linear_path.bias[-1]
        return mapped, log_variance.to(mapped.dtype).clamp(LOWEST, HIGHEST)

    def uncertainty(
        self, source: Any, side_info: Any = None, batch_size: int = 8192, *, progress: bool = True
    ) -> torch.Tensor:
        """Return the predicted log variance of a whole gallery, in eval mode, in memory set by ``batch_size``.

        Args:
            source: ``(N, old_features)`` tensor, array or memory map, as ``apply_to`` takes.
            side_info: ``(N, side_features)``, row i of the same item; None where the transformation takes none.
            batch_size: rows at once.
            progress: show a progress bar.
        Shape:
            - output: ``(N,)`` float32 on the CPU, the worst row the highest
        Raises:
            ValueError: other widths, lengths that differ, NaN or infinity (which row).
        """
        # The same layers with the last output alone: a gallery of its mapped rows need not fit into memory.
        layers = copy.deepcopy(self.layers)
        last = cast(torch.nn.Linear, layers.mix[-1])
        for name, parameter in list(last.named_parameters()):
            setattr(last, name, torch.nn.Parameter(parameter[-1:]))
        if layers.linear_path is not None:
            layers.linear_path.keep_output(-1)
        layers.out_features = 1
        log_variance = layers.apply_to(source, side_info, batch_size=batch_size, progress=progress)
        return torch.from_numpy(log_variance)[:, 0].float().clamp(LOWEST, HIGHEST)

    def start_from(self, moments: PairMoments) -> bool:
        """Become the closed-form linear map, with the same variance for all rows: that which it leaves."""
        if not self.layers.start_from(moments):
            return False
        path = cast(LinearPath, self.layers.linear_path)
        path.bias[-1] = math.log(max(path.variance_left(moments), math.exp(LOWEST)))
        return True

    @torch.no_grad()
    def back_to_start(self) -> None:
        """Set the last layer's part for ``h`` to 0; the variance keeps what it has learned."""
        for parameter in self.layers.mix[-1].parameters():
            parameter[: self.out_features] = 0.0

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"new_features": self.out_features, "variance_gradient": self.variance_gradient}
        return self.layers.config() | own


def gaussian_losses(mapped: torch.Tensor, target: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    r"""Return each row's negative log-likelihood for one coordinate, under an isotropic Gaussian around ``mapped``.

    .. math:: \ell_i = \frac{1}{d} \Bigl( \frac{1}{2} e^{-s_i} \lVert f_{n,i} - h_i \rVert^2 + \frac{d}{2} s_i \Bigr)

    Without the constant :math:`\log(2 \pi) / 2`; below 0 where the variance is small. Divided by the width, so that
    the size of the loss, and with it learning rates and the weights of other terms, is the same at every width.

    Args:
        mapped: ``(N, D)``, the means :math:`h`.
        target: ``(N, D)``.
        log_variance: ``(N,)``, of one coordinate, :math:`s`.
    Shape:
        - output: ``(N,)``
    Example:
        >>> gaussian_losses(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.zeros(1))
        tensor([6.2500])
    """
    return 0.5 * (torch.exp(-log_variance) * (mapped - target).square().mean(1) + log_variance)
