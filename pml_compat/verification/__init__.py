"""Pairs: are two embeddings of the same identity, and does a threshold carry over to a new model?"""

from .identification import tpir_at_fpir
from .verification import OperatingPoint, VerificationResult, carry_thresholds, tar_at_far, verification

__all__ = [
    "OperatingPoint",
    "VerificationResult",
    "carry_thresholds",
    "tar_at_far",
    "tpir_at_fpir",
    "verification",
]
