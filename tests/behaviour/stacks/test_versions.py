"""docs/compatibility.md names the versions that CI installs, and each integration has an extra that installs it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([\w-]+) \| ([\d.]+)[^|]*\|([^|]*)\|", PAGE, flags=re.MULTILINE)
LIBRARIES = [row for row in ROWS if row[0] != "Python"]


def test_the_page_has_its_table():
    assert {name for name, *_ in LIBRARIES} >= {"torch", "transformers", "accelerate", "lightning", "pytorch-ignite"}


@pytest.mark.parametrize(("name", "version"), [row[:2] for row in LIBRARIES])
def test_versions_are_those_that_are_installed_in_ci(name, version):
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"{name}=={version}" in pins


@pytest.mark.parametrize(("name", "extra"), [(row[0], row[2]) for row in LIBRARIES if "`" in row[2]])
def test_extras_install_their_library(name, extra):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"][extra.strip("` ")]
    assert any(re.match(rf"{name}\b", requirement) for requirement in wanted)
