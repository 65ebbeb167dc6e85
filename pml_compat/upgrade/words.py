"""A verdict in words that a team can act on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .doubts import points
from .evaluation import Evaluation
from .names import METRICS, TWO_STAGES, pair_name
from .options import Differences, Option, is_better, is_surely_better, list_options


def title_and_summary(evaluation: Evaluation, option: Option | None) -> tuple[str, str]:
    """Return what to do, in a few words and in a sentence."""
    if option is None:
        new = evaluation.differences.get("new_to_new")
        if new is not None and is_better(new):
            return (
                "Do not upgrade without re-embedding everything",
                "Only the fully re-embedded gallery serves new queries better than today's system.",
            )
        if new is not None and all(new[metric].estimate <= 0 for metric in METRICS):
            return "Do not upgrade", "The new model is no better than the old one, even on its own gallery."
        return "Do not upgrade", "New queries find what is stored no better than old queries do."
    if option.outcome == "swap_with_a_new_threshold":
        return "Swap, with a new threshold", "Then send new queries to the gallery as it is stored."
    if option.outcome == "swap_now":
        return "Swap now", "Send new queries to the gallery as it is stored; nothing needs to be re-embedded."
    mapped = "the gallery through the transformation"
    if option.outcome == "swap_with_transformed_gallery":
        return "Swap with a transformed gallery", f"Run {mapped}, then send new queries to it."
    if option.outcome == "blend_queries":
        return (
            "Blend old and new queries",
            "Embed each query by both models, blend the two (pml_compat.serving.QueryBlend), and search the gallery as "
            "it is stored; the old model must go on running.",
        )
    if option.pair is not None and option.outcome == "search_in_two_stages":
        depth = option.pair.removeprefix(TWO_STAGES)
        return (
            f"Search in two stages, {depth} items a query",
            f"Let old queries find {depth} items in the gallery as it is stored, and put these in the new model's "
            "order (pml_compat.serving.TwoStageSearch, which keeps each vector that it makes); both models must run.",
        )
    before = f"Run {mapped}, replace" if option.start == "transformed_old" else "Replace"
    vectors = f"{option.vectors:,} of {evaluation.gallery_size:,} vectors"
    low, high = option.share_range
    spread = f" ({low:.0%} to {high:.0%}, by the order)" if low < high else ""
    return (
        f"Backfill {option.share:.0%} first{spread}",
        f"{before} {vectors} (any: they were chosen at random) by new ones, then send new queries to the gallery.",
    )


def why(evaluation: Evaluation, option: Option | None) -> list[str]:
    """Return the reasons, with numbers, one sentence or two each."""
    reasons = [
        _compared(f"New queries on {gallery}", evaluation, pair)
        for pair, gallery in (
            ("new_to_old", "the gallery as it is stored"),
            ("new_to_transformed_old", "the transformed gallery"),
            ("new_to_new", "a fully re-embedded gallery"),
        )
        if pair in evaluation.differences
    ]
    for pair in evaluation.differences:
        if pair == "blended_to_old":
            reasons.append(_compared("Blended queries on the gallery as it is stored", evaluation, pair))
        elif pair.startswith(TWO_STAGES):
            depth = pair.removeprefix(TWO_STAGES)
            reasons.append(_compared(f"Two stages, with {depth} items a query,", evaluation, pair))
    if option is not None and option.outcome == "backfill_first":
        values = evaluation.backfill[option.start].steps[option.step]
        text = f"With {option.share:.0%} of the gallery re-embedded, new queries"
        reasons.append(_in_words(text, evaluation, option.differences, values))
    elif option is None and evaluation.backfill:
        reasons.append("No share of a random backfill below 100% is better in P@1 and in mAP from there on.")
    shares = [
        f"{pair_name(pair)} {', '.join(f'{name} {gains[metric].estimate:.0%}' for metric, name in METRICS.items())}"
        for pair, gains in evaluation.gains.items()
        if all(gains[metric].estimate > 0 for metric in METRICS)
    ]
    if shares:
        reasons.append(f"The share of what re-embedding everything would bring: {'; '.join(shares)}.")
    if option is not None and option.outcome in ("blend_queries", "search_in_two_stages"):
        for other in list_options(evaluation):
            if other.outcome == "backfill_first" and is_surely_better(other.differences):
                title, how = title_and_summary(evaluation, other)
                reasons.append(f"Where the old model is not to run any more: {title[0].lower()}{title[1:]}. {how}")
                break
    return reasons


def _compared(subject: str, evaluation: Evaluation, pair: str) -> str:
    return _in_words(subject, evaluation, evaluation.differences[pair], evaluation.pairs[pair])


def _in_words(
    subject: str, evaluation: Evaluation, differences: Differences, per_query: Mapping[str, torch.Tensor]
) -> str:
    if is_surely_better(differences):
        opening = "are better than old queries are today"
    elif is_better(differences):
        opening = "look better than old queries are today, but not for certain"
    elif any(differences[metric].estimate > 0 for metric in METRICS):
        first, second = sorted(METRICS, key=lambda metric: differences[metric].estimate, reverse=True)
        other = "worse" if differences[second].estimate < 0 else "no better"
        opening = f"are better than old queries are today in {METRICS[first]}, and {other} in {METRICS[second]}"
    else:
        opening = "are no better than old queries are today"
    numbers = "; ".join(
        f"{name} {float(per_query[metric].nanmean()):.1%} against {evaluation.accuracy('old_to_old', metric):.1%} "
        f"({points(differences[metric])})"
        for metric, name in METRICS.items()
    )
    return f"{subject} {opening}: {numbers}."


def what_is_missing(evaluation: Evaluation, *, settled: bool = False) -> list[str]:
    """Return what to give for a surer or a better answer."""
    wanted = []
    if "old_to_old" not in evaluation.pairs:
        wanted.append(
            "Give --old-queries, the old model's embeddings of the same queries, to compare with today's system."
        )
    if "new_to_transformed_old" not in evaluation.pairs and not settled:
        wanted.append(
            "Give --transformation or --transformed-gallery to see whether mapping the stored vectors would do."
        )
    if "new_to_new" not in evaluation.pairs:
        wanted.append(
            "Give --new-gallery, the new model's embeddings of the gallery or of a sample of it, to see what "
            "re-embedding brings and how much of it is enough."
        )
    return wanted
