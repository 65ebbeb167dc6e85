"""An evaluation as one HTML page that needs nothing else: pictures inline, light and dark, for a screen of any size."""

from __future__ import annotations

from html import escape

from ..upgrade.evaluation import Evaluation, criterion_in_words
from ..upgrade.verdict import UpgradeVerdict
from .evaluation_plots import draw_backfill, draw_cmc, draw_flips, draw_matrix
from .evaluation_table import all_tables, to_html
from .markdown_page import details_in_words

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f5f6f8; --ink: #1d2129; --soft: #5b6470;
  --line: #d9dde3; --good: #2e8b57; --mixed: #b7791f; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --card: #1e2229; --ink: #e6e9ee; --soft: #a0a9b6;
  --line: #363c46; --good: #5cc28b; --mixed: #e0aa4a; --bad: #ef7c6d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 68rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.2rem 0; padding: 1rem 1.2rem; background: var(--card); border-radius: .5rem;
  border-left: .4rem solid var(--soft); }
.verdict h2 { margin: 0 0 .3rem; font-size: 1.4rem; } .verdict h3 { font-size: 1rem; margin: .9rem 0 0; }
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.good { border-color: var(--good); } .mixed { border-color: var(--mixed); } .bad { border-color: var(--bad); }
.figures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: .5rem; }
figure h3 { margin: 0 0 .4rem; font-size: 1rem; } figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; } figcaption { margin-top: .4rem; }
.wide { overflow-x: auto; margin: 1rem 0 1.6rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; line-height: 20px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
caption span { display: inline-block; max-width: calc(100vw - 2rem); position: sticky; left: 0; }
th, td { padding: 5px 11px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--ground); }
tbody th:first-child { max-width: min(24rem, 50vw); white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; } footer { margin-top: 2.5rem; }
"""
_CLASSES = {
    "swap_now": "good",
    "swap_with_a_new_threshold": "mixed",
    "swap_with_transformed_gallery": "good",
    "blend_queries": "good",
    "search_in_two_stages": "good",
    "not_enough_queries": "mixed",
    "backfill_first": "mixed",
    "do_not_upgrade": "bad",
}


def html_page(evaluation: Evaluation, verdict: UpgradeVerdict, title: str) -> str:
    """Return the page.

    Args:
        evaluation: what was measured.
        verdict: its verdict, which stands on top.
        title: the page's heading.
    """
    first, *others = all_tables(evaluation, verdict)
    figures = "\n".join(_figures(evaluation, verdict))
    tables = "\n".join(to_html(table) for table in others)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: {escape(verdict.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(details_in_words(evaluation))}</p>
</header>
<main>
{_verdict_card(verdict)}
{to_html(first)}
<section class="figures">
{figures}
</section>
<h2>In numbers</h2>
{tables}
{_criterion(evaluation)}
{_list("h2", "About the input", evaluation.notes)}
</main>
<footer>Names are query model/gallery. A query counts where the gallery has an item of its label; an item is left out of
its own ranking where the input tells which it is. Intervals come from 2,000 resamples, paired, of the classes where
labels repeat, else of the queries; they do not cover another gallery or another training run. The verdict is made of
these numbers; it is not validated against what an upgrade did to a service. The same numbers are in metrics.json.
</footer>
</body>
</html>
"""


def _verdict_card(verdict: UpgradeVerdict) -> str:
    kind = _CLASSES.get(verdict.outcome or "", "")
    if kind == "good" and not verdict.certain:
        kind = "mixed"
    return f"""<section class="verdict {kind}">
<h2>{escape(verdict.title)}</h2>
<p>{escape(verdict.summary)}</p>
{_list("h3", "Why", verdict.reasons)}
{_list("h3", "Watch out", verdict.warnings)}
{_list("h3", "To say more", verdict.missing)}
</section>"""


def _list(level: str, heading: str, sentences: list[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<{level}>{heading}</{level}><ul>{items}</ul>"


def _figures(evaluation: Evaluation, verdict: UpgradeVerdict) -> list[str]:
    out = []
    if len(evaluation.pairs) > 1:
        text = "Percent. The row of the new queries is what an upgrade changes."
        out.append(_figure("Every query model on every gallery", draw_matrix(evaluation), text))
    text = "CMC: the share of queries with an item of their label among the first k."
    out.append(_figure("How soon a right item comes", draw_cmc(evaluation), text))
    if evaluation.backfill:
        shade = " Shaded: the 95% interval of the difference to old/old." if evaluation.differences else ""
        out.append(
            _figure(
                "While the gallery is re-embedded",
                draw_backfill(evaluation, verdict),
                f"New queries on a gallery of old and new vectors, replaced in random order.{shade}",
            )
        )
    if verdict.flips is not None and verdict.flips.worst(1):
        out.append(
            _figure(
                "Where the upgrade breaks what works",
                draw_flips(verdict),
                f"Queries whose first find is right today and would be wrong, by class, the worst first: "
                f"{verdict.flips.rate:.1%} of all.",
            )
        )
    return out


def _figure(heading: str, svg: str, caption: str) -> str:
    return f"<figure><h3>{heading}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def _criterion(evaluation: Evaluation) -> str:
    return f"<p>{escape(criterion_in_words(evaluation))}</p>" if evaluation.criterion is not None else ""
