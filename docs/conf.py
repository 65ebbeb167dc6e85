"""Sphinx builds the site from this folder: ``make docs``, into docs/_build.

It needs no network: formulas become MathML, figures are SVG in the page. Two things are made while it builds: the list
of all public names in api/index, and ``llms.txt`` at the root of the site, an index of all pages with a line on each.
"""

import importlib
import sys
from html import escape
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
from pml_compat import __version__  # noqa: E402

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

myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
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
    found = convert(formula, display=display)
    translator.body.append(f'<div class="formula">{found}</div>' if display == "block" else found)
    raise SkipNode


def _public_names(app, docname, source):
    """Put tables of every public name into api/index, a package at a time, in the order of its pages."""
    if docname != "api/index":
        return
    for page in sorted((DOCS / "api").glob("*.md")):
        if page.stem in ("index", "command_line"):
            continue
        package = page.stem if page.stem == "pml_compat" else f"pml_compat.{page.stem}"
        module = importlib.import_module(package)
        rows = "\n   ".join(module.__all__)
        first_line = module.__doc__.partition("\n")[0]
        table = f".. currentmodule:: {package}\n\n.. autosummary::\n\n   {rows}"
        source[0] += f"\n## {package}\n\n{first_line}\n\n```{{eval-rst}}\n{table}\n```\n"


def _llms_txt(app, error):
    """Write the index of all pages: title, address and description."""
    if error or app.builder.format != "html":
        return
    pages = app.env.found_docs - {"index"}
    order = {name: place for place, name in enumerate(_in_order(app.env, "index"))}
    lines = [f"# pml_compat {release}", "", f"> {_description(app, 'index')}", "", "## Pages", ""]
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
    app.connect("source-read", _public_names)
    app.connect("html-page-context", _describe)
    app.connect("build-finished", _llms_txt)
