"""Cross-model miners, each a PML ``BaseMiner``: anchors are new embeddings, references old ones; one idea a file."""

from .boundary_violation_miner import BoundaryViolationMiner
from .credible_sample_filter import CredibleSampleFilter
from .cross_model_miner import HardestCrossModelMiner
from .regression_miner import RegressionMiner

__all__ = ["BoundaryViolationMiner", "CredibleSampleFilter", "HardestCrossModelMiner", "RegressionMiner"]
