"""Inputs on which a verdict was once confident and wrong."""

import json
import math

import numpy as np
import pytest
import torch

from pml_compat.upgrade import evaluate, paired_bootstrap

CLASSES, WIDTH = 40, 16


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


def models(seed=0, n_query=400, n_gallery=800, old_noise=0.5, new_noise=0.2, classes=CLASSES):
    """Old and new queries and galleries in one space; the new model is the better one."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, WIDTH, generator=generator)
    labels = torch.arange(n_query) % classes, torch.arange(n_gallery) % classes

    def rows(label, noise):
        return unit(unit(centers)[label] + noise * torch.randn(len(label), WIDTH, generator=generator))

    old_q, old_g = rows(labels[0], old_noise), rows(labels[1], old_noise)
    return rows(labels[0], new_noise), old_g, *labels, old_q, rows(labels[1], new_noise)


def judged(data, **changes):
    new_q, old_g, labels, gallery_labels, old_q, _ = data
    return evaluate(new_q, old_g, labels, gallery_labels, **{"old_queries": old_q, **changes})


def test_a_better_model_swaps_now(tmp_path):
    found = judged(models())
    assert (found.verdict.outcome, found.verdict.certain, found.verdict.exit_code) == ("swap_now", True, 0)
    assert found.pairs["new_to_old"]["precision_at_1"].shape == (400,)
    assert "| new/old |" in found.table()
    stored = found.to_json(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(stored))


def test_a_page_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the report extra")
    judged(models()).to_html(tmp_path / "page.html")
    assert "<h2>Swap now</h2>" in (tmp_path / "page.html").read_text()


def test_memory_maps_and_text_labels(tmp_path):
    new_q, old_g, labels, gallery_labels, old_q, _ = models()
    np.save(tmp_path / "g.npy", old_g.numpy())
    gallery = np.load(tmp_path / "g.npy", mmap_mode="r")
    names = [f"class {label}" for label in labels], [f"class {label}" for label in gallery_labels]
    found = evaluate(new_q.numpy(), gallery, *names, old_queries=old_q.numpy())
    expected = judged(models())
    assert found.verdict.title == expected.verdict.title
    assert found.accuracy("new_to_old", "mean_average_precision") == pytest.approx(
        expected.accuracy("new_to_old", "mean_average_precision")
    )
    assert all(one.label.startswith("class ") for one in found.pair_flips["new_to_old"].worst())


def test_a_common_component_needs_a_new_threshold():
    new_q, old_g, labels, gallery_labels, old_q, _ = models()

    def with_common(rows, size):
        return unit(torch.nn.functional.pad(rows, (0, 1), value=size))

    new_q, old_g, old_q = with_common(new_q, 3.0), with_common(old_g, 1.0), with_common(old_q, 0.3)
    found = evaluate(new_q, old_g, labels, gallery_labels, old_queries=old_q, fars=[1e-3])
    verdict = found.verdict
    assert found.verification["new_to_old"].at_threshold[1e-3].far > 0.4
    assert verdict.outcome == "swap_with_a_new_threshold" and verdict.exit_code == 0
    assert (
        verdict.summary.startswith("Do not keep the threshold of ") and "false accepts go from 0.10%" in verdict.summary
    )


def test_rows_in_another_order_give_no_verdict():
    data = list(models())
    data[4] = data[4][torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    verdict = judged(data).verdict
    assert verdict.outcome is None and verdict.exit_code == 2
    assert "no better than chance" in verdict.reasons[0] and "in another order" in verdict.reasons[0]


def test_queries_that_are_the_gallery_are_named():
    _, old_g, _, gallery_labels, _, new_g = models()
    with pytest.raises(
        ValueError, match=r"100% of the old model's are, bit by bit, .* same_items=True \(--same-items\)"
    ):
        evaluate(new_g, old_g, gallery_labels, gallery_labels, old_queries=old_g)
    with pytest.raises(ValueError, match=r"100% of the new model's are, bit by bit, .* give query_ids and gallery_ids"):
        evaluate(new_g.flip(0), old_g, gallery_labels.flip(0), gallery_labels, new_gallery=new_g)
    assert evaluate(new_g, old_g, gallery_labels, gallery_labels, same_items=True).accuracy("new_to_old", "r_precision")


def per_query(old, new):
    old, new = torch.as_tensor(old).double(), torch.as_tensor(new).double()
    from pml_compat.upgrade import Evaluation

    metrics = ("precision_at_1", "mean_average_precision")
    pairs = {"old_to_old": dict.fromkeys(metrics, old), "new_to_old": dict.fromkeys(metrics, new)}
    return Evaluation(data={}, labels=torch.arange(len(old)), gallery_size=100, pairs=pairs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([0] * 6 + [1] * 6, [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3),  # 12 queries, no difference, +-40 points
        ([0], [1]),
        ([0] * 3, [1] * 3),
        ([0] * 50, [1] * 4 + [0] * 46),  # the sign test's p is 0.125
    ],
)
def test_few_queries_say_nothing(old, new):
    verdict = per_query(old, new).verdict
    assert (verdict.outcome, verdict.certain, verdict.exit_code) == ("not_enough_queries", False, 2)
    assert verdict.queries_needed > len(old)
    assert per_query([0] * 50, [1] * 6 + [0] * 44).verdict.outcome == "swap_now"  # p = 0.03


def test_two_equal_models_are_seldom_told_apart():
    """30 classes of 40 items that are queries and gallery: the classes are the sample, not the items."""
    sure, by_queries = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        hard = rng.normal(size=(30, 2))  # how hard each class is for each model
        labels = np.repeat(np.arange(30), 40)
        old, new = ((rng.normal(size=1200) + hard[labels, model] > 0).astype(float) for model in (0, 1))
        sure += paired_bootstrap(old, new, samples=400, groups=labels).above
        by_queries += paired_bootstrap(old, new, samples=400).above
    assert sure <= 5 < by_queries


def test_intervals_cover_what_they_say():
    """Independent queries whose P@1 differs by 2 points on average: 95 % of the intervals hold that."""
    rng, covered, repeats = np.random.default_rng(0), 0, 400
    for seed in range(repeats):
        kind = rng.choice(3, size=300, p=[0.06, 0.04, 0.9])  # better, worse, as before
        old, new = (kind == 1).astype(float), (kind == 0).astype(float)
        found = paired_bootstrap(old, new, samples=400, seed=seed)
        covered += found.low <= 0.02 <= found.high
    assert 0.92 <= covered / repeats <= 0.98


def test_the_share_to_backfill_has_a_range_over_orders():
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    new_q, old_g, labels, gallery_labels, old_q, new_g = models(old_noise=0.3, n_gallery=400)
    found = []
    for seed in range(3):
        found.append(
            evaluate(
                new_q @ rotation,
                old_g,
                labels,
                gallery_labels,
                old_queries=old_q,
                new_gallery=new_g @ rotation,
                blend=False,
                depths=(),
                seed=10 * seed,
            ).verdict
        )
    assert {verdict.outcome for verdict in found} == {"backfill_first"}
    shares = [verdict.option.share for verdict in found]
    assert max(shares) - min(shares) <= 0.1001
    for verdict in found:
        low, high = verdict.option.share_range
        assert low <= verdict.option.share <= high
        assert verdict.to_json()["share_range"] == [low, high]
    assert len(judged(models(n_gallery=80), new_gallery=models(n_gallery=80)[5]).backfill["old"].repeats) == 5


def test_better_in_one_metric_and_worse_in_the_other_is_said():
    found = per_query([0.0] * 100, [1.0] * 43 + [0.0] * 57)
    found.pairs["old_to_old"]["mean_average_precision"] = torch.full((100,), 0.5).double()
    found.pairs["new_to_old"]["mean_average_precision"] = torch.full((100,), 0.43).double()
    verdict = found.verdict
    assert verdict.outcome == "do_not_upgrade" and verdict.exit_code == 1
    assert "are better than old queries are today in P@1, and worse in mAP" in verdict.reasons[0]


def test_a_broken_new_gallery_is_a_warning():
    data = models()
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))
    verdict = judged(data, new_gallery=data[5][order]).verdict
    assert any("new_gallery is broken" in warning for warning in verdict.warnings)


def test_a_sample_of_the_new_gallery_is_taken_by_ids():
    new_q, old_g, labels, gallery_labels, old_q, new_g = models()
    ids = np.array([f"item {row}" for row in range(800)])
    rows = np.random.default_rng(0).permutation(800)[:300]
    found = evaluate(
        new_q,
        old_g,
        labels,
        gallery_labels,
        old_queries=old_q,
        new_gallery=new_g[rows],
        gallery_ids=ids,
        new_gallery_ids=ids[rows],
    )
    assert found.gallery_size == 300 and "a sample: all is measured on its 300 of 800" in found.notes[0]
    expected = evaluate(new_q, old_g[rows], labels, gallery_labels[rows], old_queries=old_q, new_gallery=new_g[rows])
    assert found.accuracy("new_to_new", "r_precision") == expected.accuracy("new_to_new", "r_precision")
    with pytest.raises(ValueError, match="new_gallery_ids must be among gallery_ids, each once: 'x' is not"):
        evaluate(new_q, old_g, labels, gallery_labels, new_gallery=new_g[:1], gallery_ids=ids, new_gallery_ids=["x"])


def test_zeros_are_counted_and_huge_rows_are_ranked():
    new_q, old_g, labels, gallery_labels, old_q, _ = models()
    holed = old_g.clone()
    holed[::2] = 0
    found = evaluate(new_q, holed, labels, gallery_labels, old_queries=old_q)
    assert "400 of 800 rows of gallery are all zeros" in " ".join(found.notes)
    huge, plain = (evaluate(new_q, scale * old_g, labels, gallery_labels, old_queries=old_q) for scale in (1e20, 1))
    for metric in plain.pairs["new_to_old"]:
        assert huge.accuracy("new_to_old", metric) == pytest.approx(plain.accuracy("new_to_old", metric), abs=1e-3)


def test_cameras_that_take_every_positive_are_named():
    data = models()
    cameras = torch.zeros(400), torch.zeros(800)
    with pytest.raises(ValueError, match="query_cameras and gallery_cameras must leave a query a right item"):
        judged(data, query_cameras=cameras[0], gallery_cameras=cameras[1])


def test_exchanged_galleries_and_mixed_up_models_give_no_verdict():
    new_q, old_g, labels, gallery_labels, old_q, new_g = models()
    flipped = new_q.flip(1), new_g.flip(1)
    exchanged = evaluate(flipped[0], flipped[1], labels, gallery_labels, old_queries=old_q, new_gallery=old_g).verdict
    assert exchanged.outcome is None and any("galleries exchanged" in reason for reason in exchanged.reasons)
    half = old_g.clone()
    half[::2] = flipped[1][::2]
    mixed = evaluate(flipped[0], half, labels, gallery_labels, old_queries=old_q, new_gallery=flipped[1]).verdict
    assert mixed.outcome is None and "400 of 800 rows of the old and the new gallery are the same" in mixed.reasons[0]
    same = evaluate(new_q, old_g, labels, gallery_labels, old_queries=new_q).verdict
    assert same.outcome is None and "rows of the old and the new queries are the same" in same.reasons[0]


def test_an_item_with_two_labels_is_named():
    data = models()
    ids = {"query_ids": np.arange(400), "gallery_ids": np.roll(np.arange(800), 3)}
    with pytest.raises(ValueError, match="must give an item one label, the item 0 has two"):
        judged(data, **ids)


def test_widths_that_differ_are_asked_about():
    new_q, old_g, labels, gallery_labels, old_q, new_g = models()
    wide = torch.nn.functional.pad(new_q, (0, 3)), torch.nn.functional.pad(new_g, (0, 3))
    with pytest.raises(ValueError, match="queries must be as wide as gallery, got widths 19 and 16"):
        evaluate(wide[0], old_g, labels, gallery_labels, old_queries=old_q, new_gallery=wide[1])
    fitted = evaluate(wide[0], old_g, labels, gallery_labels, old_queries=old_q, fit_width=True)
    assert fitted.verdict.outcome == "swap_now"
    mapped = evaluate(wide[0], old_g, labels, gallery_labels, old_queries=old_q, transformed_gallery=wide[1])
    assert list(mapped.pairs) == ["old_to_old", "new_to_transformed_old"]
    assert mapped.verdict.outcome == "swap_with_transformed_gallery"


def test_unknown_labels_do_not_count():
    new_q, old_g, labels, gallery_labels, old_q, _ = models()
    labels = labels.double()
    labels[:10] = math.nan
    found = evaluate(new_q, old_g, labels, gallery_labels, old_queries=old_q)
    assert found.data["scored_queries"] == 390
