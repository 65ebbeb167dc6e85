import json
import math

import pytest
import torch
from rich.console import Console

from pml_compat.report.evaluation_plots import draw_flips
from pml_compat.report.evaluation_table import all_tables, flip_table, gain_table, to_html, to_markdown, to_rich
from pml_compat.report.page import html_page
from pml_compat.upgrade import Evaluation
from pml_compat.upgrade.as_json import without_nan
from pml_compat.upgrade.evaluation import Backfill
from pml_compat.upgrade.verdict import upgrade_verdict

METRICS = ("precision_at_1", "mean_average_precision")


def values(*reciprocal_ranks):
    ranks = torch.tensor(reciprocal_ranks, dtype=torch.float64)
    first = torch.where(ranks.isnan(), ranks, (ranks == 1).double())
    return {"precision_at_1": first, "mean_average_precision": ranks, "mean_reciprocal_rank": ranks}


OLD = values(1, 0, 1 / 3, 0.25, math.nan)
NEW = values(1, 1, 0.5, 0, math.nan)


def evaluation(**changes):
    settings = {
        "data": {"queries": 5, "gallery": 4, "classes": 3, "normalized": True, "same_items": None},
        "labels": torch.tensor([0, 0, 1, 1, 2]),
        "gallery_size": 4,
        "pairs": {"old_to_old": OLD, "new_to_old": NEW},
    }
    return Evaluation(**{**settings, **changes})


def test_cmc_counts_queries_with_a_positive_by_the_place_of_the_first():
    assert evaluation().cmc("old_to_old") == pytest.approx([0.25, 0.25, 0.5, 0.75])
    assert evaluation().cmc("new_to_old") == pytest.approx([0.5, 0.75, 0.75, 0.75])
    assert len(evaluation(gallery_size=1000).cmc("old_to_old")) == 100


def test_every_place_up_to_a_hundred_is_found_again():
    one = evaluation(pairs={"new_to_old": values(*(1 / place for place in range(1, 101)))}, gallery_size=100)
    assert one.cmc("new_to_old") == pytest.approx([place / 100 for place in range(1, 101)])


def test_accuracies_leave_lone_queries_out():
    assert evaluation().accuracy("old_to_old", "precision_at_1") == 0.25
    assert evaluation().differences["new_to_old"]["precision_at_1"].estimate == 0.25
    assert evaluation().differences["new_to_old"]["precision_at_1"].left_out == 1


def test_an_undefined_gain_is_null_and_in_words():
    one = evaluation(pairs={"old_to_old": OLD, "new_to_old": NEW, "new_to_new": OLD})
    stored = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert stored["update_gain"]["new_to_old"]["precision_at_1"]["estimate"] is None
    assert gain_table(one).rows == [["new/old", "undefined", "undefined"]]


def test_area_under_the_backfill():
    curve = Backfill("random", (0.0, 0.5, 1.0), (0, 2, 4), [values(0.5), values(1), values(1)])
    assert curve.values("precision_at_1") == [0, 1, 1]
    assert curve.area("precision_at_1") == pytest.approx(0.75)


def test_no_nan_anywhere():
    assert without_nan({"a": [math.nan, 1.0, (math.inf,)], "b": {"c": -math.inf}}) == {
        "a": [None, 1.0, [None]],
        "b": {"c": None},
    }


def test_tables_say_the_same_in_markdown_and_html():
    one = evaluation()
    for table in all_tables(one, upgrade_verdict(one)):
        assert {len(row) for row in table.rows} == {len(table.header)}
        markdown, page = to_markdown(table), to_html(table)
        for cell in (cell for row in [table.header, *table.rows] for cell in row):
            assert f" {cell} |" in markdown
            assert f">{cell}</t" in page


def test_flip_table_names_classes():
    one = evaluation(pairs={"old_to_old": NEW, "new_to_old": OLD})
    assert flip_table(upgrade_verdict(one)).rows == [["0", "1", "2", "50.0"]]
    assert flip_table(upgrade_verdict(evaluation())) is None


@pytest.mark.parametrize(
    ("pairs", "card"),
    [
        ({"old_to_old": OLD, "new_to_old": NEW}, "verdict mixed"),  # so few queries say nothing
        ({"old_to_old": NEW, "new_to_old": OLD}, "verdict bad"),
        ({"old_to_old": values(*[0.5] * 50), "new_to_old": values(*[1] * 50)}, "verdict good"),
        ({"new_to_old": NEW}, "verdict "),
    ],
)
def test_page_shows_the_verdict_in_its_colour(pairs, card):
    one = evaluation(pairs=pairs, labels=torch.zeros(len(pairs["new_to_old"]["precision_at_1"]), dtype=torch.long))
    verdict = upgrade_verdict(one)
    page = html_page(one, verdict, "Upgrade of <a> & b")
    assert f'<section class="{card}">\n<h2>{verdict.title}</h2>' in page
    assert "<h1>Upgrade of &lt;a&gt; &amp; b</h1>" in page


def test_pictures_show_the_numbers():
    one = evaluation(
        pairs={"old_to_old": NEW, "new_to_old": OLD, "new_to_new": NEW},
        backfill={"old": Backfill("random", (0.0, 1.0), (0, 4), [OLD, NEW])},
    )
    page = html_page(one, upgrade_verdict(one), "Upgrade")
    matrix, cmc, backfill, flips = page.split("<figure>")[1:]
    assert all(f">{number}</text>" in matrix for number in ("25.0", "50.0")) and "measured" in matrix
    assert all(f">{name}</text>" in cmc for name in ("old/old", "new/old", "new/new"))
    assert ">from the stored gallery</text>" in backfill and ">mAP, %</text>" in backfill
    assert "1 of 2</text>" in flips


def test_names_from_the_files_stay_text():
    name = "<b>shelf</b> | [red]"
    old, new = values(1, 1, 1, 1), values(0.5, 1, 1, 1)
    one = evaluation(pairs={"old_to_old": old, "new_to_old": new}, labels=[name, name, "chair", "chair"])
    table = flip_table(one.verdict)
    assert table.rows[0][0] == name
    assert "&lt;b&gt;shelf&lt;/b&gt; | [red]" in to_html(table) and "<b>" not in to_html(table)
    assert "| &lt;b>shelf&lt;/b> \\| [red] |" in to_markdown(table)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(to_rich(table))
    assert name in capture.get()
    one.data |= {"same_items": None}
    page = html_page(one, one.verdict, "title")
    assert "<b>shelf" not in page


def test_long_names_leave_room_for_the_bars():
    name = "a very long name of a class that says 17"
    old, new = values(1, 1, 1, 1), values(0.5, 1, 1, 1)
    one = evaluation(pairs={"old_to_old": old, "new_to_old": new}, labels=[name, name, "chair", "chair"])
    svg = draw_flips(one.verdict)
    assert name not in svg and "a very long…at says 17" in svg
