"""docs/methods/ says what the docstrings say: python docs/method_pages.py writes it."""

import importlib.util
from pathlib import Path

import pytest

import gradsurg

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("method_pages", DOCS / "method_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_committed_pages_are_what_the_docstrings_make(pages):
    stale = [name for name, text in pages.items() if (DOCS / "methods" / name).read_text(encoding="utf-8") != text]
    assert not stale, "run python docs/method_pages.py"
    by_hand = {"toy.md"}
    assert {path.name for path in (DOCS / "methods").glob("*.md")} - by_hand == {*pages}


def test_every_method_has_a_whole_page(pages):
    for method in gradsurg.methods():
        text = pages[f"{method.name}.md"]
        argument = "surgery" if method.kind == "surgery" else "normalize"
        assert f'`{argument}="{method.name}"`' in text
        for heading in ("### When it fails", "### Example", "### Source"):
            assert heading in text or method.name == "none", (method.name, heading)
        assert method.paper in text
        assert all(f"| `{option}` |" in text for option in method.options)
        assert "|  |\n" not in text, f"{method.name}: an option without a word"
        if method.kind == "surgery":
            assert method.promise in text
