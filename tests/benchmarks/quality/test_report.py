"""The report's numbers are those of the cache, and a plot is drawn from them; the subset's checks can fail."""

import pytest

from benchmarks.quality import report as reporting
from benchmarks.quality.cache import Cache
from benchmarks.quality.methods import METHODS
from benchmarks.quality.problems import problem
from benchmarks.quality.search import config, single, trials
from benchmarks.quality.subset import broken

TASKS = ("left", "right", "pixels")


@pytest.fixture
def cache(tmp_path):
    p = problem("digits")
    found = Cache(tmp_path / "runs.jsonl")
    for seed in range(2):
        for method in [*map(single, TASKS), "sum", "cone", "default"]:
            width, score = (1, 80.0) if method.startswith("single") else (3, 60.0 + 4 * (method == "cone") + seed)
            for trial in trials(method):
                looks = {"valid": [[score] * width], "test": [[score] * width]}
                found.append(config(p, method, trial, seed), {**looks, "gradient": 0.1, "update": 0.2, "cpu_ms": 1.5})
    found.append({**config(p, "pcd", trials("pcd")[0], 0)}, {"valid": [], "test": [], "error": "ValueError: x"})
    return found


def test_report(cache, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    monkeypatch.setattr(reporting, "PICTURES", tmp_path / "quality")
    text = reporting.report(cache, ["digits"], 5)
    # Single-task 80; the sum 60 and 61: Δm 25 and 23.75; cone 64 and 65: 5 points better with either seed.
    sum_row = next(line for line in text.splitlines() if line.startswith("| plain sum | 60.5 ± 0.7"))
    assert "| 24.4 ± 0.9 | 24.4 ± 0.9 | 0 |" in sum_row
    cone_row = next(line for line in text.splitlines() if line.startswith("| cone | 64.5 ± 0.7"))
    assert "| 19.4 ± 0.9 | 19.4 ± 0.9 | **-5.0 ± 0.0** | 1.0 | 10.0 ± 0.0 | 20.0 ± 0.0 | 1.5 | 2 |" in cone_row
    assert "- digits, pcd, rate 0.003, decay 0.01, seed 0: ValueError: x" in text
    assert next(iter(tmp_path.glob("quality-*.md"))).read_text(encoding="utf-8") in text
    assert {path.name for path in (tmp_path / "quality").glob("*.png")} == {
        "pareto-digits.png",
        "against-sum-digits.png",
        "conflicts.png",
    }


def test_an_empty_cache_is_reported_as_such(tmp_path):
    assert "no complete search" in reporting.report(Cache(tmp_path / "none.jsonl"), ["digits"], 5)


def entry(**changed):
    usual = {"config": {"problem": "digits"}, "valid": [[1.0]], "test": [[1.0]], "gradient": 0.0, "update": 0.0}
    return {**usual, **changed}


@pytest.mark.parametrize(
    ("method", "run", "word"),
    [
        ("default", entry(update=0.1), "guarantee is broken"),
        ("cone", entry(gradient=0.1), "conflict-free"),
        ("sum", entry(update=0.0), "never conflicts"),
        ("norm", entry(test=[[None]]), "not finite"),
        ("norm", {"config": {}, "valid": [], "test": [], "error": "ValueError: y"}, "ValueError: y"),
    ],
)
def test_the_checks_of_the_subset_can_fail(method, run, word):
    assert method in METHODS
    (what,) = broken(method, run, ordered=False)
    assert word in what


def test_the_checks_of_the_subset_can_pass():
    assert broken("default", entry(), ordered=False) == []
    assert broken("sum", entry(update=0.9), ordered=False) == []
