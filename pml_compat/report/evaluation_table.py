"""The tables of an evaluation: for a terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from .._extras import import_extra
from ..upgrade.bootstrap import BootstrapInterval
from ..upgrade.evaluation import Evaluation
from ..upgrade.names import ALL_METRICS, METRICS, pair_name
from ..upgrade.verdict import UpgradeVerdict

_TEXT = ("criterion", "verdict")  # columns of words, but for the first


class Table(NamedTuple):
    """A heading, the columns' names and the cells; the first column is text, the others are mostly numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]


def summary_table(evaluation: Evaluation) -> Table:
    """Return the few numbers that decide, one row a pair."""
    header = ["query/gallery", *METRICS.values()]
    compared = bool(evaluation.differences)
    if compared:
        header += [*(f"{name} less old/old" for name in METRICS.values()), "flips"]
    rows = []
    for pair in evaluation.pairs:
        row = [pair_name(pair), *(_percent(evaluation.accuracy(pair, metric)) for metric in METRICS)]
        if pair in evaluation.differences:
            row += [interval_cell(evaluation.differences[pair][metric]) for metric in METRICS]
            row.append(_percent(evaluation.pair_flips[pair].rate))
        elif compared:
            row += [""] * 3
        rows.append(row)
    title = "In percent; [95% intervals]; flips: right first today, wrong after"
    return Table(title if compared else "In percent", header, rows)


def metric_table(evaluation: Evaluation) -> Table:
    """Return every pair and every metric."""
    first = next(iter(evaluation.pairs.values()))
    shown = [metric for metric in ALL_METRICS if metric in first]
    return Table(
        "All metrics, in percent",
        ["query/gallery", *(ALL_METRICS[metric] for metric in shown)],
        [
            [pair_name(pair), *(_percent(evaluation.accuracy(pair, m)) if m in values else "" for m in shown)]
            for pair, values in evaluation.pairs.items()
        ],
    )


def gain_table(evaluation: Evaluation) -> Table | None:
    """Return the update gains with their intervals, if there are any."""
    rows = [
        [pair_name(pair), *(_gain_cell(gains[metric]) for metric in METRICS)]
        for pair, gains in evaluation.gains.items()
    ]
    title = "Update gain: 0 is today's system, 1 is as good as re-embedding everything"
    return Table(title, ["query/gallery", *METRICS.values()], rows) if rows else None


def backfill_table(evaluation: Evaluation) -> Table | None:
    """Return accuracies at each share of new vectors, if a backfill was measured."""
    if not evaluation.backfill:
        return None
    names = {"old": " from stored", "transformed_old": " from transformed"}
    header = ["re-embedded", "vectors"]
    columns = []
    for start, curve in evaluation.backfill.items():
        suffix = names[start] if len(evaluation.backfill) > 1 else ""
        for metric, name in METRICS.items():
            header.append(f"{name}{suffix}")
            columns.append([_percent(value) for value in curve.values(metric)])
    curve = next(iter(evaluation.backfill.values()))
    first = zip(curve.fractions, curve.vectors, strict=True)
    cells = zip(*columns, strict=True)
    rows = [[f"{share:.0%}", f"{n:,}", *values] for (share, n), values in zip(first, cells, strict=True)]
    return Table("Backfill in random order, in percent", header, rows)


def flip_table(verdict: UpgradeVerdict) -> Table | None:
    """Return the classes that lose most, if any query does."""
    worst = verdict.flips.worst() if verdict.flips is not None else []
    rows = [[str(one.label), f"{one.flips:g}", str(one.queries), _percent(one.flips / one.queries)] for one in worst]
    title = "Queries answered rightly today and wrongly after the upgrade"
    return Table(title, ["class", "flips", "queries", "percent"], rows) if rows else None


def verification_table(evaluation: Evaluation) -> Table | None:
    """Return TAR at each FAR, and what today's thresholds do to new pairs, if it was measured."""
    if evaluation.verification is None:
        return None
    rows = []
    for pair, found in evaluation.verification.items():
        for far, point in found.at_far.items():
            row = [pair_name(pair), f"{far:g}", _percent(point.tar), f"{point.threshold:.4f}"]
            old = found.at_threshold.get(far)
            rows.append([*row, *(["", ""] if old is None else [f"{old.far:.2g}", _percent(old.tar)])])
    header = ["query/gallery", "FAR", "TAR %", "threshold", "FAR at the old threshold", "TAR % there"]
    return Table("Verification", header, rows)


def group_table(evaluation: Evaluation, verdict: UpgradeVerdict) -> Table | None:
    """Return each group of queries with what was chosen, if groups were given; FAR: at the old threshold of all."""
    pair = verdict.option.pair if verdict.option is not None and verdict.option.pair else "new_to_old"
    groups = {name: one for name, one in evaluation.groups.items() if pair in one.differences}
    if not groups:
        return None
    fars = list(next(iter((evaluation.verification or {}).values())).at_far) if evaluation.verification else []
    header = ["group", "queries", *(f"{name} less old/old" for name in METRICS.values())]
    header += [f"FAR {far:g} {when}" for far in fars for when in ("today", "after")]
    rows = []
    for name, one in groups.items():
        row = [name, f"{one.data['scored_queries']:,}"]
        row += [interval_cell(one.differences[pair][metric]) for metric in METRICS]
        for far in fars:
            points = [(one.verification or {}).get(which) for which in ("old_to_old", pair)]
            row += ["" if found is None else f"{found.at_threshold[far].far:.2g}" for found in points]
        rows.append([*row, one.verdict.title])
    return Table(f"Groups of queries, {pair_name(pair)}, in percent", [*header, "verdict"], rows)


def all_tables(evaluation: Evaluation, verdict: UpgradeVerdict) -> list[Table]:
    """Return every table that has rows, the deciding one first."""
    tables = [
        summary_table(evaluation),
        metric_table(evaluation),
        gain_table(evaluation),
        backfill_table(evaluation),
        flip_table(verdict),
        group_table(evaluation, verdict),
        verification_table(evaluation),
    ]
    return [table for table in tables if table is not None]


def to_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    rule = ["---:" if place and name not in _TEXT else "---" for place, name in enumerate(table.header)]
    rows = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in table.rows]
    lines = [table.header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_rich(table: Table) -> Any:
    """Return a table as a ``rich.table.Table``; needs the ``report`` extra."""
    table_module, box = import_extra("rich.table", "report"), import_extra("rich.box", "report")
    escape_markup = import_extra("rich.markup", "report").escape
    out = table_module.Table(title=table.title, box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for place, column in enumerate(table.header):
        out.add_column(column, justify="right" if place and column not in _TEXT else "left", no_wrap=place > 0)
    for row in table.rows:
        out.add_row(*(escape_markup(cell) for cell in row))
    return out


def to_html(table: Table) -> str:
    """Return a table as HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in table.header)
    body = "".join(f"<tr>{_html_row(row)}</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table><caption><span>{escape(table.title)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def interval_cell(found: BootstrapInterval) -> str:
    """Return a difference and its interval in percentage points."""
    return f"{100 * found.estimate:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _html_row(row: Sequence[str]) -> str:
    first, *others = row
    return f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)


def _gain_cell(found: BootstrapInterval) -> str:
    if found.estimate != found.estimate:
        return "undefined"
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
