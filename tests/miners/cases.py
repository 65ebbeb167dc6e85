"""What every cross-model miner is put through the shared tests with: a new miner joins by one line in ``MINERS``."""

from collections.abc import Callable

import torch
from pytorch_metric_learning import distances, miners

from pml_compat.frozen import ClassCenters
from pml_compat.miners import BoundaryViolationMiner, CredibleSampleFilter, HardestCrossModelMiner, RegressionMiner

WIDTH, CLASSES = 5, 4

DISTANCES = {
    "unit": distances.LpDistance,
    "plain": lambda: distances.LpDistance(normalize_embeddings=False),
    "cosine": distances.CosineSimilarity,
}


def samples(seed: int = 0, n: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new embeddings, labels in no order, and old embeddings of the same rows, in float64."""
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    centers = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)[labels]
    return new + centers, labels, old + 2 * centers


def stored(n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Return old embeddings of a training set, and labels."""
    _, labels, old = samples(100, n)
    return old, labels


def tuples(mined: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(part.tolist() for part in mined), strict=True))


MINERS: dict[str, Callable[..., torch.nn.Module]] = {
    "hardest": lambda **kwargs: HardestCrossModelMiner(2, **kwargs),
    "hardest_triplets": lambda **kwargs: HardestCrossModelMiner(2, "triplets", **kwargs),
    "hardest_all": lambda **kwargs: HardestCrossModelMiner(None, "triplets", **kwargs),
    "boundary": lambda **kwargs: BoundaryViolationMiner(ClassCenters.from_embeddings(*stored()), -0.2, **kwargs),
    "regression": lambda **kwargs: RegressionMiner(**kwargs),
    "regression_capped": lambda **kwargs: RegressionMiner(3, **kwargs),
    "credible": lambda **kwargs: CredibleSampleFilter(*stored(), share=0.6, **kwargs),
    "credible_entropy": lambda **kwargs: CredibleSampleFilter(
        *stored(), miners.MultiSimilarityMiner(), rule="entropy", **kwargs
    ),
    "credible_regression": lambda **kwargs: CredibleSampleFilter(*stored(), RegressionMiner(), share=0.6, **kwargs),
}
