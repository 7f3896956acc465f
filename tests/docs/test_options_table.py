"""The table of options in README.md is that of wrap()'s signature: the same names and defaults, in the same order."""

import inspect
import re
from pathlib import Path

import gradsurg

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_readme_lists_the_options_of_wrap():
    section = README.partition("## Options of `wrap`")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE)
    _, *options = inspect.signature(gradsurg.wrap).parameters.values()
    assert [(name, eval(default)) for name, default in listed] == [(each.name, each.default) for each in options]


def test_wrap_describes_each_option_in_the_order_of_its_signature():
    described = re.findall(r"^    (\w+): ", inspect.getdoc(gradsurg.wrap).partition("Returns:")[0], flags=re.MULTILINE)
    assert described == [*inspect.signature(gradsurg.wrap).parameters]
