"""Validation chooses, test is only reported; every method gets the same number of trials."""

import math

import pytest

from benchmarks.quality.cache import Cache
from benchmarks.quality.choose import Results
from benchmarks.quality.methods import METHODS, methods_for
from benchmarks.quality.metrics import delta_by_task
from benchmarks.quality.problems import problem
from benchmarks.quality.runner import planned, work
from benchmarks.quality.search import GRID, Trial, config, single, trials, weighted
from benchmarks.quality.summary import gather

TASKS = ("left", "right", "pixels")


def filled(tmp_path, scores, seeds=1):
    """Return results with made-up runs: `scores` gives validation and test of each checkpoint."""
    p = problem("digits")
    cache = Cache(tmp_path / "runs.jsonl")
    for seed in range(seeds):
        for method in [*map(single, TASKS), "sum", "cone"]:
            width = 1 if method.startswith("single") else 3
            for k, trial in enumerate(trials(method)):
                valid, test = scores(method, k, seed)
                looks = {"valid": [[v] * width for v in valid], "test": [[t] * width for t in test]}
                cache.append(config(p, method, trial, seed), {**looks, "gradient": 0.1, "update": 0.2, "cpu_ms": 1.0})
    return Results(cache, ["digits"])


def test_the_best_trial_and_checkpoint_on_validation_are_taken_whatever_test_says(tmp_path):
    def scores(method, k, seed):
        if method.startswith("single"):
            return [50, 100], [10, 100]
        # Trial 3 has the best validation score, at its first checkpoint, and the worst test score.
        return ([95, 60], [40, 99]) if k == 3 else ([80, 90], [98, 99])

    results = filled(tmp_path, scores)
    assert results.trial("digits", "cone") == trials("cone")[3]
    outcome = results.outcome("digits", "cone", 0)
    assert outcome.test == {task: [40] for task in TASKS}
    assert delta_by_task(outcome.relative) == pytest.approx(60)


def test_a_run_that_broke_down_is_never_chosen_and_hides_nothing(tmp_path):
    def scores(method, k, seed):
        if method == "cone":
            return ([None], [None]) if k < 5 else ([10], [10])
        return [50], [50]

    results = filled(tmp_path, scores)
    assert results.trial("digits", "cone") == trials("cone")[5]
    results = filled(tmp_path / "all", lambda method, k, seed: ([None], [None]) if method == "cone" else ([50], [50]))
    assert delta_by_task(results.outcome("digits", "cone", 0).relative) == math.inf


def test_later_seeds_keep_the_choice_of_the_first(tmp_path):
    def scores(method, k, seed):
        best = 2 if seed == 0 else 4
        return ([90], [90 + seed]) if k == best else ([50], [50])

    results = filled(tmp_path, scores, seeds=3)
    assert [results.outcome("digits", "sum", seed).test["left"] for seed in range(3)] == [[90], [50], [50]]
    (summary,) = gather(results.cache, ["digits"], 3)
    assert summary.rows["cone"].against(summary.rows["sum"]) == [0, 0, 0]
    assert summary.ranks == {"sum": 1.5, "cone": 1.5}


def test_nothing_is_concluded_before_a_search_is_complete(tmp_path):
    results = filled(tmp_path, lambda method, k, seed: ([50], [50]))
    assert results.trial("digits", "pcgrad") is None
    assert results.outcome("digits", "pcgrad", 0) is None
    assert results.outcome("digits", "cone", 1) is None
    plan = list(planned(results, ["cone", "pcgrad"], 2))
    assert None in plan  # pcgrad with the second seed waits for its search
    todo = [each for each in plan if each is not None and results.cache.get(each) is None]
    assert {each["method"] for each in todo} == {"pcgrad", "cone", *map(single, TASKS)}


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_have_the_same_number_of_trials(method):
    drawn = weighted(method, TASKS, Trial(0.01, 0.5))
    found = trials(method) + drawn
    assert len(set(found)) == len(found) == len(GRID) * METHODS[method].trials
    assert (METHODS[method].trials == 1) or method == "static_3"
    assert bool(drawn) == METHODS[method].searches_weights
    for trial in drawn:
        assert (trial.rate, trial.decay) == (0.01, 0.5)
        assert sum(trial.weights) == pytest.approx(3, abs=1e-3)


def test_static_weights_are_searched_around_the_best_plain_trial(tmp_path):
    def scores(method, k, seed):
        return ([70 if k == 5 else 50], [50])

    results = filled(tmp_path, scores)
    (p, (plain, complete)) = problem("digits"), results.trials("digits", "static")
    assert complete
    assert [t.weights for t in plain] == [None] * 3 + [w.weights for w in plain[3:]]
    assert [(t.rate, t.decay) for t in plain[:3]] == [(0.003, 0.01), (0.01, 0.01), (0.03, 0.5)]
    assert {(t.rate, t.decay) for t in plain[3:]} == {GRID[5]}
    assert results.trial("digits", "static") is None  # the drawn ones have not run
    for k, trial in enumerate(plain[3:]):
        looks = {"valid": [[60 + 10 * k] * 3], "test": [[1] * 3], "gradient": 0.0, "update": 0.0}
        results.cache.append(config(p, "static", trial, 0), looks)
    assert results.trial("digits", "static") == plain[5]


def test_rows_with_a_primary_task_only_where_there_is_one():
    assert {m.group for m in methods_for(problem("digits"))} == {m.group for m in METHODS.values()} - {"primary"}
    assert len(methods_for(problem("few_labels"))) == len(METHODS)


def test_work_is_done_once_and_resumed(tmp_path, capsys):
    cache = Cache(tmp_path / "runs.jsonl")
    results = Results(cache, ["tables"], GRID[:1])
    work(results, ["default"], seeds=1)
    count = len(cache)
    assert count == len(problem("tables").judged) + 1
    before = cache.path.read_bytes()
    again = Results(Cache(cache.path), ["tables"], GRID[:1])
    work(again, ["default"], seeds=1)
    assert cache.path.read_bytes() == before
    assert again.outcome("tables", "default", 0).entry["update"] == 0
