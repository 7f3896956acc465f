""".ci/links.py refuses links that lead nowhere, and whatever a page would load from another host."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / ".ci" / "links.py"


@pytest.fixture(scope="module")
def links():
    spec = importlib.util.spec_from_file_location("links", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problems(links, folder, body, style=""):
    (folder / "index.html").write_text(f'<html><body id="top">{body}</body></html>', encoding="utf-8")
    (folder / "site.css").write_text(style, encoding="utf-8")
    return links.main(folder)


@pytest.mark.parametrize(
    "body",
    [
        '<a href="#top">up</a>',
        '<a href="https://example.org/">elsewhere</a>',
        '<link rel="stylesheet" href="site.css">',
        '<link rel="canonical" href="https://example.org/">',
        '<style>p { background: url("data:image/png;base64,") }</style>',
    ],
)
def test_links_inside_and_to_other_hosts_pass(links, tmp_path, body):
    assert problems(links, tmp_path, body, 'p { background: url("site.css") }') == 0


@pytest.mark.parametrize(
    "body",
    [
        '<a href="#nowhere">x</a>',
        '<a href="missing.html">x</a>',
        '<script src="https://example.org/x.js"></script>',
        '<script src="//example.org/x.js"></script>',
        '<img src="http://example.org/x.png">',
        '<link rel="stylesheet" href="https://example.org/x.css">',
        '<link rel="preconnect" href="https://example.org">',
        "<style>@import 'https://example.org/x.css';</style>",
        '<p style="background: url(https://example.org/x.png)">x</p>',
    ],
)
def test_what_leads_nowhere_or_loads_from_another_host_is_refused(links, tmp_path, body):
    assert problems(links, tmp_path, body) == 1


def test_a_font_of_another_host_is_refused(links, tmp_path):
    assert problems(links, tmp_path, "", "@font-face { src: url(https://example.org/x.woff2) }") == 1
