import copy
import json
import math
import struct

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

import pml_compat.report
from pml_compat.report import comparison_table, plot_comparison, to_markdown
from pml_compat.report.comparison_plot import RetrievalExample
from pml_compat.report.comparison_table import cost_table
from pml_compat.report.comparison_words import method_in_words
from pml_compat.report.evaluation_table import to_rich
from pml_compat.upgrade import Comparison, Evaluation, evaluate

# method -> pair -> one (P@1, mAP) a seed
NUMBERS = {
    "old": {"old_to_old": [(0.50, 0.40), (0.52, 0.42)]},
    "independent": {"new_to_old": [(0.05, 0.10), (0.07, 0.12)], "new_to_new": [(0.90, 0.80), (0.92, 0.82)]},
    "bct": {"new_to_old": [(0.60, 0.50), (0.62, 0.52)], "new_to_new": [(0.89, 0.78), (0.91, 0.80)]},
}


def of_one_query(pairs, chance=None):
    metrics = ("precision_at_1", "mean_average_precision")
    values = {
        pair: dict(zip(metrics, torch.tensor(both, dtype=torch.float64)[:, None], strict=True))
        for pair, both in pairs.items()
    }
    return Evaluation({} if chance is None else {"chance": chance}, [0], 1, values)


def results(seeds=2, numbers=NUMBERS, chance=None):
    out = Comparison(data={"name": "digits", "images": 10}, seeds=list(range(seeds)))
    for method in list(numbers)[1:]:
        for seed in range(seeds):
            pairs = {**numbers["old"], **numbers[method]}
            out.add(method, of_one_query({pair: values[seed] for pair, values in pairs.items()}, chance))
    return out


def heading(comparison):
    return comparison_table(comparison).title


def markdown_table(comparison):
    return to_markdown(comparison_table(comparison))


def changed(method, pair, values):
    numbers = copy.deepcopy(NUMBERS)
    numbers[method][pair] = values
    return numbers


def strict_json(value):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    return json.loads(json.dumps(value), parse_constant=refuse)


def test_values_of_the_seeds():
    one = results()
    assert one.values("bct", "new_to_old", "precision_at_1") == one.cross("bct", "precision_at_1") == [0.60, 0.62]
    assert one.old("mean_average_precision") == [0.40, 0.42]
    assert one.values("bct", "old_to_new", "precision_at_1") == one.values("x", "new_to_old", "precision_at_1") == []
    assert list(one.evaluations) == ["independent", "bct"]


def test_gains_and_criterion_seed_by_seed():
    numbers = changed("bct", "new_to_old", [(0.60, 0.40), (0.41, 0.52)])
    one = results(numbers=numbers)
    assert one.gains("bct", "precision_at_1") == pytest.approx([0.1 / 0.4, -0.11 / 0.4])
    assert one.holds("bct", "precision_at_1") == [True, False]
    assert one.holds("bct", "mean_average_precision") == [False, True]  # equal is not better


def test_gain_without_room_is_nan_and_silent():
    one = results(numbers=changed("independent", "new_to_new", [(0.50, 0.80), (0.92, 0.82)]))
    undefined, defined = one.gains("bct", "precision_at_1")
    assert math.isnan(undefined)
    assert defined == pytest.approx(0.25)


def test_an_evaluation_without_what_is_compared_is_refused():
    with pytest.raises(ValueError, match="evaluation must have the pair old_to_old, got new_to_old"):
        results().add("x", of_one_query({"new_to_old": (0.5, 0.5)}))
    with pytest.raises(ValueError, match="evaluation must have the pair two_stages_10, got old_to_old"):
        results().add("x", of_one_query({"old_to_old": (0.5, 0.5)}), "two_stages_10")


def test_how_sure_it_is_comes_from_the_queries():
    labels = torch.arange(200) % 4
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(200, 8, generator=generator), torch.eye(8)[labels]
    one = Comparison({}, seeds=[0])
    one.add("independent", evaluate(new, new, labels, labels, old_queries=old, same_items=True))
    one.add("same", evaluate(old, old, labels, labels, old_queries=old, same_items=True))
    assert one.holds_surely("independent") == [True] and one.holds_surely("same") == [False]
    header, _, *rows = cells(markdown_table(one))
    assert header[-2:] == ["criterion", "sure"]
    assert rows[1][-2:] == ["holds", "1/1"] and rows[2][-2:] == ["fails", "0/1"]
    assert one.to_json()["compatibility"]["independent"]["surely_better"] == [True]
    assert "better for sure in 1 of 1" in method_in_words(one, "independent")
    assert "sure" not in markdown_table(results())


def test_json_schema():
    one = strict_json(results(chance=0.1).to_json())
    assert set(one) == {"data", "seeds", "chance", "methods", "costs", "compatibility"}
    assert one["costs"] == {}
    assert one["data"] == {"name": "digits", "images": 10}
    assert one["seeds"] == [0, 1]
    assert one["chance"] == {"precision_at_1": pytest.approx(0.1), "mean_average_precision": pytest.approx(0.1)}
    assert {method: set(pairs) for method, pairs in one["methods"].items()} == {
        "old": {"old_to_old"},
        "independent": {"new_to_old", "new_to_new"},
        "bct": {"new_to_old", "new_to_new"},
    }
    assert one["methods"]["bct"]["new_to_old"] == {
        "precision_at_1": {"mean": pytest.approx(0.61), "per_seed": [0.60, 0.62]},
        "mean_average_precision": {"mean": pytest.approx(0.51), "per_seed": [0.50, 0.52]},
    }
    assert set(one["compatibility"]) == {"independent", "bct"}
    assert one["compatibility"]["bct"]["precision_at_1"] == {
        "update_gain": {"mean": pytest.approx(0.25), "per_seed": pytest.approx([0.25, 0.25])},
        "holds": [True, True],
    }


def test_costs_have_columns_where_they_were_measured():
    measured = results()
    assert "ms/step" not in markdown_table(measured)
    for milliseconds in (7.0, 8.0):
        measured.add_costs("bct", {"milliseconds_per_step": milliseconds, "extra_mebibytes": 12.4})
    header, _, *rows = markdown_table(measured).splitlines()
    assert header.endswith("| gain | ms/step | +MiB | criterion |")
    assert "| 7.50 | 12 | holds |" in rows[-1] and "|  |  | fails |" in rows[1]
    assert strict_json(measured.to_json())["costs"] == {
        "bct": {
            "milliseconds_per_step": {"mean": 7.5, "per_seed": [7.0, 8.0]},
            "extra_mebibytes": {"mean": pytest.approx(12.4), "per_seed": [12.4, 12.4]},
        }
    }


def test_json_has_null_for_an_undefined_gain():
    one = strict_json(results(numbers=changed("independent", "new_to_new", [(0.50, 0.80), (0.92, 0.82)])).to_json())
    gain = one["compatibility"]["bct"]["precision_at_1"]["update_gain"]
    assert gain == {"mean": None, "per_seed": [None, pytest.approx(0.25)]}
    assert one["compatibility"]["bct"]["mean_average_precision"]["update_gain"]["mean"] == pytest.approx(0.25)


def test_a_narrow_table_leaves_costs_and_criterion_to_another():
    measured = results()
    assert comparison_table(measured, narrow=True) == comparison_table(measured)
    measured.add_costs("bct", {"milliseconds_per_step": 7.0, "extra_mebibytes": 12.4})
    assert comparison_table(measured, narrow=True).header == ["method", "old/old", "new/old", "new/new", "gain"]
    assert cost_table(measured).header == ["method", "criterion", "ms/step", "+MiB"]
    assert cost_table(measured).rows == [["bct", "holds", "7.00", "12"]]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_markdown_table():
    header, rule, *rows = cells(markdown_table(results()))
    assert header[:4] == ["method", "old/old", "new/old", "new/new"]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert {len(row) for row in [header, rule, *rows]} == {6}
    assert rows == [
        ["old", "51.0 / 41.0", "", "", "", ""],
        ["independent", "", "6.0 / 11.0", "91.0 / 81.0", "-1.12 / -0.75", "fails"],
        ["bct", "", "61.0 / 51.0", "90.0 / 79.0", "0.25 / 0.25", "holds"],
    ]


def test_table_of_some_seeds_and_undefined_gains():
    numbers = changed("bct", "new_to_old", [(0.60, 0.50), (0.62, 0.42)])
    numbers["independent"]["new_to_new"] = [(0.50, 0.80), (0.92, 0.82)]
    *_, row = cells(markdown_table(results(numbers=numbers)))
    assert row[4].split(" / ")[0] == "undefined"
    assert row[5] == "in 1 of 2"


def test_table_of_huge_gains_stays_narrow():
    *_, row = cells(markdown_table(results(1, changed("independent", "new_to_new", [(0.501, 0.401)]))))
    assert row[4] == "100 / 100"


FCT = {**NUMBERS, "fct": {"new_to_transformed_old": [(0.80, 0.70), (0.82, 0.72)]}}


def test_a_transformed_gallery_is_its_methods_cross_test():
    one = results(numbers=FCT)
    assert one.served["fct"] == "new_to_transformed_old" and one.served["bct"] == "new_to_old"
    assert one.gains("fct", "precision_at_1") == pytest.approx([0.3 / 0.4, 0.3 / 0.4])
    assert one.holds("fct", "mean_average_precision") == [True, True]
    header, _, *rows = cells(markdown_table(one))
    assert header[:4] == ["method", "old/old", "new/old", "new/new"]
    assert rows[-1] == ["fct", "", "81.0 / 71.0 T", "", "0.75 / 0.75", "holds"]
    assert "(T: transformed)" in heading(one) and "T:" not in heading(results())
    said = method_in_words(one, "fct")
    assert said.startswith("fct: compatible. New queries find the transformed old gallery better than old queries did")
    assert "81.0% against 51.0%" in said and said.endswith("The new model is the independent one, as it was.")
    assert "transformed" not in method_in_words(one, "bct") and "as it was" not in method_in_words(one, "bct")
    assert one.to_json()["compatibility"]["fct"]["precision_at_1"]["holds"] == [True, True]


def test_rich_table_says_what_the_markdown_table_says():
    one = results()
    console = Console(width=100)
    with console.capture() as capture:
        console.print(to_rich(comparison_table(one)))
    printed = capture.get()
    assert heading(one) in printed
    for row in cells(markdown_table(one))[2:]:
        assert any(line.split() == " ".join(row).split() for line in printed.splitlines())


@pytest.mark.parametrize(("seeds", "expected"), [(1, "1 seed"), (2, "2 seeds")])
def test_title_names_data_and_seeds(seeds, expected):
    assert heading(results(seeds)).startswith("digits: ")
    assert heading(results(seeds)).endswith(f"mean of {expected}")


def test_verdict_of_a_compatible_model():
    text = method_in_words(results(), "bct")
    assert text.startswith("bct: compatible. ")
    assert "in 2 of 2 seeds" in text
    assert "P@1 61.0% against 51.0% (+10.0 points); mAP 51.0% against 41.0% (+10.0 points)" in text
    assert "P@1 0.25, mAP 0.25" in text
    assert "against the independent model: P@1 -1.0 points, mAP -2.0 points" in text


def test_verdict_of_one_seed():
    assert "in the one seed run" in method_in_words(results(1), "bct")


def test_verdict_of_an_incompatible_model():
    text = method_in_words(results(chance=0.05), "independent")
    assert text.startswith("independent: not compatible. ")
    assert "P@1 6.0% against 51.0% (-45.0 points), where chance is 5.0%" in text
    assert text.count("chance") == 1  # mAP is above twice that
    assert "Update gain" not in text


def test_verdict_of_an_unreliable_model():
    text = method_in_words(results(numbers=changed("bct", "new_to_old", [(0.60, 0.50), (0.62, 0.42)])), "bct")
    assert text.startswith("bct: not reliably compatible. The criterion holds in 1 of 2 seeds")


def test_criterion_needs_both_metrics_in_the_same_seed():
    text = method_in_words(results(numbers=changed("bct", "new_to_old", [(0.60, 0.40), (0.41, 0.52)])), "bct")
    assert text.startswith("bct: not compatible. ")


def test_verdict_of_an_undefined_gain_is_in_words():
    text = method_in_words(results(numbers=changed("independent", "new_to_new", [(0.50, 0.80), (0.92, 0.82)])), "bct")
    assert "nan" not in text
    assert "P@1 undefined" in text


def examples():
    image = np.outer(np.arange(8), np.arange(8)).astype(np.float32) / 49
    found = [(image, True), (image.T, False)]
    return [RetrievalExample(image, {"independent": found, "bct": found[::-1]}) for _ in range(2)]


def size_of(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("seeds", [1, 2])
def test_plot_writes_a_picture(seeds, tmp_path):
    plot_comparison(results(seeds), tmp_path / "plain.png")
    plot_comparison(results(seeds), tmp_path / "examples.png", examples())
    (width, height), (width_too, higher) = size_of(tmp_path / "plain.png"), size_of(tmp_path / "examples.png")
    assert 1200 <= width == width_too <= 2400
    assert 500 <= height < higher <= 1500
    picture = imread(tmp_path / "examples.png")[..., :3]
    assert (picture == 1).all(2).mean() > 0.3  # white ground
    below = picture[height:]
    assert below.min() < 0.5  # the examples are drawn
    for red, green, blue in ((0x2E, 0x8B, 0x57), (0xC0, 0x39, 0x2B)):  # frames of right and wrong finds
        assert (np.abs(below * 255 - (red, green, blue)).max(2) < 2).any()


def test_plot_draws_a_dot_a_seed_where_there_are_several(tmp_path):
    twice = {method: {pair: values[:1] * 2 for pair, values in pairs.items()} for method, pairs in NUMBERS.items()}
    plot_comparison(results(1), tmp_path / "one.png")
    plot_comparison(results(2, twice), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_the_old_names_work_for_a_release(tmp_path):
    def old(name):
        with pytest.warns(DeprecationWarning, match=f"from pml_compat.report.results import {name}"):
            return getattr(pml_compat.report, name)

    with pytest.warns(DeprecationWarning, match="use pml_compat.upgrade.Comparison"):
        one = old("Results")({"name": "digits"}, [0, 1])
    for method, pairs in NUMBERS.items():
        for pair, values in pairs.items():
            for both in values:
                one.add(method, pair, dict(zip(("precision_at_1", "mean_average_precision"), both, strict=True)))
    assert old("markdown_table")(one) == markdown_table(results())
    assert old("title")(one) == heading(results())
    assert old("verdict")(one, "bct") == method_in_words(results(), "bct")
    assert one.gains("bct", "precision_at_1") == results().gains("bct", "precision_at_1")
    old("plot_compatibility")(one, tmp_path / "old.png")
    assert (tmp_path / "old.png").exists()
