"""What metrics and pairs of models are called in code, in files and in tables."""

from __future__ import annotations

METRICS = {"precision_at_1": "P@1", "mean_average_precision": "mAP"}
PAIRS = {
    "old_to_old": "old/old",
    "new_to_old": "new/old",
    "new_to_transformed_old": "new/transformed old",
    "new_to_new": "new/new",
}
AT_QUERY_TIME = {"rotated_to_old": "rotated/old", "blended_to_old": "blended/old"}
PAIR_NAMES = {**PAIRS, "old_to_new": "old/new", **AT_QUERY_TIME}
TWO_STAGES = "two_stages_"  # and the depth
STARTS = {"old": "new_to_old", "transformed_old": "new_to_transformed_old"}  # a backfill's start: its pair at 0 %
ALL_METRICS = {
    **METRICS,
    "mean_average_precision_at_r": "mAP@R",
    "r_precision": "R-precision",
    "mean_reciprocal_rank": "MRR",
    "cmc_top_5": "CMC@5",
    "cmc_top_10": "CMC@10",
}


def pair_name(pair: str) -> str:
    """Return what a pair is called in tables."""
    return PAIR_NAMES[pair] if pair in PAIR_NAMES else f"two stages, {pair.removeprefix(TWO_STAGES)} items"
