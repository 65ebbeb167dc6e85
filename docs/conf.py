"""Sphinx builds the site from this folder: ``make docs``, into docs/_build.

It needs no network: formulas become MathML, figures are SVG in the page. Made while it builds are the list of all
public names in api/index, the commands' help, the count of runs in results, and ``llms.txt`` at the root of the site,
an index of all pages with a line on each.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import sys
from html import escape
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
from pml_compat import __version__  # noqa: E402
from pml_compat.cli.main import main  # noqa: E402

os.environ["COLUMNS"] = "88"  # of the commands' help

project = "pml_compat"
author = copyright = "The pml_compat developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "figures"]
html_theme = "furo"
html_title = f"pml_compat {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# What PML calls inside its losses, the same in each.
_PLUMBING = (
    "check_given, compute_loss, forward, get_default_distance, get_default_reducer, look_at_labels, needs_labels, "
    "needs_ref_emb, training"
)
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": _PLUMBING}
autodoc_typehints = "none"  # the docstrings say what each argument is, with its range
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Reference"]
nitpick_ignore_regex = [
    # Links to these would need a network.
    ("py:.*", r"(torch|pytorch_metric_learning|collections|numpy)\..*"),
    # Private names, which have no page.
    ("py:.*", r"GradientBalance|CrossModelMiner|pml_compat\.accuracy\.(rank_metrics|items)"),
    ("py:class", "MixedGallery"),
]


def _mathml(translator, node, display):
    formula = node.astext()
    if "&" in formula and r"\begin" not in formula:
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    # A bar that may stretch does so on one side alone.
    found = convert(formula, display=display).replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')
    translator.body.append(f'<div class="formula">{found}</div>' if display == "block" else found)
    raise SkipNode


def _fill(app, docname, source):
    """Write into a page what is made from the code or from another page."""
    if docname == "api/index":
        source[0] += _public_names()
    elif docname == "command_line":
        source[0] += "".join(_help_of(command) for command in ("evaluate", "migrate", "audit", "demo"))
    elif docname == "results":
        source[0] = source[0].replace("<!-- counted: conf.py writes the table here -->", _how_often())


def _public_names():
    """Return tables of every public name, a package at a time, in the order of its pages."""
    found = ""
    for page in sorted((DOCS / "api").glob("*.md")):
        if page.stem == "index":
            continue
        package = page.stem if page.stem == "pml_compat" else f"pml_compat.{page.stem}"
        module = importlib.import_module(package)
        rows = "\n   ".join(module.__all__)
        first_line = module.__doc__.partition("\n")[0]
        table = f".. currentmodule:: {package}\n\n.. autosummary::\n   :nosignatures:\n\n   {rows}"
        found += f"\n## {package}\n\n{first_line}\n\n```{{eval-rst}}\n{table}\n```\n"
    return found


def _help_of(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"\n## pml-compat {command}\n\n```text\n{printed.getvalue()}```\n"


def _how_often():
    """Return a table of the runs in defaults.md in which each method met the criterion."""
    met = {}
    for line in (DOCS / "defaults.md").read_text().splitlines():
        if line.startswith("| ") and (runs := re.findall(r"\((\d+) of (\d+)\)", line)):
            held, all_runs = met.setdefault(line.split("|")[1].strip(), [0, 0])
            met[line.split("|")[1].strip()] = [
                held + sum(int(a) for a, _ in runs),
                all_runs + sum(int(b) for _, b in runs),
            ]
    rows = [f"| {name} | {held} of {runs} | {runs - held} |" for name, (held, runs) in met.items()]
    held, runs = (sum(column) for column in zip(*met.values(), strict=True))
    return "\n".join(
        ["| method | held | no |", "| --- | ---: | ---: |", *rows, f"| **all** | {held} of {runs} | {runs - held} |"]
    )


def _llms_txt(app, error):
    """Write the index of all pages: title, address and description."""
    if error or app.builder.format != "html":
        return
    pages = app.env.found_docs - {"index"}
    order = {name: place for place, name in enumerate(_in_order(app.env, "index"))}
    lines = [
        f"# pml_compat {release}",
        "",
        f"> {_description(app, 'index')}",
        "",
        "The Markdown of a page: _sources/PAGE.md.txt.",
        "",
        "## Pages",
        "",
    ]
    for name in sorted(pages, key=lambda page: (order.get(page, len(order)), page)):
        title, address = app.env.titles[name].astext(), app.builder.get_target_uri(name)
        lines.append(f"- [{title}]({address}): {_description(app, name)}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _in_order(env, name):
    yield name
    for child in env.toctree_includes.get(name, []):
        yield from _in_order(env, child)


def _description(app, name):
    return app.env.metadata[name].get("description", "")


def _without_a_page(app, env, node, contnode):
    """Let docstrings name what is private: what is defined somewhere in the package is no dead link, and no link."""
    return contnode if node["reftarget"].rpartition(".")[2] in _defined() else None


@functools.cache
def _defined():
    names = set()
    for path in (DOCS.parent / "pml_compat").rglob("*.py"):
        definitions = (ast.ClassDef, ast.FunctionDef)
        names |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, definitions)}
        names.add(path.stem)
    return names


def _describe(app, name, template, context, doctree):
    """Give a page's description to search engines."""
    if description := app.env.metadata.get(name, {}).get("description"):
        context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{escape(description)}">'


def setup(app):
    """Add the renderer of formulas and what is made while the site is built."""
    app.add_html_math_renderer(
        "mathml",
        (lambda translator, node: _mathml(translator, node, "inline"), None),
        (lambda translator, node: _mathml(translator, node, "block"), None),
    )
    app.connect("source-read", _fill)
    app.connect("html-page-context", _describe)
    app.connect("missing-reference", _without_a_page)
    app.connect("build-finished", _llms_txt)
