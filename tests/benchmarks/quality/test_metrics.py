"""Δm and mean rank against numbers that were published, and against the definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.metrics import changes, delta_by_metric, delta_by_task, half_width, mean_ranks, spread

# NYUv2, Navon et al. 2022 (Nash-MTL), Table 2: mIoU, pixel accuracy; absolute, relative error; mean and median angle,
# shares within 11.25°, 22.5°, 30°. By metrics the plain sum loses to single-task runs, by tasks it wins.
HIGHER = {"segment": [True, True], "depth": [False, False], "normals": [False, False, True, True, True]}
STL = (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15)
PUBLISHED = {
    "sum": ((39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08), 5.59, -0.88),
    "mgda": ((30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36), 1.38, None),
    "pcgrad": ((38.06, 64.64, 0.5550, 0.2325, 27.41, 22.80, 23.86, 49.83, 63.14), 3.97, -1.11),
    "cagrad": ((39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58), 0.20, None),
    "nash_mtl": ((40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15), -4.04, -7.65),
}


def by_task(numbers):
    return {"segment": numbers[:2], "depth": numbers[2:4], "normals": numbers[4:]}


@pytest.mark.parametrize("method", PUBLISHED)
def test_delta_of_published_rows(method):
    numbers, metric, task = PUBLISHED[method]
    relative = changes(by_task(numbers), by_task(STL), HIGHER)
    assert delta_by_metric(relative) == pytest.approx(metric, abs=0.011)
    if task is not None:
        assert delta_by_task(relative) == pytest.approx(task, abs=0.011)


def test_ranks_of_published_rows():
    relative = {m: changes(by_task(row[0]), by_task(STL), HIGHER) for m, row in PUBLISHED.items()}
    ranks = mean_ranks(relative)
    assert min(ranks, key=ranks.get) == "nash_mtl"
    assert sum(ranks.values()) == pytest.approx(5 * 3)


def test_ties_share_their_rank():
    assert mean_ranks({"a": {"t": [1.0]}, "b": {"t": [1.0]}, "c": {"t": [2.0]}}) == {"a": 1.5, "b": 1.5, "c": 3.0}


scores = st.lists(st.floats(0.1, 100), min_size=1, max_size=4)


@given(scores)
def test_the_base_has_delta_zero_and_better_is_negative(values):
    base, up, down = {"t": values}, {"t": [True] * len(values)}, {"t": [False] * len(values)}
    assert delta_by_task(changes(base, base, up)) == 0
    more = {"t": [v * 1.5 for v in values]}
    assert delta_by_task(changes(more, base, up)) == pytest.approx(-50)
    assert delta_by_metric(changes(more, base, down)) == pytest.approx(50)


def test_a_missing_number_is_the_worst():
    relative = changes({"t": [None, 2.0]}, {"t": [1.0, 2.0]}, {"t": [True, True]})
    assert delta_by_task(relative) == math.inf
    assert mean_ranks({"a": relative, "b": {"t": [5.0, 5.0]}}) == {"a": 1.5, "b": 1.5}
    assert spread([1.0, math.inf])[0] == math.inf


def test_confidence_interval_of_a_known_sample():
    # Of 1 … 5: deviation 1.5811, t of 4 degrees of freedom 2.776.
    assert half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-4)
    assert half_width([1.0]) == math.inf
