"""One row a surgery: what holds of it on every instance and what does not."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurg
from gradsurg.surgery import SURGERIES, Surgery


@dataclass(frozen=True)
class Row:
    """What a surgery promises beyond finite weights of the right shape."""

    conflict_free: bool  # ⟨u, g_i⟩ ≥ 0 for every task, on every instance
    order_free: bool  # permuting the tasks permutes the weights
    linear_scale: bool  # J → cJ gives u → cu
    sum_when_agreeing: bool  # no pair in conflict: the plain weighted sum
    single: float  # the weight of the only task
    preference: str  # "sum": where nobody conflicts, weights are the preferences; else what they stand for
    cancels: bool = True  # two opposite gradients of equal norm: u = 0
    elementwise: bool = False  # works on the numbers of the rows, so it has no weights and sees a rotation
    denied: str = "surrounding"  # the matrices on which a method that is not conflict-free shows it


TABLE = {
    "sum": Row(False, True, True, True, 1.0, "sum"),
    "cone": Row(True, True, True, True, 1.0, "sum"),
    "upgrad": Row(True, True, True, True, 1.0, "sum"),
    "mgda": Row(True, True, True, False, 1.0, "promise"),
    "pcgrad": Row(False, False, True, True, 1.0, "sum"),
    "mean": Row(False, True, True, False, 1.0, "shares"),
    "random": Row(False, False, True, False, 1.0, "shares", cancels=False),
    "gradvac": Row(False, False, True, True, 1.0, "sum"),
    "imtl_g": Row(False, True, True, False, 1.0, "cosines", denied="dependent"),
    "aligned_mtl": Row(False, True, True, False, 1.0, "sum of stand-ins", denied="dependent"),
    "cagrad": Row(False, True, True, False, 1.5, "mean"),
    "nash_mtl": Row(True, True, True, False, 1.0, "progress"),
    "fairgrad": Row(True, True, True, False, 1.0, "progress"),
    "sdmgrad": Row(False, True, True, False, 1.0, "shares"),
    "modo": Row(False, True, True, False, 1.0, "shares"),
    "cr_mogm": Row(False, True, True, False, 1.0, "promise", denied="later steps"),
    "excess_mtl": Row(False, True, True, False, 1.0, "shares"),
    "pcd": Row(False, False, True, False, 1.0, "share", cancels=False),
    "krum": Row(False, True, True, False, 1.0, "shares"),
    "graddrop": Row(False, True, True, False, 1.0, "sum", cancels=False, elementwise=True),
    "trimmed_mean": Row(False, True, True, False, 1.0, "shares", elementwise=True),
    "config": Row(False, True, True, False, 1.0, "cosines", denied="dependent"),
}
names = pytest.mark.parametrize("name", TABLE)
weighing = pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.elementwise])
tasks = st.integers(2, 8)
seeds = st.integers(0, 100_000)
# Seven properties of twenty methods: a third of the profile's examples each keeps the file under a minute.
fewer = settings(max_examples=settings.default.max_examples // 3)


def matrix(m, seed, P=12, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, P, generator=generator, dtype=torch.float64) + shift


def test_the_table_has_a_row_for_every_surgery():
    assert set(TABLE) == set(SURGERIES)
    for name, row in TABLE.items():
        assert SURGERIES[name].conflict_free == row.conflict_free
        assert SURGERIES[name].promise
        assert SURGERIES[name].paper


@names
@fewer
@given(m=tasks, seed=seeds)
def test_conflict_free_or_freed_by_the_guarantee(name, m, seed):
    J = matrix(m, seed)
    J -= J.mean(0) * (seed % 100) / 100  # from orthogonal to surrounding the origin
    for guarantee in ["none", "gradient"] if TABLE[name].conflict_free else ["gradient"]:
        u = gradsurg.combine(J, name, guarantee=guarantee)
        if u.norm() > 0:
            cosines = J @ u / (J.norm(dim=1) * u.norm())
            assert cosines.min() >= -1e-9


@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if not row.conflict_free and row.denied != "later steps"]
)
def test_what_the_table_denies_is_denied(name):
    worst = 0.0
    for seed in range(50):
        J = matrix(4, seed, P=2 if TABLE[name].denied == "dependent" else 12)
        if TABLE[name].denied != "dependent":
            J -= 0.95 * J.mean(0)
        u = gradsurg.combine(J, name)
        worst = min(worst, float((J @ u / (J.norm(dim=1) * u.norm())).min()))
    assert worst < -0.1


@names
@fewer
@given(m=tasks, seed=seeds)
def test_order_of_the_tasks(name, m, seed):
    if not TABLE[name].order_free:
        return
    J = matrix(m, seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    u = gradsurg.combine(J, name)
    assert (gradsurg.combine(J[order], name) - u).abs().max() <= 1e-9 * J.norm(dim=1).sum()


@names
@fewer
@given(m=tasks, seed=seeds, exponent=st.integers(-12, 12))
def test_scales_with_the_matrix(name, m, seed, exponent):
    J = matrix(m, seed)
    scaled = gradsurg.combine(J * 10.0**exponent, name)
    assert (scaled / 10.0**exponent - gradsurg.combine(J, name)).abs().max() <= 1e-9 * J.norm(dim=1).sum()


@weighing
@fewer
@given(m=tasks, seed=seeds)
def test_rotations_of_parameter_space_change_nothing(name, m, seed):
    J = matrix(m, seed)
    Q = torch.linalg.qr(matrix(12, seed + 1)).Q
    assert (gradsurg.combine(J @ Q, name) - gradsurg.combine(J, name) @ Q).abs().max() <= 1e-9 * J.norm(dim=1).sum()


@weighing
@fewer
@given(m=tasks, seed=seeds)
def test_agreeing_tasks(name, m, seed):
    J = matrix(m, seed).abs()
    preferences = torch.linspace(0.5, 2.0, m, dtype=torch.float64)
    G = J @ J.T
    if TABLE[name].sum_when_agreeing:
        assert gradsurg.weights(G, name).tolist() == [1.0] * m
        assert torch.equal(gradsurg.weights(G, name, preferences=preferences), preferences)


@weighing
@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e12])
def test_one_task(name, norm):
    assert gradsurg.weights(torch.tensor([[norm**2]], dtype=torch.float64), name).tolist() == [TABLE[name].single]


@names
def test_zero_rows_want_nothing(name):
    J = matrix(4, 7)
    J[2] = 0
    u = gradsurg.combine(J, name)
    rest = gradsurg.combine(J[[0, 1, 3]], name)
    if TABLE[name].order_free:
        assert (u - rest).abs().max() < 1e-12
    if not TABLE[name].elementwise:
        assert torch.isfinite(gradsurg.weights(J @ J.T, name)).all()
    assert torch.equal(gradsurg.combine(torch.zeros(3, 4), name), torch.zeros(4))


@names
def test_duplicates_and_opposites(name):
    J = matrix(2, 3)
    assert torch.isfinite(gradsurg.combine(torch.cat([J, J]), name)).all()
    u = gradsurg.combine(torch.stack([J[0], -J[0]]), name)
    if TABLE[name].cancels:
        assert u.abs().max() <= 1e-15
    else:
        assert u.abs().max() > 0.1
    if TABLE[name].conflict_free:
        assert torch.equal(u, torch.zeros(12, dtype=torch.float64)), "0 and not noise at a Pareto stationary point"


@weighing
def test_batch_is_one_by_one(name):
    Gs = torch.stack([J @ J.T for J in (matrix(5, seed) for seed in range(6))]).reshape(2, 3, 5, 5)
    together = gradsurg.weights(Gs, name)
    assert together.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            assert (together[i, j] - gradsurg.weights(Gs[i, j], name)).abs().max() <= 1e-12


@weighing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_inputs_are_not_touched(name, dtype):
    G = (matrix(4, 1) @ matrix(4, 1).T).to(dtype)
    copy = G.clone()
    weights = gradsurg.weights(G.requires_grad_(), name)
    assert weights.dtype == dtype
    assert not weights.requires_grad
    assert torch.equal(G, copy)


def test_rank_two_with_sixteen_tasks():
    J = matrix(16, 5, P=2) @ matrix(2, 6)
    for name, row in TABLE.items():
        if row.conflict_free:
            u = gradsurg.combine(J, name)
            assert u.norm() == 0 or (J @ u / (J.norm(dim=1) * u.norm())).min() >= -1e-9


def test_a_surgery_of_ones_own():
    class Loudest(Surgery):
        name, paper, promise = "loudest", "-", "-"

        def weights(self, problem, state):
            loudest = problem.norms.argmax(-1, keepdim=True)
            return torch.zeros_like(problem.norms).scatter(-1, loudest, 1.0), state

    J = torch.tensor([[1.0, 0.0], [-5.0, 1.0]])
    assert gradsurg.combine(J, Loudest()).tolist() == [-5.0, 1.0]
    assert (J @ gradsurg.combine(J, Loudest(), guarantee="gradient") >= -1e-6).all()
