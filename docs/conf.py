"""How Sphinx builds the documentation: sphinx-build -W --keep-going docs docs/_build/html.

Formulas are plain Unicode, as in the docstrings: MathJax and KaTeX come from a network that a reader behind a firewall
and CI do not have, imgmath needs LaTeX, and nothing here needs more than sums, norms and indices.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

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
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature and the Args say it
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"gradsurg {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}


def readable(app, what, name, obj, options, lines):
    """Let docstrings say |x| and list options, both of which reStructuredText takes for markup of its own."""
    in_code = False
    for k, line in enumerate(lines):
        in_code = bool(line.strip()) and (in_code or line.lstrip().startswith(">>>"))
        if not in_code and not line.lstrip().startswith(".."):
            lines[k] = line.replace("|", r"\|")


def listed(app, what, name, obj, options, lines):
    """Make a bullet list of the options that wrap() describes below **options, before napoleon sees them."""
    begun = None
    for k, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("**options:"):
            begun = indent
        elif begun is not None and line.strip():
            if indent <= begun:
                begun = None
            elif indent == begun + 4:
                lines[k] = f"{line[:indent]}* {line[indent:]}"
            else:
                lines[k] = line[2:]


def setup(app):
    """Register both."""
    app.connect("autodoc-process-docstring", listed, priority=1)
    app.connect("autodoc-process-docstring", readable, priority=900)


make_pages(HERE)
