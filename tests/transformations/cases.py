"""Every transformation of the library, for the shared suite: a new one joins by one line."""

from collections.abc import Callable

import torch

from pml_compat.transformations import (
    FastFillTransformation,
    FCTTransformation,
    LinearTransformation,
    LowRankTransformation,
    OrthogonalTransformation,
    ResidualBottleneckTransformation,
    ScaledOrthogonalTransformation,
    Transformation,
    TransformationChain,
)

TRANSFORMATIONS: dict[str, Callable[[], Transformation]] = {
    "linear": lambda: LinearTransformation(6, 4),
    "linear_without_bias": lambda: LinearTransformation(4, 6, bias=False),
    "low_rank": lambda: LowRankTransformation(6, 4, rank=2),
    "low_rank_wider": lambda: LowRankTransformation(4, 6, rank=4),
    "orthogonal": lambda: OrthogonalTransformation(5, 5),
    "orthogonal_narrower": lambda: OrthogonalTransformation(6, 4),
    "orthogonal_wider": lambda: OrthogonalTransformation(4, 6),
    "scaled_orthogonal": lambda: ScaledOrthogonalTransformation(5, 5),
    "scaled_orthogonal_narrower": lambda: ScaledOrthogonalTransformation(6, 4),
    "scaled_orthogonal_wider": lambda: ScaledOrthogonalTransformation(4, 6),
    "residual_bottleneck": lambda: ResidualBottleneckTransformation(5, 5, hidden_features=3, paths=2, blocks=2),
    "residual_bottleneck_wider": lambda: ResidualBottleneckTransformation(4, 7, hidden_features=3, paths=2, blocks=3),
    "fct": lambda: FCTTransformation(4, 3, hidden_features=6),
    "fct_side": lambda: FCTTransformation(4, 3, side_features=5, hidden_features=6),
    "fastfill": lambda: FastFillTransformation(4, 3, hidden_features=6),
    "fastfill_side": lambda: FastFillTransformation(4, 3, side_features=5, hidden_features=6),
    "chain_with_side": lambda: TransformationChain(
        FCTTransformation(4, 3, 2, hidden_features=5), LinearTransformation(3, 3), FCTTransformation(3, 5, 1, 4)
    ),
    "chain": lambda: TransformationChain(LinearTransformation(6, 4), OrthogonalTransformation(4, 5)),
    "chain_of_chains": lambda: TransformationChain(
        TransformationChain(LinearTransformation(3, 4)), ResidualBottleneckTransformation(4, 2, 3, 1, 1)
    ),
}


def build(name: str, seed: int = 0) -> Transformation:
    """Build a transformation whose parameters and statistics are none of the initial ones."""
    torch.manual_seed(seed)
    transformation = TRANSFORMATIONS[name]()
    with torch.no_grad():
        for tensor in [*transformation.parameters(), *transformation.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return transformation.eval()


def batch(transformation: Transformation, n: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, transformation.in_features, generator=generator)
    width = transformation.side_features
    return embeddings, None if width is None else torch.randn(n, width, generator=generator)
