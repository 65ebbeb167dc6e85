import json

import numpy as np
import pytest
import torch

from pml_compat.upgrade import Evaluation
from pml_compat.upgrade.bootstrap import BootstrapInterval
from pml_compat.upgrade.evaluation import Backfill
from pml_compat.upgrade.options import Option, choose, is_better, is_surely_better, smallest_share
from pml_compat.upgrade.verdict import upgrade_verdict

QUERIES = 400
METRICS = ("precision_at_1", "mean_average_precision")


def interval(estimate, low):
    return BootstrapInterval(estimate, low, 2 * estimate - low, 1.0, 0.95, 100, 0)


def differences(precision, average_precision):
    return dict(zip(METRICS, (interval(*precision), interval(*average_precision)), strict=True))


SURE = differences((0.1, 0.05), (0.1, 0.05))
UNSURE = differences((0.1, 0.05), (0.1, -0.01))
MIXED = differences((0.1, 0.05), (-0.1, -0.2))
WORSE = differences((-0.1, -0.2), (-0.1, -0.2))


@pytest.mark.parametrize(
    ("found", "better", "surely"),
    [(SURE, True, True), (UNSURE, True, False), (MIXED, False, False), (WORSE, False, False)],
)
def test_both_metrics_must_be_better(found, better, surely):
    assert is_better(found) is better
    assert is_surely_better(found) is surely


def test_equal_is_not_better():
    assert not is_better(differences((0.0, 0.0), (0.1, 0.1)))
    assert not is_surely_better(differences((0.1, 0.0), (0.1, 0.1)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([SURE, SURE], 0),
        ([UNSURE, SURE], 1),  # a sure one that costs more beats an unsure one
        ([WORSE, UNSURE, MIXED], None),
        ([WORSE, MIXED], None),
        ([], None),
    ],
)
def test_the_first_sure_option_is_chosen(given, expected):
    options = [Option(f"option {place}", found) for place, found in enumerate(given)]
    assert choose(options) is (None if expected is None else options[expected])


@pytest.mark.parametrize(
    ("steps", "certain", "expected"),
    [
        ([WORSE, WORSE, SURE, SURE], True, 2),
        ([WORSE, SURE, WORSE, SURE, SURE], True, 3),  # it must stay better
        ([WORSE, UNSURE, SURE, SURE], True, 2),
        ([WORSE, UNSURE, SURE, SURE], False, 1),
        ([WORSE, SURE, UNSURE, SURE], True, 1),
        ([SURE, SURE, SURE], True, 1),  # nothing replaced is no backfill
        ([WORSE, WORSE, SURE], True, None),  # nor is everything
        ([WORSE, SURE, WORSE], True, None),
        ([WORSE, MIXED, SURE], False, None),
    ],
)
def test_smallest_share(steps, certain, expected):
    assert smallest_share(steps, certain=certain) == expected


def hits(share):
    """Per-query values of which the first ``share`` are right: queries that are right stay right in a better system."""
    right = torch.arange(QUERIES) < round(share * QUERIES)
    return {"precision_at_1": right.double(), "mean_average_precision": 0.5 * right.double()}


def evaluation(old=0.5, new=None, mapped=None, new_new=None, curve=None, mapped_curve=None, labels=None):
    shares = {"old_to_old": old, "new_to_old": new, "new_to_transformed_old": mapped, "new_to_new": new_new}
    backfill = {}
    for start, values in (("old", curve), ("transformed_old", mapped_curve)):
        if values is not None:
            fractions = tuple(step / (len(values) - 1) for step in range(len(values)))
            vectors = tuple(int(1000 * fraction) for fraction in fractions)
            backfill[start] = Backfill("random", fractions, vectors, [hits(value) for value in values])
    return Evaluation(
        data={},
        labels=torch.arange(QUERIES) if labels is None else labels,
        gallery_size=1000,
        pairs={pair: hits(share) for pair, share in shares.items() if share is not None},
        backfill=backfill,
    )


def test_swap_now():
    verdict = upgrade_verdict(evaluation(new=0.6, mapped=0.7, new_new=0.9))
    assert (verdict.outcome, verdict.certain, verdict.title) == ("swap_now", True, "Swap now")
    assert "P@1 60.0% against 50.0% (+10.0 points, 95% interval +" in verdict.reasons[0]
    assert verdict.reasons[0].startswith("New queries on the gallery as it is stored are better")
    assert verdict.reasons[-1:] == [
        "The share of what re-embedding everything would bring: new/old P@1 25%, mAP 25%; new/transformed old P@1 50%, "
        "mAP 50%.",
    ]
    assert verdict.warnings == verdict.missing == []


def test_too_few_queries_to_say():
    one = evaluation(new=0.5 + 2 / QUERIES)
    assert upgrade_verdict(one).outcome == "do_not_upgrade"  # for what it could gain at most
    one.margin = 0.002
    verdict = upgrade_verdict(one)
    assert (verdict.outcome, verdict.certain, verdict.exit_code) == ("not_enough_queries", False, 2)
    assert verdict.title == "Not enough queries to say"
    assert "but not for certain" in verdict.reasons[0]
    assert verdict.queries_needed > QUERIES and f"{verdict.queries_needed:,} queries" in verdict.summary


def test_a_sure_transformed_gallery_goes_before_an_unsure_swap():
    verdict = upgrade_verdict(evaluation(new=0.5 + 2 / QUERIES, mapped=0.6))
    assert (verdict.outcome, verdict.certain) == ("swap_with_transformed_gallery", True)


def test_swap_with_a_transformed_gallery():
    verdict = upgrade_verdict(evaluation(new=0.1, mapped=0.6, new_new=0.9, curve=[0.1, 0.6, 0.9]))
    assert (verdict.outcome, verdict.title) == ("swap_with_transformed_gallery", "Swap with a transformed gallery")
    assert verdict.summary == "Run the gallery through the transformation, then send new queries to it."
    assert verdict.to_json()["start"] == "transformed_old"
    assert verdict.to_json()["share"] is None
    assert not any("what re-embedding everything would" in reason and "new/old" in reason for reason in verdict.reasons)


def test_backfill_this_share_first():
    verdict = upgrade_verdict(evaluation(new=0.1, new_new=0.9, curve=[0.1, 0.3, 0.45, 0.6, 0.9]))
    assert (verdict.outcome, verdict.certain, verdict.title) == ("backfill_first", True, "Backfill 75% first")
    assert verdict.summary.startswith("Replace 750 of 1,000 vectors")
    assert any(reason.startswith("With 75% of the gallery re-embedded, new queries are") for reason in verdict.reasons)
    stored = verdict.to_json()
    assert (stored["share"], stored["vectors"], stored["start"]) == (0.75, 750, "old")
    assert verdict.missing == [
        "Give --transformation or --transformed-gallery to see whether mapping the stored vectors would do."
    ]


def test_backfill_starts_where_the_share_is_smaller():
    one = evaluation(new=0.1, mapped=0.4, new_new=0.9, curve=[0.1, 0.3, 0.6, 0.9], mapped_curve=[0.4, 0.6, 0.7, 0.9])
    verdict = upgrade_verdict(one)
    assert verdict.title == "Backfill 33% first"
    assert verdict.summary.startswith("Run the gallery through the transformation, replace 333 of 1,000 vectors")
    assert verdict.to_json()["start"] == "transformed_old"


@pytest.mark.parametrize(
    ("measured", "title", "summary"),
    [
        ({"new": 0.5}, "Do not upgrade", "New queries find what is stored no better than old queries do."),
        (
            {"new": 0.1, "new_new": 0.4, "curve": [0.1, 0.2, 0.4]},
            "Do not upgrade",
            "The new model is no better than the old one, even on its own gallery.",
        ),
        (
            {"new": 0.1, "new_new": 0.9, "curve": [0.1, 0.2, 0.9]},
            "Do not upgrade without re-embedding everything",
            "Only the fully re-embedded gallery serves new queries better than today's system.",
        ),
    ],
)
def test_do_not_upgrade(measured, title, summary):
    verdict = upgrade_verdict(evaluation(**measured))
    assert (verdict.outcome, verdict.title, verdict.summary) == ("do_not_upgrade", title, summary)
    assert "are no better than old queries are today" in verdict.reasons[0]
    assert (
        "No share of a random backfill below 100% is better in P@1 and in mAP from there on." in verdict.reasons
    ) == ("curve" in measured)


def test_better_in_one_metric_only_is_said():
    one = evaluation(new=0.6)
    one.pairs["new_to_old"]["mean_average_precision"] *= 0.1
    verdict = upgrade_verdict(one)
    assert verdict.outcome == "do_not_upgrade"
    assert "are better than old queries are today in P@1, and worse in mAP: P@1 60.0%" in verdict.reasons[0]


def test_no_verdict_without_old_queries():
    one = evaluation(new=0.6)
    del one.pairs["old_to_old"]
    verdict = upgrade_verdict(one)
    assert verdict.outcome is None and verdict.title == "No verdict"
    assert [sentence.partition(",")[0].split()[1] for sentence in verdict.missing] == [
        "--old-queries",
        "--transformation",
        "--new-gallery",
    ]
    assert verdict.to_json()["outcome"] is None


def test_flips_are_a_warning_with_the_worst_classes():
    one = evaluation(new=0.7)
    one.labels = torch.arange(QUERIES) // 40
    one.__dict__["_classes"] = np.arange(QUERIES)
    one.pairs["new_to_old"]["precision_at_1"][:20] = 0
    one.pairs["new_to_old"]["precision_at_1"][41] = 0
    verdict = upgrade_verdict(one)
    assert verdict.outcome == "swap_now"
    (warning,) = verdict.warnings
    assert warning.startswith("5.2% of the queries find the right item first today and would not after the upgrade")
    assert "(20.0% the other way round); most in class 0 (20 of 40), class 1 (1 of 40)." in warning


def test_flips_are_those_of_the_backfilled_gallery():
    one = evaluation(new=0.1, new_new=0.9, curve=[0.1, 0.6, 0.9])
    one.backfill["old"].per_query[1]["precision_at_1"][:8] = 0
    verdict = upgrade_verdict(one)
    assert verdict.outcome == "backfill_first"
    assert verdict.flips.rate == pytest.approx(8 / QUERIES)


def test_json_is_strict():
    text = json.dumps(upgrade_verdict(evaluation(new=0.6)).to_json(), allow_nan=False)
    assert set(json.loads(text)) == {
        "outcome",
        "certain",
        "share",
        "share_range",
        "queries_needed",
        "vectors",
        "start",
        "pair",
        "title",
        "summary",
        "reasons",
        "warnings",
        "missing",
    }
