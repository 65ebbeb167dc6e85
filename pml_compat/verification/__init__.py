"""Pairs: are two embeddings of the same identity, and does a threshold carry over to a new model?"""

from .._moved import moved
from .identification import tpir_at_fpir
from .verification import carry_thresholds, tar_at_far, verification

__all__ = [
    "carry_thresholds",
    "tar_at_far",
    "tpir_at_fpir",
    "verification",
]

__getattr__ = moved(
    __name__,
    {
        "OperatingPoint": "pml_compat.verification.verification",
        "VerificationResult": "pml_compat.verification.verification",
    },
)
