"""The minimum-norm point of the hull, judged by its optimality conditions and in closed form."""

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsurg.solvers.simplex import simplex
from tests.matrices import FAMILIES, draw
from tests.solvers.test_nonnegative import KINDS, matrix


def shortfall(J, alpha):
    """max over i of ‖u‖² − ⟨u, g_i⟩ in units of the longest norm times ‖u‖: 0 only at the minimum (Wolfe 1976)."""
    u = alpha @ J
    return float((u @ u - J @ u).max() / (J.norm(dim=1).max() * u.norm() + 1e-300))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16, 32, 64])
def test_optimality_conditions(kind, m):
    for seed in range(6 if m <= 16 else 2):
        J = matrix(kind, m, seed)
        G = (J[:, None] * J).sum(-1)
        alpha = simplex(G)
        assert (alpha >= 0).all()
        assert float(alpha.sum()) == pytest.approx(1, abs=1e-12)
        u = alpha @ J
        if u.norm() > 1e-7 * (alpha * J.norm(dim=1)).sum():  # else the origin is in the hull, as far as G can tell
            assert shortfall(J, alpha) <= 1e-9


@given(seed=st.integers(0, 100_000), exponent=st.floats(-6, 6), angle=st.floats(0, 3.1))
def test_two_tasks_in_closed_form(seed, exponent, angle):
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([np.cos(angle), np.sin(angle)]) * 10**exponent
    want = ((b @ (b - a)) / max(float((a - b) @ (a - b)), 1e-300)).clamp(0, 1)
    J = torch.stack([a, b])
    u = simplex(J @ J.T) @ J
    assert (u - (want * a + (1 - want) * b)).norm() <= 1e-9 * min(1, 10**exponent)


@pytest.mark.parametrize("m", [3, 8, 32])
def test_quadprog_finds_the_same_point(m):
    for seed in range(6):
        J = draw("random", m, 2 * m, seed)
        G = (J @ J.T).numpy()
        ones = np.concatenate([np.ones((m, 1)), np.eye(m)], axis=1)
        theirs = quadprog.solve_qp(G, np.zeros(m), ones, np.r_[1.0, np.zeros(m)], meq=1)[0]
        assert np.abs(simplex(torch.tensor(G)).numpy() - theirs).max() <= 1e-9


@given(m=st.integers(2, 16), seed=st.integers(0, 100_000), rank=st.integers(1, 4))
def test_integers_with_ties(m, seed, rank):
    J = torch.tensor(np.random.default_rng(seed).integers(-2, 3, (m, rank)).astype(float))
    alpha = simplex(J @ J.T)
    u = alpha @ J
    assert float(alpha.sum()) == pytest.approx(1, abs=1e-12)
    assert (u @ u - J @ u).max() <= 1e-9 * max(float((J * J).sum(1).max()), 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_changes_nothing(family):
    for seed in range(5):
        J = draw(family, 6, 20, seed)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        G = (J[:, None] * J).sum(-1)
        u, v = simplex(G) @ J, simplex(G[order][:, order]) @ J[order]
        assert (u - v).norm() <= 1e-7 * J.norm(dim=1).min().clamp(min=1e-300) + 1e-7 * u.norm()


def test_zero_rows_share_the_mass_and_forbidden_rows_get_none():
    J = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    assert simplex(J @ J.T).tolist() == [0.0, 0.5, 0.5, 0.0]
    allowed = torch.tensor([True, False, False, True])
    assert simplex(J @ J.T, allowed=allowed).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert simplex(J @ J.T, allowed=torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4


def test_batches():
    Js = torch.stack([draw("random", 4, 9, seed) for seed in range(6)]).reshape(3, 2, 4, 9)
    together = simplex(Js @ Js.mT)
    for i in range(3):
        for j in range(2):
            assert torch.allclose(together[i, j], simplex(Js[i, j] @ Js[i, j].T), atol=1e-12)
