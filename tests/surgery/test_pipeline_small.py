"""The usual step in Python floats against the pipeline in torch, which does everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import Norm, RandomWeights, Unscaled
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.tolerances import CANCELLATION_GRAMIAN, ROUNDING_EXACT
from gradsurg.surgery import Cone, Sum, UPGrad
from gradsurg.surgery.pipeline import Pipeline
from gradsurg.surgery.pipeline_small import all_finite, applies, norms_of
from tests.matrices import FAMILIES, draw


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guarantee", ["none", "gradient"])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 9),
    normalizer=st.sampled_from([Norm(), Unscaled()]),
    surgery=st.sampled_from([Cone(), Sum()]),
)
def test_is_the_pipeline(family, guarantee, seed, m, normalizer, surgery):
    J = draw(family, m, 12, seed)
    pipeline = Pipeline(normalizer, surgery, guarantee=guarantee)
    preferences = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    problem = Problem((J @ J.T).unsqueeze(0), preferences, tuple(map(str, range(m))))
    assert applies(problem.gramian, normalizer, surgery)
    quick = pipeline.direction(problem, {})
    slow = pipeline._general(problem, {}, ROUNDING_EXACT)
    assert quick.weights.shape == slow.weights.shape
    assert quick.state == slow.state
    torch.testing.assert_close(quick.scales, slow.scales, rtol=1e-12, atol=0)
    if bool(slow.cancellation < CANCELLATION_GRAMIAN):  # beyond, rounding decides, and the two round differently
        u, v = (each.weights @ J for each in (quick, slow))
        assert bool(quick.stationary) == bool(slow.stationary)
        torch.testing.assert_close(u, v, rtol=0, atol=1e-8 * float(v.norm()))
        torch.testing.assert_close(quick.cancellation, slow.cancellation, rtol=1e-6, atol=0)


def test_does_only_what_it_knows():
    one = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    assert applies(one, Norm(), Cone())
    assert not applies(one.expand(3, 2, 2), Norm(), Cone())
    assert not applies(one[0], Norm(), Cone())
    assert not applies(one, Norm(smoothing=0.5), Cone())
    assert not applies(one, RandomWeights(), Cone())
    assert not applies(one, Norm(), UPGrad())
    assert not applies(torch.eye(40, dtype=torch.float64).unsqueeze(0), Norm(), Cone())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 20, 20)])
@pytest.mark.parametrize("number", [1e308, float("nan"), float("inf"), -float("inf")])
def test_finite_is_what_torch_calls_so(shape, number):
    gramian = torch.full(shape, 1e308, dtype=torch.float64)  # whose sum is not finite
    gramian[-1, 0, -1] = number
    assert all_finite(gramian) == bool(torch.isfinite(gramian).all())


def test_norms_are_those_of_torch():
    G = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert bool((G.diagonal() < 0).any())  # as rounding leaves a zero gradient
    assert norms_of(G.tolist()) == G.diagonal().clamp(min=0).sqrt().tolist()


def test_only_methods_that_it_knows_go_without_losses_and_random_numbers():
    asked = []

    class Asking(Cone):
        def weights(self, problem, state):
            asked.append((problem.losses.tolist(), problem.generator.initial_seed()))
            return super().weights(problem, state)

    w, found = torch.ones(2), []
    for surgery in (Cone(), Asking()):
        p = torch.nn.Parameter(w.clone())
        optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), surgery=surgery, seed=3)
        optimizer.total([p.sum(), 2 * p[0] - 3 * p[1]]).backward()
        found.append(p.grad)
    assert asked == [([2.0, -1.0], 3_000_009)]
    torch.testing.assert_close(*found)
