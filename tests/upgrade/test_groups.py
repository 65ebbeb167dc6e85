"""What an upgrade does to each group of queries, and what the index that is served makes of it."""

import json

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.report.evaluation_table import all_tables, group_table
from pml_compat.upgrade import evaluate
from pml_compat.verification import verification
from tests.upgrade.test_evaluate import judged, models, unit


def uneven(seed=0):
    """A better new model that fails one of three groups, the queries of every third class."""
    data = list(models(seed=seed))
    groups = np.array(["north", "south", "west"])[data[2].numpy() % 3]
    lost = torch.from_numpy(groups == "west")
    data[0] = data[0].clone()
    data[0][lost] = unit(data[0][lost] + 1.2 * torch.randn(int(lost.sum()), 16))
    return data, groups


def test_a_group_that_is_worse_off_is_a_warning():
    data, groups = uneven()
    found = judged(data, groups=groups)
    assert list(found.groups) == ["north", "south", "west"]
    assert found.verdict.outcome == "swap_now"
    (warning,) = (sentence for sentence in found.verdict.warnings if sentence.startswith("Group"))
    assert warning.startswith("Group west is worse off (130 queries): P@1 -") and "mAP -" in warning
    assert [one.verdict.outcome for one in found.groups.values()] == ["swap_now", "swap_now", "do_not_upgrade"]


def test_a_groups_numbers_are_those_of_its_queries():
    data, groups = uneven()
    new_q, old_g, labels, gallery_labels, old_q, new_g = data
    rows = torch.from_numpy(groups == "south")
    whole = judged(data, groups=groups, new_gallery=new_g, orders=2, fars=(0.01,))
    part = evaluate(
        new_q[rows], old_g, labels[rows], gallery_labels, old_queries=old_q[rows], new_gallery=new_g, orders=2
    )
    south = whole.groups["south"]
    for pair in ("old_to_old", "new_to_old", "new_to_new"):
        for metric in ("precision_at_1", "mean_average_precision"):
            assert south.accuracy(pair, metric) == pytest.approx(part.accuracy(pair, metric))
    assert south.backfill["old"].values("precision_at_1") == pytest.approx(
        part.backfill["old"].values("precision_at_1")
    )
    threshold = whole.verification["old_to_old"].at_far[0.01].threshold
    alone = verification(new_q[rows], labels[rows], old_g, gallery_labels, fars=(0.01,), thresholds=threshold)
    assert south.verification["new_to_old"].at_threshold[0.01].far == alone.at_threshold[threshold].far


def test_false_accepts_of_a_group_that_rise():
    new_q, old_g, labels, gallery_labels, old_q, _ = models(n_query=1200, n_gallery=1200, old_noise=0.3)
    groups = np.array(["a", "b"])[np.arange(1200) % 2]
    shifted = new_q.clone()
    mean = unit(old_g.mean(0, keepdim=True) + old_g[:1])
    shifted[1::2] = unit(shifted[1::2] + 0.8 * mean)
    old_g = unit(old_g + 0.4 * mean)
    found = judged(
        (shifted, old_g, labels, gallery_labels, unit(old_q + 0.4 * mean), None), groups=groups, fars=(0.01,)
    )
    rise = {
        name: one.verification["new_to_old"].at_threshold[0.01].far
        / one.verification["old_to_old"].at_threshold[0.01].far
        for name, one in found.groups.items()
    }
    assert rise["b"] > 3 * rise["a"]
    table = group_table(found, found.verdict)
    assert table.header[-3:] == ["FAR 0.01 today", "FAR 0.01 after", "verdict"]
    assert [row[0] for row in table.rows] == ["a", "b"] and table in all_tables(found, found.verdict)


def test_unknown_groups_are_none_and_json_has_the_others(tmp_path):
    data = models()
    groups = np.array(["x", None] * 200, dtype=object)
    found = judged(data, groups=groups)
    assert list(found.groups) == ["x"]
    found.to_json(tmp_path / "metrics.json")
    stored = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert stored["groups"]["x"]["data"]["queries"] == 200
    assert stored["groups"]["x"]["verdict"]["outcome"] == "swap_now"
    found.to_html(tmp_path / "page.html")
    assert "Groups of queries, new/old" in (tmp_path / "page.html").read_text()


def test_a_group_without_a_right_item_is_left_out():
    data = list(models())
    data[2] = data[2].clone()
    data[2][:10] = 99
    groups = np.array(["lone"] * 10 + ["rest"] * 390)
    assert list(judged(data, groups=groups, fars=(0.01,)).groups) == ["rest"]


def test_groups_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"groups must have one entry a query: expected \(400,\), got \(3,\)"):
        judged(models(), groups=["a", "b", "c"])


def test_a_knn_func_ranks_in_place_of_the_exact_search():
    def coarse(query, k, reference, ref_includes_query=False):  # as an index would, by a part of each vector
        return torch.cdist(query[:, :6], reference[:, :6]).topk(k, largest=False)

    new_q, old_g, labels, gallery_labels, old_q, new_g = models()
    options = {"old_queries": old_q, "new_gallery": new_g, "orders": 1}
    found = evaluate(new_q, old_g, labels, gallery_labels, knn_func=coarse, **options)
    one = CrossModelAccuracyCalculator(("precision_at_1",), device="cpu", knn_func=coarse)
    expected = one.get_accuracy(new_q, labels, old_g, gallery_labels)["precision_at_1"]
    exact = judged(models()).accuracy("new_to_old", "precision_at_1")
    assert found.accuracy("new_to_old", "precision_at_1") == pytest.approx(expected) and expected < exact - 0.02
    assert not any(pair.startswith("two_stages") for pair in found.pairs)
    steps = found.backfill["old"].values("precision_at_1")
    mixed = old_g.clone()
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:80]
    mixed[order] = new_g[order]
    expected = one.get_accuracy(new_q, labels, mixed, gallery_labels)["precision_at_1"]
    assert steps[1] == pytest.approx(expected)
