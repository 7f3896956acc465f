"""Section 1 of the mathematics: which change of a loss leaves the direction alone, cell by cell.

u is compared as a direction, for L_i → c·L_i (gradient and loss both times c) and L_i → L_i + b (gradient as before),
changed in one task, from the first of three steps on: normalisers with a memory have one by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import (
    DWA,
    FAMO,
    IMTLL,
    NORMALIZERS,
    STCH,
    GeneralizedMean,
    GradNorm,
    InitialLoss,
    Norm,
    Normalizer,
    PriorLoss,
    Uncertainty,
    resolve_normalizer,
)
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import SURGERIES
from gradsurg.surgery.pipeline import Pipeline

TASKS = tuple("abcd")
PARAMETERS = 12
STEPS = 3


@dataclass(frozen=True)
class Row:
    """What the table says of one normaliser, and the normaliser, given how the losses are changed: L → c·L + b."""

    scaling: bool
    shifting: bool
    make: Callable[[torch.Tensor, torch.Tensor], Normalizer]


def row(normalizer: str | Normalizer, scaling: bool, shifting: bool) -> Row:
    return Row(scaling, shifting, lambda c, b: resolve_normalizer(normalizer))


def prior(c, b):
    """The loss of the best constant prediction follows the loss."""
    values = torch.tensor([0.5, 0.7, 1.1, 1.6], dtype=torch.float64) * c + b
    return PriorLoss(dict(zip(TASKS, values.tolist(), strict=True)))


# Learned scales move by about `rate` a step; at the default rates three steps would not show a difference.
TABLE = {
    "none": row("none", False, True),
    "norm": row("norm", True, True),
    "norm, smoothed": row(Norm(smoothing=0.7), True, True),
    "loss": row("loss", True, False),
    "initial_loss": row("initial_loss", True, False),
    "initial_loss, 2 steps": row(InitialLoss(steps=2), True, False),
    "prior_loss": Row(True, False, prior),
    "generalized_mean": row("generalized_mean", False, False),
    "generalized_mean, 1": row(GeneralizedMean(1), False, True),
    "generalized_mean, 0": row(GeneralizedMean(0), True, False),
    "generalized_mean, -1": row(GeneralizedMean(-1), False, False),
    "generalized_mean, 2": row(GeneralizedMean(2), False, False),
    "dwa": row(DWA(temperature=0.5), False, False),
    "uncertainty": row(Uncertainty(rate=0.5), False, False),
    "gradnorm": row(GradNorm(alpha=6.0, rate=0.5), False, False),
    "famo": row(FAMO(rate=0.5), True, False),
    "random": row("random", False, True),
    "imtl_l": row(IMTLL(rate=0.5), False, False),
    "tchebycheff": row("tchebycheff", False, False),
    "stch": row(STCH(mu=0.5), False, False),
}
WITHOUT_CHANGE = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
names = pytest.mark.parametrize("name", TABLE)


def test_the_table_has_a_row_for_every_normaliser():
    assert {row.make(*WITHOUT_CHANGE).name for row in TABLE.values()} == set(NORMALIZERS)


def instance(seed):
    """Gradients and losses of three steps; losses fall and rise by up to a factor of 3."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(STEPS, len(TASKS), PARAMETERS, generator=generator, dtype=torch.float64) + 0.3
    return J, torch.rand(STEPS, len(TASKS), generator=generator, dtype=torch.float64) + 0.5


def directions(name, seed, c=WITHOUT_CHANGE[0], b=WITHOUT_CHANGE[1], surgery="cone"):
    """Return u / ‖u‖ of each step, shape (steps, parameters)."""
    pipeline = Pipeline(TABLE[name].make(c, b), SURGERIES[surgery]())
    state, result = {}, []
    for J, losses in zip(*instance(seed), strict=True):
        J = J * c[:, None]
        problem = Problem(J @ J.T, torch.ones(4, dtype=torch.float64), TASKS, losses * c + b)
        step = pipeline.direction(problem, state)
        state = step.state
        u = step.weights @ J
        result.append(u / u.norm())
    return torch.stack(result)


def only(task, value, otherwise):
    vector = torch.full((4,), otherwise, dtype=torch.float64)
    vector[task] = value
    return vector


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.scaling])
@pytest.mark.parametrize("surgery", ["sum", "cone", "upgrad", "mgda", "pcgrad"])
@settings(max_examples=20)  # for each of 40 pairs of normaliser and surgery
@given(seed=st.integers(0, 10_000), exponent=st.floats(-6, 6), task=st.integers(0, 3))
def test_scaling_a_loss(name, surgery, seed, exponent, task):
    changed = directions(name, seed, c=only(task, 10**exponent, 1.0), surgery=surgery)
    assert (changed - directions(name, seed, surgery=surgery)).abs().max() < 1e-9


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.shifting])
@given(seed=st.integers(0, 10_000), shift=st.floats(-1e3, 1e3), task=st.integers(0, 3))
def test_shifting_a_loss(name, seed, shift, task):
    assert torch.equal(directions(name, seed, b=only(task, shift, 0.0)), directions(name, seed))


@pytest.mark.parametrize("change", ["scaling", "shifting"])
@names
def test_what_the_table_denies_is_denied(name, change):
    if getattr(TABLE[name], change):
        return
    moved = 0.0
    for seed in range(5):
        for task in range(4):
            c, b = WITHOUT_CHANGE
            if change == "scaling":
                c = only(task, 1e3, 1.0)
            else:
                b = only(task, 10.0, 0.0)
            moved = max(moved, float((directions(name, seed, c, b) - directions(name, seed)).abs().max()))
    assert moved > 0.05


@names
@given(seed=st.integers(0, 10_000))
def test_the_mean_length_of_the_rows_is_kept(name, seed):
    pipeline = Pipeline(TABLE[name].make(*WITHOUT_CHANGE), SURGERIES["sum"]())
    state = {}
    for J, losses in zip(*instance(seed), strict=True):
        step = pipeline.direction(Problem(J @ J.T, torch.ones(4, dtype=torch.float64), TASKS, losses), state)
        state = step.state
        norms = J.norm(dim=1)
        assert float((step.scales * norms).mean()) == pytest.approx(float(norms.mean()), rel=1e-12)


@names
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)))
def test_order_of_the_tasks(name, seed, order):
    """Also of the random one: its draws belong to names."""
    normalizer = TABLE[name].make(*WITHOUT_CHANGE)
    here, there = {}, {}
    for J, losses in zip(*instance(seed), strict=True):
        ones = torch.ones(4, dtype=torch.float64)
        scales, here = normalizer.scales(Problem(J @ J.T, ones, TASKS, losses), here)
        J, tasks = J[order], tuple(TASKS[i] for i in order)
        permuted, there = normalizer.scales(Problem(J @ J.T, ones, tasks, losses[order]), there)
        assert (permuted / permuted.sum() - scales[order] / scales.sum()).abs().max() < 1e-12


@names
@given(seed=st.integers(0, 10_000))
def test_scales_are_positive_and_the_state_is_not_touched(name, seed):
    normalizer = TABLE[name].make(*WITHOUT_CHANGE)
    state = {}
    for J, losses in zip(*instance(seed), strict=True):
        before = repr(state)
        problem = Problem(J @ J.T, torch.ones(4, dtype=torch.float64), TASKS, losses)
        scales, following = normalizer.scales(problem, state)
        again, _ = normalizer.scales(problem, state)
        assert torch.equal(scales, again)
        assert repr(state) == before
        assert scales.shape == (4,)
        assert scales.dtype == torch.float64
        assert bool((scales > 0).all())
        assert bool(torch.isfinite(scales).all())
        state = following


@names
def test_tasks_that_are_alike_get_the_same_scale(name):
    """Equal norms, equal losses, no conflict: what plain summing gives, whatever the normaliser; random aside."""
    J = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    normalizer = PriorLoss(dict.fromkeys("012", 2.0)) if name == "prior_loss" else TABLE[name].make(*WITHOUT_CHANGE)
    losses = torch.full((3,), 1.7, dtype=torch.float64)
    weights = gradsurg.weights(J @ J.T, "cone", normalize=normalizer, losses=losses)
    if name == "random":
        assert (weights - 1).abs().max() > 0.1
    else:
        assert (weights - 1).abs().max() < 1e-15


@pytest.mark.parametrize("name", ["none", "norm"])
def test_agreeing_tasks_of_equal_norm_get_the_plain_sum_to_the_bit(name):
    J = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 3.0, 4.0]])
    assert gradsurg.weights(J @ J.T, "cone", normalize=name).tolist() == [1.0, 1.0, 1.0]


def test_a_zero_row_gets_scale_zero_and_does_not_shorten_the_others():
    J = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    weights = gradsurg.weights(J @ J.T, "sum", normalize="norm")
    assert weights.tolist() == pytest.approx([3.5 / 3, 0.0, 3.5 / 4])
    assert gradsurg.weights(torch.zeros(2, 2), "cone", normalize="norm").tolist() == [0.0, 0.0]


def test_blocks_are_scaled_apart():
    G = torch.stack([torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))])
    weights = gradsurg.weights(G, "sum", normalize="norm")
    assert weights.tolist() == [[1.5, 0.75], [pytest.approx(2 / 3), 2.0]]


def test_names_and_instances():
    assert resolve_normalizer(Norm()) == Norm() == resolve_normalizer("norm")
    assert issubclass(Norm, Normalizer)
    for name, kind in NORMALIZERS.items():
        assert resolve_normalizer(name) == kind()
        assert hash(kind()) == hash(kind()), "options are a key: gradsurg.weights looks pipelines up by them"
        assert kind.name == name
        assert kind.paper
    with pytest.raises(
        ValueError, match=r"normalize='nrom' is not known: use one of 'none', 'norm'.*Did you mean 'norm'"
    ):
        resolve_normalizer("nrom")
