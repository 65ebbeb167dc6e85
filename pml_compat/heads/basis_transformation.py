"""The head of BT²: an embedding whose first coordinates match the old model, and that loses nothing for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, relu

from .._checks import check_integer, check_matrix, check_number, check_same_device
from .._rows import at_least_float32, unit_rows
from ..transformations import OrthogonalTransformation

_ORIGIN, _STEPS_BACK = "pml_compat.basis", 8


class BasisTransformation(torch.nn.Module):
    r"""Put a few dimensions more into an embedding, and turn its basis so that its first part fits the old model.

    .. math:: f = n(u_{1..d_n}), \quad e = n(W \operatorname{ReLU}(u) + b), \quad
        v = [e ; s f P], \quad z = [v_{1..d_o} Q ; v_{d_o + 1..}]

    :math:`u` is the trunk's output and :math:`n(x) = x / \lVert x \rVert`. :math:`f` is the embedding of a free model,
    which no old one holds back; the :math:`k` dimensions of :math:`e` are what the old model knew besides. :math:`P`
    and :math:`Q` are orthogonal, so that whatever they learn, they move no two items apart or together:

    .. math:: \langle z, z' \rangle = \langle e, e' \rangle + s^2 \langle f, f' \rangle, \qquad
        \lVert z \rVert^2 = 1 + s^2

    New vectors are compared with each other by all of :math:`z`; dot product, cosine and Euclidean distance rank
    alike. With old vectors they are compared by :meth:`old_part`, which is what
    ``pml_compat.fit_width(z, old_features)`` gives, at length 1. Train it with
    :class:`~pml_compat.losses.BT2Loss`, as the last layer of the model or as the ``embedder`` of a PML trainer.

    Args:
        new_features: :math:`d_n`, the width of the free part.
        old_features: :math:`d_o`, the width of the old model's embeddings.
        extra_features: :math:`k`, the dimensions added; at most ``old_features``.
        scale: :math:`s`, how much longer the free part is than the added one; above 0.

    Attributes:
        in_features: what the trunk must give, ``new_features + old_features``.
        out_features: the width of ``z``, ``extra_features + new_features``.

    Shape:
        - embeddings, which the trunk gives: ``(N, new_features + old_features)``
        - output: ``(N, extra_features + new_features)`` in the dtype of ``embeddings``, computed in float32 or better,
          with or without autocast; a row of which ``u`` is 0 where :math:`f` is read has a free part of 0
    Raises:
        ValueError: a width below 1; ``extra_features`` above ``old_features``; ``old_features`` above
            ``extra_features + new_features``; ``scale`` not above 0; in a call: another width or device.
    Example:
        >>> basis = BasisTransformation(new_features=16, old_features=8, extra_features=4)
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, basis.in_features), basis)
        >>> z = model(torch.randn(3, 10))
        >>> z.shape, basis.old_part(z).shape, basis.free_part(z).shape
        (torch.Size([3, 20]), torch.Size([3, 8]), torch.Size([3, 16]))
        >>> torch.allclose(z.norm(dim=1), torch.tensor(5.0).sqrt())
        True

    Reference:
        Zhou et al., "BT²: Backward-compatible Training with Basis Transformation", ICCV 2023. Differs from the public
        code in: its linear layer has ``old_features`` outputs, of which it reads the first ``extra_features``, here
        there are no others; ``scale`` is 2 by default, which its experiments use, not 3; the free part is read back
        off ``z`` (:meth:`free_part`), where the code returns a tuple that no PML loop can carry.
    """

    def __init__(self, new_features: int, old_features: int, extra_features: int = 32, scale: float = 2.0) -> None:
        super().__init__()
        self.new_features = check_integer(new_features, "new_features", minimum=1)
        self.old_features = check_integer(old_features, "old_features", minimum=1)
        self.extra_features = check_integer(extra_features, "extra_features", minimum=1)
        self.scale = check_number(scale, "scale", minimum=0, exclusive=True)
        if extra_features > old_features:
            raise ValueError(
                f"extra_features must be at most old_features, {old_features}, got {extra_features}; "
                "more would not reach the part that old vectors are compared with"
            )
        self.in_features = self.new_features + self.old_features
        self.out_features = self.extra_features + self.new_features
        if old_features > self.out_features:
            raise ValueError(
                f"old_features must be at most extra_features + new_features, {self.out_features}, got {old_features}; "
                f"set extra_features to {old_features - new_features} or more"
            )
        self.extra = torch.nn.Linear(self.in_features, self.extra_features)
        # Not torch's orthogonal parametrization, which is the same map: a module that has one cannot be pickled.
        self.free_rotation = _any_rotation(self.new_features)
        self.old_rotation = _any_rotation(self.old_features)
        self._mark = object()  # of what this module gave, and a copy of it has another

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return ``z`` of what the trunk gives."""
        u = self._check(embeddings, self.in_features)
        with torch.autocast(u.device.type, enabled=False):
            turns = self.free_rotation.matrix(), self.old_rotation.matrix()
            free_turn, old_turn = (turn.to(u.dtype) for turn in turns)
            extra = linear(relu(u), self.extra.weight.to(u.dtype), self.extra.bias.to(u.dtype))
            free = unit_rows(u[:, : self.new_features], embeddings.dtype) @ free_turn
            v = torch.cat([unit_rows(extra, embeddings.dtype), self.scale * free], 1)
            old, rest = v.tensor_split([self.old_features], 1)
            z = torch.cat([old @ old_turn, rest], 1).to(embeddings.dtype)
        if not torch.compiler.is_compiling() and z.grad_fn is not None:
            _notes_on(z.grad_fn)[_ORIGIN] = self._mark, turns  # in the graph: another dtype or device keeps it
        return z

    def check_made(self, embeddings: torch.Tensor) -> None:
        """Raise a ValueError where another BasisTransformation gave ``embeddings``, such as a copy of this one."""
        origin = _origin(embeddings)
        if origin is not None and origin[0] is not self._mark:
            raise ValueError(
                "embeddings must come from the basis that the loss was made with, got those of another one; copy the "
                "two in one go, copy.deepcopy((model, loss)), or make the loss with the basis of the model at hand"
            )

    def old_part(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what is compared with old vectors: the first coordinates of ``z``, at length 1.

        Args:
            embeddings: ``(N, out_features)``, what this module returned, at any length.
        Shape:
            - output: ``(N, old_features)`` unit rows
        Raises:
            ValueError: another width or device.
        """
        z = self._check(embeddings, self.out_features)
        return unit_rows(z[:, : self.old_features], embeddings.dtype).to(embeddings.dtype)

    def free_part(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return ``f``, read back off ``z`` by turning it the other way.

        P and Q have their gradient here too. It is the opposite of the one that they receive through ``z``: what is
        asked of ``f`` alone does not turn the basis.

        Args:
            embeddings: ``(N, out_features)``, what this module returned, at any length.
        Shape:
            - output: ``(N, new_features)`` unit rows
        Raises:
            ValueError: another width or device.
        """
        z = self._check(embeddings, self.out_features)
        with torch.autocast(z.device.type, enabled=False):
            old, rest = z.tensor_split([self.old_features], 1)
            free_turn, old_turn = (turn.to(z.dtype) for turn in self._turns(embeddings))
            v = torch.cat([old @ old_turn.t(), rest], 1)
            free = v[:, self.extra_features :] @ free_turn.t()
            return unit_rows(free, embeddings.dtype).to(embeddings.dtype)

    def _turns(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return P and Q, those that ``z`` was turned by where they are still there: an exponential is costly."""
        origin = _origin(z) if torch.is_grad_enabled() else None
        if origin is not None and origin[0] is self._mark:
            return origin[1]
        return self.free_rotation.matrix(), self.old_rotation.matrix()

    def _check(self, embeddings: torch.Tensor, width: int) -> torch.Tensor:
        rows = check_matrix(embeddings, "embeddings", width)
        check_same_device(rows, "embeddings", self.extra.weight, "the BasisTransformation")
        return at_least_float32(rows)

    def extra_repr(self) -> str:
        """Show the sizes, as torch's own modules do."""
        return (
            f"new_features={self.new_features}, old_features={self.old_features}, "
            f"extra_features={self.extra_features}, scale={self.scale:g}"
        )


def _origin(embeddings: torch.Tensor) -> Any:
    """Return the mark of the module that gave ``embeddings``, and what it turned them by; None where nobody knows.

    It is looked for through what leaves rows as they are: another dtype or device, a gather over processes.
    """
    node = None if torch.compiler.is_compiling() else embeddings.grad_fn
    for _ in range(_STEPS_BACK):
        if node is None or _ORIGIN in _notes_on(node):
            break
        before = [earlier for earlier, _ in node.next_functions if earlier is not None]
        node = before[0] if len(before) == 1 else None
    return None if node is None else _notes_on(node).get(_ORIGIN)


def _notes_on(node: Any) -> dict[str, Any]:
    """Return what torch keeps for others at a node of the graph, as long as that lives."""
    return node.metadata


def _any_rotation(features: int) -> OrthogonalTransformation:
    """Return an orthogonal map that starts anywhere, as torch's parametrization does."""
    rotation = OrthogonalTransformation(features, features)
    torch.nn.init.orthogonal_(rotation.base)
    return rotation
