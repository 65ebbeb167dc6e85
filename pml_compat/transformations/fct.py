"""The transformation of forward-compatible training."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .._checks import check_integer
from .base import Transformation
from .batch_norm import BatchNorm, is_untrained
from .linear_path import LinearPath
from .pairs import PairMoments


class FCTTransformation(Transformation):
    r"""Map an old embedding and the side-information stored with it into the new space.

    .. math:: h(f_o, s) = \operatorname{mix}([\,\operatorname{branch}_1(f_o), \operatorname{branch}_2(s)\,])

    A branch has two linear layers, ``d -> 2 d -> 2 d_new``; ``mix`` has three,
    ``4 d_new -> hidden -> hidden -> d_new``. All but the last are without bias and followed by batch normalisation
    and ReLU. Without side-information the old embedding feeds both branches.

    :func:`fit_transformation` puts the closed-form linear map under an untrained one, side-information included, and
    sets the last layer to 0: :math:`W [f_o, s] + b + e \odot h(f_o, s)`. It is saved, loaded and exported with the
    layers.

    Args:
        old_features: width of the old embeddings.
        new_features: width of the new embeddings.
        side_features: width of the side-information; None without.
        hidden_features: width of the two inner layers of ``mix``.
    Shape:
        - embeddings ``(N, old_features)``; side_info ``(N, side_features)``, where there is any
        - output: ``(N, new_features)``; in training a batch of one row gets the running statistics
    Raises:
        ValueError: a width below 1.
    Example:
        >>> transformation = FCTTransformation(128, 128, side_features=128)
        >>> sum(parameter.numel() for parameter in transformation.parameters())
        5712000

    Reference:
        Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022. The
        layers are those of the public code, whose 1x1 convolutions are linear layers here: the same function, and
        much faster on a CPU.
    """

    def __init__(
        self, old_features: int, new_features: int, side_features: int | None = None, hidden_features: int = 2048
    ) -> None:
        super().__init__(old_features, new_features, side_features)
        self.hidden_features = check_integer(hidden_features, "hidden_features", minimum=1)
        width = 2 * self.out_features
        self.old_branch = _layers(self.in_features, 2 * self.in_features, width)
        side = self.side_features or self.in_features
        self.side_branch = _layers(side, 2 * side, width)
        self.mix = _layers(2 * width, self.hidden_features, self.hidden_features)
        self.mix.append(torch.nn.Linear(self.hidden_features, self.out_features))
        self.linear_path: LinearPath | None = None

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``h(f_o, s)``, on the linear map where there is one."""
        path = self.linear_path
        if path is None:
            return self._layers(embeddings, embeddings if side_info is None else side_info)
        units, width = path.source_units, self.in_features
        if side_info is None:
            scaled = embeddings * units
            return path(embeddings) + self._layers(scaled, scaled) * path.error_units
        learned = self._layers(embeddings * units[:width], side_info * units[width:])
        return path(torch.cat([embeddings, side_info], dim=1)) + learned * path.error_units

    def _layers(self, old: Any, side: Any) -> Any:
        return self.mix(torch.cat([self.old_branch(old), self.side_branch(side)], dim=1))

    def start_from(self, moments: PairMoments) -> bool:
        """Become the closed-form linear map; an FCT that has been trained stays as it is."""
        if self.linear_path is not None or not is_untrained(self):
            return False
        self.linear_path = self._new_path()
        self.linear_path.fit(moments, self.in_features)
        self.back_to_start()
        return True

    @torch.no_grad()
    def back_to_start(self) -> None:
        """Set the last layer to 0."""
        for parameter in self.mix[-1].parameters():
            parameter.zero_()

    def shrink(self, mean: torch.Tensor, kept: float) -> None:
        """Keep a share of what mapped rows differ by from ``mean``, where there is a linear map underneath."""
        if self.linear_path is not None:
            self.linear_path.shrink(mean, kept)

    def unshrink(self) -> None:
        """Undo :meth:`shrink`."""
        if self.linear_path is not None:
            self.linear_path.unshrink()

    def _new_path(self) -> LinearPath:
        path = LinearPath(self.in_features + (self.side_features or 0), self.out_features)
        return path.to(next(self.parameters()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load what was saved with a linear path, or before there was one."""
        if f"{prefix}linear_path.weight" not in state_dict:
            self.linear_path = None
        elif self.linear_path is None:
            self.linear_path = self._new_path()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "old_features": self.in_features,
            "new_features": self.out_features,
            "side_features": self.side_features,
            "hidden_features": self.hidden_features,
        }


def _layers(*widths: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.Linear(before, after, bias=False), BatchNorm(after), torch.nn.ReLU(inplace=True)]
    return torch.nn.Sequential(*layers)
