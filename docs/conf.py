"""How Sphinx builds the documentation: sphinx-build -W --keep-going docs docs/_build/html.

Formulas are rendered by KaTeX in the reader's browser, from files in static/katex that are built into the site, so that
a page loads nothing from another host. Pages write $...$; docstrings write Unicode, which formulas.py turns into LaTeX.
"""

import sys
from pathlib import Path

from docutils.nodes import SkipNode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from formulas import role  # noqa: E402
from made import make_pages  # noqa: E402

import gradsurg  # noqa: E402

project = "gradsurg"
author = "the gradsurg contributors"
copyright = "2026, the gradsurg contributors"  # noqa: A001  # the name Sphinx reads
release = version = gradsurg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "generated/toctrees.md", "generated/cost-*.md", "generated/last-*.md"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_double_inline = True
html_math_renderer = "katex"
autodoc_member_order = "bysource"
default_role = "code"  # in docstrings, `name` is code
autodoc_typehints = "none"  # the signature and the Args say it
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"gradsurg {release}"
html_static_path = ["static"]
html_css_files = ["katex/katex.min.css", "site.css"]
html_js_files = ["katex/katex.min.js", "katex/formulas.js"]
html_theme_options = {"navigation_with_keys": True}


def readable(app, what, name, obj, options, lines):
    """Render the formulas of docstrings, and let these say |x|, which reStructuredText takes for markup of its own."""
    # Stretches of prose and of code in turn: a formula may go on in the next line.
    stretches, in_code = [], None
    for line in lines:
        code = line.lstrip().startswith(">>>") or bool(in_code and line.strip()) or line.lstrip().startswith("..")
        if code is not in_code:
            stretches.append((code, []))
            in_code = code
        stretches[-1][1].append(line)
    lines[:] = []
    for code, stretch in stretches:
        text = "\n".join(stretch)
        lines += (text if code else role(text).replace("|", r"\|")).split("\n")


def inline_formula(translator, node):
    """Write a formula for static/katex/formulas.js."""
    translator.body.append(f'<span class="math">{translator.encode(node.astext())}</span>')
    raise SkipNode


def displayed_formula(translator, node):
    """Write a formula that stands by itself."""
    translator.body.append(f'<div class="math">{translator.encode(node.astext())}</div>')
    raise SkipNode


def setup(app):
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", readable, priority=900)
    app.add_html_math_renderer("katex", (inline_formula, None), (displayed_formula, None))


make_pages(HERE)
