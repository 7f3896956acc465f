"""Tasks that depend on each other, rows that nearly balance: margins, PCD, CAGrad and cones keep their promise."""

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import assume, given
from torch.nn.functional import cosine_similarity

import gradsurg
from gradsurg.surgery import PCD, CAGrad
from tests.balanced import balanced_matrices

PLANE = [[0.86, -0.40], [-0.66, -1.64], [0.98, -0.04]]
SPACE = [[0.3782, 1.7486, -0.5565], [-0.3466, 0.7347, -1.2334], [0.1925, 1.0723, 0.0467], [0.3684, -1.2485, 0.7342]]
THIN_BALL = [
    [-3, 1, 2, 1, 0],
    [0, 1, -2, 1, 3],
    [6, -4, 0, -4, -5.999999],
    [-2, -2, 1, 2, 3],
    [-3, 2, 0, 1, -3],
    [-1, 0, 2, 1, -2],
]
THIN_CONE = [
    [0.03, 0.02, 0.01, -0.01],
    [0.0, -0.04, 0.02, -0.03],
    [-2.999999, 2.0, -3.0, 4.0],
    [-2.0, 0.0, 2.0, 3.0],
    [-0.05, -0.05, 0.02, -0.04],
]
METHODS = [("cone", "none"), ("sum", "gradient"), ("upgrad", "none"), ("upgrad", "gradient"), ("pcgrad", "gradient")]


def rows(values):
    return torch.tensor(values, dtype=torch.float64)


def wrapped(J, **options):
    p = torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
    opt = gradsurg.wrap(torch.optim.SGD([p], lr=1.0), **options)
    opt.total({str(i): row @ p for i, row in enumerate(J)}).backward()
    return opt, p


def test_a_margin_within_reach_is_kept():
    J = rows(PLANE)
    opt, p = wrapped(J, margin=0.3)
    assert opt.report.margin_kept.item() == 1
    J = J / J.norm(dim=1, keepdim=True)
    assert (J @ p.grad).min() >= 0.3 / 3**0.5 * J.sum(0).norm() - 1e-9


def test_a_margin_for_a_task_that_is_a_combination_of_others():
    A = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin=0.3)
    opt.set_gradients({"a": [A[0]], "b": [A[1]], "c": [A[0] - A[1] / 2]})
    assert opt.report.margin_kept.item() == 1


def test_a_margin_makes_no_conflict():
    J = rows(SPACE)
    u = gradsurg.combine(J, "cone", margin=0.5)
    assert cosine_similarity(J, u[None]).min() > 0
    opt, _ = wrapped(J, margin=0.5, guarantee="gradient")
    assert opt.report.direction_cosines.min() > 0


@pytest.mark.parametrize("integers", [False, True])
def test_margins_in_reach_of_random_rows_are_kept(integers):
    """All rows on one side, more tasks than numbers: quadprog says how far the margins are within reach."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        m, size = int(rng.integers(3, 13)), int(rng.integers(2, 5))
        J = rng.integers(-3, 4, (m, size)).astype(float) if integers else rng.standard_normal((m, size))
        side = J @ rng.standard_normal(size)
        J = J * np.where(side < 0, -1, 1)[:, None]
        J = J[np.abs(J).sum(1) > 0]
        U = J / np.linalg.norm(J, axis=1, keepdims=True)
        v = quadprog.solve_qp(np.eye(size), np.zeros(size), U.T.copy(), np.full(len(U), 0.3))[0]
        opt, _ = wrapped(torch.tensor(J), margin=0.3)
        wanted = min(1, len(U) ** 0.5 / np.linalg.norm(v))
        assert opt.report.margin_kept.item() == pytest.approx(wanted, rel=1e-6), seed


def test_pcd_gives_every_other_task_its_share():
    J = rows([[1.0, 0.0], [0.0, -1.0], [-1.0, -1.0], [-2.0, 0.0]])
    u = gradsurg.combine(J, PCD(tau=0.1))
    assert torch.allclose(u, -rows([0.5**0.5, 0.5**0.5]))
    assert (J[1:] @ u).min() > 0


def best_worst_gain(J, radius):
    """Return the largest min ⟨d, g_i⟩ with ‖d − g_0‖ ≤ radius: bisection over ν, each step a program of quadprog."""
    J = J.numpy()
    mean = J.mean(0)
    low, high = (J @ mean).min(), (J @ mean + radius * np.linalg.norm(J, axis=1)).min()
    for _ in range(60):
        nu = (low + high) / 2
        try:
            d = quadprog.solve_qp(np.eye(len(mean)), mean, J.T.copy(), np.full(len(J), nu))[0]
            inside = np.linalg.norm(d - mean) <= radius
        except ValueError:
            inside = False
        low, high = (nu, high) if inside else (low, nu)
    return low


def test_cagrad_is_the_best_of_its_ball():
    J = rows([[0, -2], [1, 0], [1, 1]])
    assert (J @ gradsurg.combine(J, CAGrad(c=0.5))).min() >= 0.692
    for seed in range(200):
        rng = np.random.default_rng(seed)
        m, size = int(rng.integers(3, 9)), int(rng.integers(2, 4))
        J = torch.tensor(rng.integers(-3, 4, (m, size)).astype(float) if seed % 2 else rng.standard_normal((m, size)))
        J = J[J.norm(dim=1) > 0]
        mean = J.mean(0)
        if len(J) < 2 or mean.norm() < 1e-3:
            continue
        u, radius = gradsurg.combine(J, CAGrad(c=0.5)), 0.5 * mean.norm().item()
        assert (u - mean).norm() <= radius * (1 + 1e-9), seed
        assert (J @ u).min() >= best_worst_gain(J, radius) - 1e-7 * J.norm(dim=1).max(), seed


def test_cagrad_stays_in_its_ball_in_a_thin_cone():
    J = rows(THIN_BALL)
    mean, u = J.mean(0), gradsurg.combine(J, CAGrad(c=0.5))
    assert (u - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-9)
    assert u @ mean > 0
    _, p = wrapped(J, surgery="cagrad", normalize="none", guarantee="none")
    assert (p.grad - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-6)


@given(J=balanced_matrices)
@pytest.mark.parametrize("c", [0.1, 0.5, 1.0])
def test_cagrad_stays_in_its_ball(c, J):
    mean = J.mean(0)
    assume(mean.norm() > 1e-3 * J.norm(dim=1).max())
    u = gradsurg.combine(J, CAGrad(c=c))
    assert (u - mean).norm() <= c * mean.norm() * (1 + 1e-6)


@pytest.mark.parametrize(("surgery", "guarantee"), METHODS)
def test_a_thin_cone_has_no_conflict(surgery, guarantee):
    J = rows(THIN_CONE)
    assert cosine_similarity(J, gradsurg.combine(J, surgery, guarantee=guarantee)[None]).min() >= -1e-4
    if guarantee == "gradient":
        opt, _ = wrapped(J, surgery=surgery, normalize="none", guarantee="gradient")
        assert opt.report.direction_cosines.min() >= -1e-4


@given(J=balanced_matrices)
@pytest.mark.parametrize(("surgery", "guarantee"), METHODS)
def test_rows_that_balance_never_conflict(surgery, guarantee, J):
    u = gradsurg.combine(J, surgery, guarantee=guarantee)
    if u.norm() > 0:
        assert cosine_similarity(J, u[None], eps=0).min() >= -1e-4
