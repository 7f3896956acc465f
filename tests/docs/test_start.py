"""docs/start.md begins with the reader's own case: each in at most ten lines, with a link."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "start.md").read_text(encoding="utf-8")
CASES = re.split(r"^### ", PAGE.split("\n## ")[1], flags=re.MULTILINE)[1:]


def test_five_cases_stand_first():
    assert PAGE.split("\n## ")[1].startswith("Your case\n")
    assert len(CASES) == 5


@pytest.mark.parametrize("case", CASES, ids=[case.splitlines()[0] for case in CASES])
def test_a_case_is_short_and_leads_on(case):
    (code,) = re.findall(r"```python\n(.*?)```", case, flags=re.DOTALL)
    assert 1 <= sum(bool(line.strip()) for line in code.splitlines()) <= 10
    assert "step(optimizer, " in code
    assert re.search(r"\]\([\w/#.-]+\)", case)
