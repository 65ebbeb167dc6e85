"""Blended queries and a search in two stages, as rows, options and verdict of an evaluation."""

import pytest
import torch
from torch.nn.functional import normalize

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.serving import QueryBlend, two_stage_accuracy
from pml_compat.upgrade import evaluate

WIDTH, CLASSES = 16, 12


def cloud(labels, noise, seed, turn=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.eye(WIDTH)[labels] + noise * torch.randn(len(labels), WIDTH, generator=generator)
    if turn is not None:
        rows = rows @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(turn)))[0]
    return rows


def upgrade(n_query=300, n_gallery=400, old=0.5, new=0.25):
    labels, gallery_labels = torch.arange(n_query) % CLASSES, torch.arange(n_gallery) % CLASSES
    return {
        "queries": cloud(labels, new, 1, turn=7),
        "gallery": cloud(gallery_labels, old, 2),
        "query_labels": labels,
        "gallery_labels": gallery_labels,
        "old_queries": cloud(labels, old, 3),
        "new_gallery": cloud(gallery_labels, new, 4, turn=7),
    }


def test_rows_are_those_of_the_query_blend_and_of_two_stage_accuracy():
    given = upgrade()
    found = evaluate(**given, depths=(5, 20), orders=1)
    assert list(found.pairs)[-4:] == ["rotated_to_old", "blended_to_old", "two_stages_5", "two_stages_20"]
    blend = QueryBlend().fit(given["gallery"], given["new_gallery"])
    queries = blend.query_rows(normalize(given["old_queries"]), normalize(given["queries"]))
    calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))
    labels = given["query_labels"], given["gallery_labels"]
    expected = calculator.get_accuracy(queries, labels[0], normalize(given["gallery"]), labels[1])
    stages = two_stage_accuracy(
        given["old_queries"], given["queries"], given["gallery"], given["new_gallery"], *labels, depth=(5, 20)
    )
    for metric, value in expected.items():
        assert found.accuracy("blended_to_old", metric) == pytest.approx(value, abs=1e-6)
        for depth in (5, 20):
            assert found.accuracy(f"two_stages_{depth}", metric) == pytest.approx(stages[depth][metric], abs=1e-6)


def test_verdict_names_the_cheaper_of_the_two_that_holds():
    given = upgrade()
    verdict = evaluate(**given, orders=1).verdict
    assert (verdict.outcome, verdict.title, verdict.exit_code) == ("blend_queries", "Blend old and new queries", 0)
    assert any(
        reason.startswith("Blended queries on the gallery as it is stored are better") for reason in verdict.reasons
    )
    verdict = evaluate(**given, orders=1, blend=False).verdict
    assert verdict.outcome == "search_in_two_stages"
    assert verdict.title.startswith("Search in two stages, ") and verdict.to_json()["pair"].startswith("two_stages_")
    assert verdict.flips.rate == evaluate(**given, orders=1, blend=False).pair_flips[verdict.option.pair].rate
    verdict = evaluate(**given, orders=1, blend=False, depths=()).verdict
    assert verdict.outcome not in ("blend_queries", "search_in_two_stages")


def test_a_compatible_model_still_swaps_now():
    given = upgrade()
    given["queries"], given["new_gallery"] = (
        cloud(given["query_labels"], 0.1, 5),
        cloud(given["gallery_labels"], 0.1, 6),
    )
    assert evaluate(**given, orders=1).verdict.outcome == "swap_now"


def test_a_query_is_not_blended_by_what_was_fitted_to_itself():
    """Random embeddings: fitted to the queries themselves, a rotation brings each near its own old vector."""
    labels = torch.arange(120) % CLASSES
    old, new = (torch.randn(120, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = evaluate(new, old, labels, labels, old_queries=old, new_gallery=new, same_items=True, orders=1)
    assert found.pairs["rotated_to_old"]["precision_at_1"].mean() < 0.25
    same = evaluate(new, old, labels, labels, old_queries=old, new_gallery=new, same_items=True, orders=1, seed=0)
    torch.testing.assert_close(found.pairs["rotated_to_old"], same.pairs["rotated_to_old"])


@pytest.mark.parametrize("how", ["ids", "cameras", "both"])
def test_two_stages_leave_out_what_a_ranking_leaves_out(how):
    """With as many candidates as the gallery has, all but one, two stages are new/new's P@1."""
    labels = torch.arange(60) % 5
    old, new = cloud(labels, 0.6, 0), cloud(labels, 0.4, 1, turn=3)
    codes = {}
    if how != "cameras":
        codes |= {"query_ids": torch.arange(60) // 2, "gallery_ids": torch.arange(60)}
    if how != "ids":
        codes |= {"query_cameras": torch.arange(60) % 3, "gallery_cameras": torch.arange(60) % 4}
    if how == "cameras":
        codes["same_items"] = True
    elif how == "ids":
        labels = torch.zeros(60, dtype=torch.long)
        labels[::2] = 1
        codes["query_ids"] = codes["gallery_ids"] = torch.arange(60)
    else:
        codes["query_ids"] = codes["gallery_ids"]
    found = evaluate(new, old, labels, labels, old_queries=old, new_gallery=new, depths=(59,), orders=1, **codes)
    expected, reached = found.pairs["new_to_new"]["precision_at_1"], found.pairs["two_stages_59"]["precision_at_1"]
    assert torch.equal(expected.isnan(), reached.isnan())
    torch.testing.assert_close(expected, reached, equal_nan=True)


def test_what_they_cannot_be_measured_on_is_left_out():
    given = upgrade()
    assert not [
        pair for pair in evaluate(**given, orders=1, normalize=False).pairs if pair[:3] in ("rot", "ble", "two")
    ]
    without = {name: value for name, value in given.items() if name != "new_gallery"}
    assert list(evaluate(**without).pairs) == ["old_to_old", "new_to_old"]
    blend = QueryBlend().fit(given["gallery"], given["new_gallery"])
    assert list(evaluate(**without, blend=blend).pairs)[2:] == ["rotated_to_old", "blended_to_old"]
    few = {name: rows[:40] for name, rows in given.items()}
    assert list(evaluate(**few, orders=1).pairs)[-1] == "two_stages_10"
    assert "blended_to_old" not in evaluate(**few, orders=1).pairs


def test_errors():
    given = upgrade(n_query=40, n_gallery=60)
    blend = QueryBlend().fit(torch.randn(50, 8), torch.randn(50, 8))
    with pytest.raises(ValueError, match="old_query must"):
        evaluate(**given, blend=blend)
    with pytest.raises(ValueError, match="depths must be an integer of at least 1, got 0"):
        evaluate(**given, depths=(0,))
    given.pop("old_queries")
    with pytest.raises(ValueError, match="blend must be given with old_queries"):
        evaluate(**given, blend=blend)
