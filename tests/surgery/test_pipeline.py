"""The order of the stages, and what the pipeline itself adds: the common factor, stationarity, the guarantee."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import Norm, Normalizer, Unscaled, resolve_normalizer
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import Sum, Surgery, UPGrad, resolve_surgery
from gradsurg.surgery.pipeline import Pipeline, check_mapping
from tests.matrices import FAMILIES, draw

P = 10
families = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 10_000)


def problem_of(J, preferences=None, losses=None):
    m = len(J)
    ones = torch.ones(m, dtype=torch.float64) if preferences is None else preferences
    return Problem(J @ J.T, ones, tuple(map(str, range(m))), losses)


class Recorder(Surgery):
    """A surgery that remembers what it was asked."""

    name, paper, promise = "recorder", "-", "-"

    def __init__(self):
        self.asked = []

    def weights(self, problem, state):
        self.asked.append(problem)
        return Sum().weights(problem, state)


class Fixed(Normalizer):
    """Scales that are given."""

    name, paper = "fixed", "-"

    def __init__(self, *scales):
        self.fixed = torch.tensor(scales, dtype=torch.float64)

    def scales(self, problem, state):
        return self.fixed, {"calls": state.get("calls", 0) + 1}


@given(seed=seeds)
def test_normalisation_comes_before_surgery(seed):
    """Surgery sees rows of equal length, their mean kept, and its weights are carried back to the raw rows."""
    J = draw("random", 4, P, seed) * torch.tensor([[1e-3], [1.0], [1e3], [10.0]], dtype=torch.float64)
    recorder = Recorder()
    direction = Pipeline(Norm(), recorder).direction(problem_of(J), {})
    (seen,) = recorder.asked
    norms = J.norm(dim=1)
    assert (seen.norms / norms.mean() - 1).abs().max() < 1e-12
    scaled = J * direction.scales[:, None]
    assert (seen.gramian - scaled @ scaled.T).abs().max() < 1e-12 * float(norms.mean()) ** 2
    assert (direction.weights @ J - scaled.sum(0)).abs().max() < 1e-12 * float(norms.mean())


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds, auxiliary=st.sampled_from(["protect", "help"]), surgery=st.sampled_from(["sum", "cone", "upgrad"]))
def test_priority_comes_after_normalisation_and_surgery(family, seed, auxiliary, surgery):
    """normalize="norm" with levels is the same as levels on rows that were normalised by hand."""
    J = draw(family, 4, P, seed)
    norms = J.norm(dim=1)
    alive = norms > 0
    by_hand = torch.where(alive, norms.sum() / alive.sum() / norms.where(alive, 1.0), 0.0)
    rows = J * by_hand[:, None]
    options = {"surgery": surgery, "primary": [[0, 1], [2]], "auxiliary": auxiliary}
    there_weights = gradsurg.weights(rows @ rows.T, **options)
    here, there = gradsurg.weights(J @ J.T, normalize="norm", **options) @ J, there_weights @ rows
    lengths = float(there_weights.abs() @ rows.norm(dim=1))
    # Two ways of rounding the same rows: ‖u‖² is known to 4e-16 of lengths², u to that over ‖u‖.
    assert (here - there).norm() <= 1e-9 * lengths + 16 * 4e-16 * lengths**2 / (there.norm() + 1e-300)


def test_surgery_works_inside_a_level_before_the_levels_meet():
    recorder = Recorder()
    J = draw("random", 4, P, 0)
    preferences = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    losses = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    pipeline = Pipeline(Unscaled(), recorder, levels=(("2",), ("0", "3")), auxiliary="help")
    pipeline.direction(problem_of(J, preferences, losses), {})
    assert [part.tasks for part in recorder.asked] == [("2",), ("0", "3"), ("1",)]
    assert [part.preferences.tolist() for part in recorder.asked] == [[3.0], [1.0, 4.0], [2.0]]
    assert [part.losses.tolist() for part in recorder.asked] == [[7.0], [5.0, 8.0], [6.0]]


@given(seed=seeds, r=st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_preferences_are_weights_of_the_sum(seed, r):
    """t = Σ r_i s_i g_i: without a conflict, u is t itself, to the bit."""
    J = draw("random", 4, P, seed).abs()
    r = torch.tensor(r, dtype=torch.float64)
    assert torch.equal(gradsurg.weights(J @ J.T, "cone", preferences=r), r)
    u = gradsurg.weights(J @ J.T, "cone", normalize="norm", preferences=r) @ J
    norms = J.norm(dim=1)
    expected = r @ (J * (norms.mean() / norms)[:, None])
    assert (u - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_guarantee_comes_last():
    """Three primaries under the plain sum hurt the first one; what is added for the levels does not help it."""
    J = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [-1.0, 3.0], [0.0, 5.0]], dtype=torch.float64)
    options = {"surgery": "sum", "primary": [[0, 1, 2]], "normalize": "norm"}
    assert (J @ gradsurg.combine(J, **options))[0] < -0.1
    assert (J @ gradsurg.combine(J, guarantee="gradient", **options)).min() >= -1e-12


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds, m=st.integers(2, 6), name=st.sampled_from(["none", "norm"]))
def test_the_gradient_guarantee_is_the_nearest_direction_without_conflict(family, seed, m, name):
    """Of the sum it is the cone, whatever is in between."""
    J = draw(family, m, P, seed)
    weights = gradsurg.weights(J @ J.T, "cone", normalize=name)
    u = gradsurg.weights(J @ J.T, "sum", normalize=name, guarantee="gradient") @ J
    lengths = float(weights.abs() @ J.norm(dim=1))
    assert (u - weights @ J).norm() <= 1e-9 * lengths


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_a_common_factor_of_the_scales_is_of_no_consequence(factor):
    J = draw("random", 3, P, 1)
    one = Pipeline(Fixed(1.0, 2.0, 4.0), Sum()).direction(problem_of(J), {})
    other = Pipeline(Fixed(factor, 2 * factor, 4 * factor), Sum()).direction(problem_of(J), {})
    assert (one.weights / other.weights - 1).abs().max() < 1e-14
    norms = J.norm(dim=1)
    assert float((one.scales * norms).sum()) == pytest.approx(float(norms.sum()), rel=1e-14)


def test_zero_rows_get_scale_zero_whatever_the_normaliser_says():
    J = draw("random", 3, P, 1)
    J[1] = 0
    direction = Pipeline(Fixed(1.0, 5.0, 3.0), Sum()).direction(problem_of(J), {})
    assert direction.scales[1] == 0
    assert direction.weights[1] == 0
    nothing = Pipeline(Fixed(1.0, 5.0, 3.0), UPGrad()).direction(problem_of(J * 0), {})
    assert nothing.weights.tolist() == [0.0, 0.0, 0.0]
    assert bool(nothing.stationary)


def test_state_goes_in_and_out_by_stage():
    class Counter(Surgery):
        name, paper, promise = "counter", "-", "-"

        def weights(self, problem, state):
            return problem.preferences.clone(), {"seen": [*state.get("seen", []), list(problem.tasks)]}

    J = draw("random", 3, P, 1)
    flat = Pipeline(Fixed(1.0, 1.0, 1.0), Counter())
    state = flat.direction(problem_of(J), {}).state
    state = flat.direction(problem_of(J), state).state
    assert state == {"normalize": {"calls": 2}, "surgery": {"seen": [["0", "1", "2"]] * 2}}
    levels = Pipeline(Unscaled(), Counter(), levels=(("1",),), auxiliary="help")
    state = levels.direction(problem_of(J), {}).state
    before = repr(state)
    following = levels.direction(problem_of(J), state).state
    assert following["surgery"] == {"1": {"seen": [["1"]] * 2}, "0+2": {"seen": [["0", "2"]] * 2}}
    assert repr(state) == before


@pytest.mark.parametrize("surgery", ["cone", "upgrad", "mgda", "sum"])
@pytest.mark.parametrize("normalize", ["none", "norm"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_stationary_point_is_found_and_said(surgery, normalize, scale):
    """Three vectors at 120°: some convex combination is zero, so u is 0 and not rounding."""
    angle = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
    J = torch.stack([angle.cos(), angle.sin()], dim=1) * scale
    pipeline = Pipeline(resolve_normalizer(normalize), resolve_surgery(surgery), guarantee="gradient")
    direction = pipeline.direction(problem_of(J), {})
    assert bool(direction.stationary)
    assert direction.weights.tolist() == [0.0, 0.0, 0.0]


@given(seed=seeds)
def test_next_to_a_stationary_point_nothing_is_said(seed):
    """Opened by 1e-5, the same three vectors leave a direction that improves all of them."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(3) * 2 * torch.pi / 3
    J = torch.stack([angle.cos(), angle.sin(), torch.full((3,), 1e-5, dtype=torch.float64)], dim=1)
    direction = Pipeline(Unscaled(), UPGrad()).direction(problem_of(J), {})
    u = direction.weights @ J
    assert not bool(direction.stationary)
    assert (J @ u > 0).all()
    assert float(direction.cancellation) > 1e3, "most of three unit vectors cancels in 1e-5"
    assert float(u[2] / u.norm()) == pytest.approx(1.0, abs=1e-5)


def test_stationarity_is_told_block_by_block():
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    G = torch.stack([opposite, torch.eye(2, dtype=torch.float64)])
    problem = Problem(G, torch.ones(2, dtype=torch.float64), ("a", "b"))
    direction = Pipeline(Unscaled(), UPGrad()).direction(problem, {})
    assert direction.stationary.tolist() == [True, False]
    assert direction.weights.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_without_a_promise_nothing_is_set_to_zero():
    """The sum of opposite gradients is 0 by itself; its weights stay those of the sum."""
    G = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    direction = Pipeline(Unscaled(), Sum()).direction(Problem(G, torch.ones(2, dtype=torch.float64), ("a", "b")), {})
    assert direction.weights.tolist() == [1.0, 1.0]
    assert not bool(direction.stationary)


@pytest.mark.parametrize("normalize", ["none", "norm"])
@pytest.mark.parametrize("guarantee", ["none", "gradient"])
@families
def test_the_short_way_is_the_long_way(family, guarantee, normalize):
    """`Pipeline.weights`, without state and settling where it can, equals `direction`."""
    for surgery in ("sum", "cone", "upgrad", "mgda"):
        pipeline = Pipeline(resolve_normalizer(normalize), resolve_surgery(surgery), guarantee=guarantee)
        for seed in range(5):
            problem = problem_of(draw(family, 4, P, seed))
            assert torch.equal(pipeline.weights(problem), pipeline.direction(problem, {}).weights)


@pytest.mark.parametrize("normalize", ["none", "norm"])
def test_batch_is_one_by_one(normalize):
    J = torch.stack([draw(family, 4, P, 2) for family in ("random", "opposite", "zeros", "surrounding")])
    G = J @ J.mT
    pipeline = Pipeline(resolve_normalizer(normalize), UPGrad(), guarantee="gradient")
    ones = torch.ones(4, dtype=torch.float64)
    together = pipeline.direction(Problem(G, ones, tuple("abcd")), {})
    for i in range(4):
        alone = pipeline.direction(Problem(G[i], ones, tuple("abcd")), {})
        assert bool(together.stationary[i]) == bool(alone.stationary)
        assert ((together.weights[i] - alone.weights) @ J[i]).abs().max() <= 1e-9
        assert (together.scales[i] - alone.scales).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"preferences=\[1.0\]: pass a dict from task name to number"),
        ({"a": 0.0}, r"preferences\['a'\]=0.0: must be positive and finite"),
        ({"a": -1}, "must be positive"),
        ({"a": float("nan")}, "must be positive"),
        ({"a": float("inf")}, "must be positive and finite"),
    ],
)
def test_mappings_are_checked(value, message):
    with pytest.raises(ValueError, match=message):
        check_mapping("preferences", value)
    assert check_mapping("preferences", {"a": 2}) == {"a": 2.0}
    assert check_mapping("preferences", None) == {}
