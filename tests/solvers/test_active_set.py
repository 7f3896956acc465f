"""Programs in which tasks depend on each other and b is not in the range of G, judged by KKT and by quadprog."""

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given

from gradsurg.solvers.active_set import bound, solve_small
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.pivoting import solve_batched
from gradsurg.solvers.tolerances import COARSER
from tests.balanced import balanced_matrices

PROGRAMS = 10_000


def instance(seed):
    """Return unit rows and q: more tasks than numbers, random or small whole entries, feasible or not."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 25))
    size = int(rng.integers(1, m))
    J = rng.integers(-3, 4, (m, size)).astype(float) if seed % 2 else rng.standard_normal((m, size))
    J = J[np.abs(J).sum(1) > 0]
    if len(J) == 0:
        return instance(seed + PROGRAMS)
    U = J / np.linalg.norm(J, axis=1, keepdims=True)
    kind = seed // 2 % 3
    if kind == 0:
        return U, -rng.uniform(0, 1, len(U))
    if kind == 1:
        return U, rng.standard_normal(len(U))
    # All rows on one side: every margin is within reach.
    side = np.where(U @ rng.standard_normal(size) < 0, -1, 1)
    return U * side[:, None], -rng.uniform(0.1, 1, len(U))


def shortest(U, q):
    """Return quadprog's shortest v with U v ≥ −q, or None if there is none: the dual of our program."""
    try:
        return quadprog.solve_qp(np.eye(U.shape[1]), np.zeros(U.shape[1]), U.T.copy(), -q)[0]
    except ValueError:
        return None


def solved(twin, A, q):
    if twin == "small":
        answers, counts = solve_small(A.tolist(), [q.tolist()], None, None, 4e-16)
        return np.array(answers[0]), counts[0]
    answers, counts = solve_batched(torch.tensor(A)[None], torch.tensor(q)[None], None, None, 4e-16)
    return answers[0].numpy(), counts[0]


def check(seeds):
    feasible = 0
    for seed in seeds:
        U, q = instance(seed)
        size = np.abs(q).max()
        theirs = shortest(U, q)
        feasible += theirs is not None
        for twin in ("small", "batched"):
            lam, count = solved(twin, U @ U.T, q)
            assert (lam >= 0).all()
            assert np.isfinite(lam).all()
            assert count <= bound(len(q)) * (1 + len(COARSER)) + 8
            residual = (U @ (U.T @ lam) + q) / size
            if theirs is None:
                # The answer shows that there is none.
                assert residual.min() < -1e-9, (seed, twin)
                continue
            # λ is a float64: rounding it turns r by 1e-16 Σλ, and no answer can be better than that.
            total = lam.sum() / size
            assert np.abs(np.minimum(lam / size, residual)).max() <= max(1e-9, 4e-16 * total), (seed, twin)
            assert np.abs(U.T @ lam - theirs).max() <= 1e-7 * max(1, np.abs(theirs).max()), (seed, twin)
            assert count <= bound(len(q)) + 8
    return feasible / len(seeds)


def test_more_tasks_than_numbers():
    assert 0.3 < check(range(1000)) < 0.8


@pytest.mark.slow
def test_ten_thousand_with_more_tasks_than_numbers():
    check(range(1000, PROGRAMS))


def test_a_task_replaces_one_that_it_depends_on():
    """Three tasks in two dimensions: the passive set {0, 1} has to become {1, 2}."""
    U = torch.nn.functional.normalize(torch.tensor([[0.86, -0.40], [-0.66, -1.64], [0.98, -0.04]]).double())
    lam = nonnegative(U @ U.T, torch.full((3,), -0.3, dtype=torch.float64))
    assert lam[0] == 0
    assert (U @ U.T @ lam - 0.3).min() >= -1e-12
    assert (U @ U.T @ lam)[1:].sub(0.3).abs().max() <= 1e-12


def test_without_a_solution_the_answer_misses_and_is_finite():
    """Two opposite tasks cannot both gain; the third is served all the same."""
    U = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    lam = nonnegative(U @ U.T, torch.full((3,), -1.0))
    assert lam.isfinite().all()
    residual = U @ U.T @ lam - 1
    assert residual[:2].min() <= -1
    assert abs(residual[2]) <= 1e-15


@given(J=balanced_matrices)
def test_rows_that_balance_are_not_violated(J):
    """In 80-bit arithmetic over the rows themselves, of what the projection of their sum leaves."""
    G = (J[:, None] * J).sum(-1)
    lam = nonnegative(G, G.sum(1))
    assert (lam >= 0).all()
    wide = J.numpy().astype(np.longdouble)
    norms, w = np.sqrt((wide * wide).sum(1)), 1 + lam.numpy().astype(np.longdouble)
    u = w @ wide
    length = np.sqrt(u @ u)
    if length <= 8e-8 * (w @ norms):
        return  # nothing but rounding is left: the caller holds
    assert (wide @ u / norms / length).min() >= -1e-4
