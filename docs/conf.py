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
release = version = gradsurg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
# The pages of folders that are filled later may not be there yet.
suppress_warnings = ["toc.empty_glob"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# What is not a page (scripts, results) links to nothing in the built site, so such a link is an error.
myst_all_links_external = False

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

make_pages(HERE)
