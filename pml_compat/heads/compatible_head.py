"""An embedding of two parts over one trunk: one lives in the old space, the other is free."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_integer, check_matrix, check_number, check_same_device, check_square
from .._rows import unit_rows_as_given, unit_rows_times
from ..frozen import WithinClassWhitening
from ..transformations.batch_norm import BatchNorm


class CompatibleHead(torch.nn.Module):
    r"""Embed a trunk's features as a part in the old model's space beside a part that is free.

    .. math:: z = [\, p^1 ; \dots ; p^k ; f \,], \quad
        [\, p^1 ; \dots ; p^k \,] = W_2 \operatorname{ReLU}(\operatorname{BN}(W_1 u)) + b, \quad f = g(u), \quad
        p = \textstyle\sum_m p^m / \lVert p^m \rVert

    New queries find old vectors by :math:`p`, whitened (:meth:`old_part`), and new vectors by :meth:`whole`: by both,
    :math:`\rho \cos(p, p') + (1 - \rho) \cos(f, f')` with an ``old_share`` :math:`\rho`, or at 0 by :math:`f` alone.
    Nothing of the old model holds :math:`f` back.

    With several parts every term that trains them has an own :math:`p^m`, and the query is their mean; one part serves
    all terms.

    Train the head with :class:`~pml_compat.losses.CompatibleHeadLoss`, as the last layer of the model or as the
    ``embedder`` of a PML trainer. Old and new vectors side by side in one index:
    :class:`pml_compat.serving.MixedGallery`.

    With ``whitening`` :math:`p` lives in the old space whitened by its scatter within classes, and :meth:`old_part`
    leads back: the head aims at what tells classes apart. Without, the loss whitens queries where that finds more
    (:meth:`whiten_queries`).

    For a model that is finished: hold its trunk in a :class:`~pml_compat.frozen.FrozenModel`, give its last layer as
    ``free=FrozenModel(layer, save=True)``, or None where its embeddings are the features themselves, and train the head
    alone. Its own embeddings stay as they are, also in train mode, and with ``old_share=0`` so does new/new.

    Args:
        in_features: width of the trunk's features :math:`u`.
        old_features: width of the old model's embeddings, and of each :math:`p^m`.
        free: the module :math:`g` that makes the free part of the features; None for the features as they are.
        free_features: width of what ``free`` gives; None where ``free`` is None or has ``out_features``.
        whitening: of the old model's embeddings of the new training set; None for the old space as it is.
        hidden_features: width of the hidden layer of the compatible parts.
        old_share: :math:`\rho`, the weight of :math:`p` between new vectors, in [0, 1). At 0 they are as narrow as
            without the head, and compared as without it.
        trunk_gradient: how much of the gradient of :math:`p` reaches the features :math:`u`, in [0, 1]. Less of it
            leaves more of the trunk to the free part; at 0 the trunk is trained as without the head.
        parts: :math:`k`, one for each term of the loss; 1 for one vector that serves all terms.
    Attributes:
        out_features: width of ``z``, ``parts * old_features + free_features``.
    Shape:
        - features ``(N, in_features)``
        - output: ``(N, out_features)``, all parts as they come: a task loss sees the free part as without the head
    Raises:
        ValueError: a width or ``parts`` below 1, a share outside [0, 1), ``trunk_gradient`` outside [0, 1];
            ``free_features`` missing or, without ``free``, not ``in_features``; a whitening of another width; in a
            call: another width or device, a ``free`` that gives another width.
    Example:
        >>> head = CompatibleHead(in_features=32, old_features=8, free=torch.nn.Linear(32, 16))
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), head)
        >>> embeddings = model(torch.randn(4, 10))
        >>> embeddings.shape, head.old_part(embeddings).shape, head.whole(embeddings).shape
        (torch.Size([4, 24]), torch.Size([4, 8]), torch.Size([4, 24]))

    Reference:
        Ours. Extra dimensions for compatibility are those of Zhou et al., "BT²: Backward-compatible Training with Basis
        Transformation", ICCV 2023 (:class:`BasisTransformation`); here they are as many as the old model's, stand for
        themselves, and no independent model is trained first.
    """

    query_whitening: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        old_features: int,
        free: torch.nn.Module | None = None,
        free_features: int | None = None,
        *,
        whitening: WithinClassWhitening | None = None,
        hidden_features: int = 512,
        old_share: float = 0.3,
        trunk_gradient: float = 0.6,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.in_features = check_integer(in_features, "in_features", minimum=1)
        self.old_features = check_integer(old_features, "old_features", minimum=1)
        if whitening is not None and whitening.features != self.old_features:
            raise ValueError(f"whitening must be of old_features, {self.old_features}, got {whitening.features}")
        self.free_features = _free_features(free, free_features, self.in_features)
        self.parts = check_integer(parts, "parts", minimum=1)
        self.out_features = self.parts * self.old_features + self.free_features
        hidden = check_integer(hidden_features, "hidden_features", minimum=1)
        self.old_share = check_number(old_share, "old_share", minimum=0)
        if self.old_share >= 1:
            raise ValueError(f"old_share must be in [0, 1), got {old_share!r}")
        self.trunk_gradient = check_number(trunk_gradient, "trunk_gradient", minimum=0)
        if self.trunk_gradient > 1:
            raise ValueError(f"trunk_gradient must be in [0, 1], got {trunk_gradient!r}")
        self.whitening = whitening
        self.register_buffer("query_whitening", None)
        self.free = torch.nn.Identity() if free is None else free
        self.compatible = torch.nn.Sequential(
            torch.nn.Linear(self.in_features, hidden, bias=False),
            BatchNorm(hidden),
            torch.nn.ReLU(inplace=True),
            torch.nn.Linear(hidden, self.parts * self.old_features),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return ``[p^1 ; ... ; p^k ; f]``."""
        check_matrix(features, "features", self.in_features)
        check_same_device(features, "features", next(self.compatible.parameters()), "the CompatibleHead")
        free = self.free(features)
        check_matrix(free, "the output of free", self.free_features)
        kept = features.detach()
        if self.trunk_gradient > 0:
            kept = kept + self.trunk_gradient * (features - kept)
        parts = self.compatible(kept)
        return torch.cat([parts.to(free.dtype), free], dim=1)

    def old_part(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the unit rows ``(N, old_features)`` that are compared with old embeddings, by cosine."""
        part = self._mean_part(embeddings)
        if self.query_whitening is not None:
            return unit_rows_times(part, self.query_whitening)
        return part if self.whitening is None else self.whitening.query(part)

    def whiten_queries(self, whitening: torch.Tensor | None) -> None:
        """Let :meth:`old_part` multiply by a ``(D, D)`` matrix, ``ClassCenters.whitening``, from now on; None: by none.

        :class:`~pml_compat.losses.CompatibleHeadLoss` does so; the matrix is in ``state_dict()``.

        Raises:
            ValueError: the head has a ``whitening`` of its own; another size.
        """
        if whitening is not None:
            if self.whitening is not None:
                raise ValueError("whitening must be None for a head that was made with one, got both")
            whitening = check_square(whitening, "whitening", self.old_features).to(
                next(self.compatible.parameters()), copy=True
            )
        self.query_whitening = whitening

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take the whitening of queries that a state has; one without it is of a head that has none."""
        given = state_dict.get(f"{prefix}query_whitening")
        device = next(self.compatible.parameters()).device
        self.query_whitening = None if given is None else torch.empty_like(given, device=device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def compatible_parts(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the ``parts``, each ``(N, old_features)``, as they are."""
        embeddings = check_matrix(embeddings, width=self.out_features)
        return embeddings[:, : self.parts * self.old_features].split(self.old_features, dim=1)

    def free_part(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return ``(N, free_features)``, as they are."""
        return check_matrix(embeddings, width=self.out_features)[:, self.parts * self.old_features :]

    def whole(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the unit rows by whose cosine new vectors are compared.

        ``(N, old_features + free_features)``, or with an ``old_share`` of 0 ``(N, free_features)``.
        """
        free = unit_rows_as_given(self.free_part(embeddings))
        if self.old_share == 0:
            return free
        part = self._mean_part(embeddings)
        return torch.cat([self.old_share**0.5 * part, (1 - self.old_share) ** 0.5 * free], dim=1)

    def target(self, old_embeddings: torch.Tensor) -> torch.Tensor:
        """Return what :math:`p` aims at, unit rows ``(N, old_features)``, of old embeddings."""
        old = check_matrix(old_embeddings, "old_embeddings", self.old_features)
        return unit_rows_as_given(old if self.whitening is None else self.whitening(old))

    def _mean_part(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the mean direction of the parts, unit rows."""
        parts = self.compatible_parts(embeddings)
        return unit_rows_as_given(
            parts[0] if len(parts) == 1 else torch.stack([unit_rows_as_given(part) for part in parts]).sum(0)
        )

    def extra_repr(self) -> str:
        """Show the widths, as torch's own modules do."""
        return (
            f"in_features={self.in_features}, old_features={self.old_features}, free_features={self.free_features}, "
            f"parts={self.parts}, old_share={self.old_share:g}, trunk_gradient={self.trunk_gradient:g}"
        )


def _free_features(free: torch.nn.Module | None, given: int | None, in_features: int) -> int:
    """Return the width of the free part, which some modules tell."""
    if given is None:
        given = in_features if free is None else getattr(free, "out_features", None)
    if given is None:
        raise ValueError(f"free_features must be given: {type(free).__name__} does not tell its width")
    if free is None and given != in_features:
        raise ValueError(
            f"free_features must be in_features, {in_features}, without a free module, got {given}; "
            f"give free=torch.nn.Linear({in_features}, {given})"
        )
    return check_integer(given, "free_features", minimum=1)
