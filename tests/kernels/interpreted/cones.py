"""The cone and simplex kernel against the solvers and their optimality conditions, in the interpreter."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gradsurg.linalg.kernels import cone
from gradsurg.solvers.problem import HOST
from gradsurg.solvers.tolerances import COARSER, ROUNDING_EXACT
from tests.balanced import balanced
from tests.matrices import FAMILIES, draw

# From G alone u is known to its rounding over the square of the angle by which rows miss dependence.
SAME_POINT = {"nearly opposite 1e-6": 1e-3, "nearly opposite 1e-4": 1e-7}


def half_rank(m, seed):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal((m, max(1, m // 2))) @ rng.standard_normal((max(1, m // 2), 2 * m)))


def bundle(m, seed):
    """All rows within 1e-3 of one line, pointing either way along it."""
    rng = np.random.default_rng(seed)
    line = rng.standard_normal(2 * m)
    return torch.tensor((line + 1e-3 * rng.standard_normal((m, 2 * m))) * rng.choice([1.0, -1.0], (m, 1)))


MORE = {"half rank": half_rank, "bundle": bundle}
KINDS = [*FAMILIES, *MORE]


def program(kind, m, seed):
    """Return J, G, the target's coefficients r and length, or None where the target is nothing but rounding."""
    J = MORE[kind](m, seed) if kind in MORE else draw(kind, m, max(2 * m, 8), seed)
    r = torch.ones(m, dtype=torch.float64)
    if seed % 2:
        r = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    length = (r @ J).norm()
    if length <= 1e-7 * (r * J.norm(dim=1)).sum():
        return None
    return J, (J[:, None] * J).sum(-1), r, length


def kkt_residual(G, b, lam, scale):
    """max |min(λ_i, r_i)| with rows scaled to unit length and the target to length one: 0 only at the answer."""
    norms = G.diagonal().sqrt()
    s = torch.where(norms > 0, 1 / norms, 0)
    pair = torch.minimum(lam * norms / scale, (G @ lam + b) * s / scale)
    return float(torch.where(norms > 0, pair, 0).abs().max())


@contextmanager
def steps_taken():
    """Collect the tensors in which the kernel counts its steps."""
    taken = []
    empty = torch.empty

    def watched(*args, **kwargs):
        made = empty(*args, **kwargs)
        if kwargs.get("dtype") == torch.int32:
            taken.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cone.torch, "empty", watched)
        yield taken


def check(kind, m, seeds):
    instances = [program(kind, m, seed) for seed in seeds]
    instances = [instance for instance in instances if instance is not None]
    if not instances:
        return
    G = torch.stack([instance[1] for instance in instances])
    b = torch.stack([instance[1] @ instance[2] for instance in instances])
    scale = torch.stack([instance[3] for instance in instances])
    with steps_taken() as turns:
        lam = cone.nonnegative(G, b, scale=scale)
    theirs = HOST.nonnegative(G, b, scale=scale)
    for (J, gramian, r, length), mine, other in zip(instances, lam, theirs, strict=True):
        assert (mine >= 0).all()
        assert kkt_residual(gramian, gramian @ r, mine, length) <= 1e-9
        assert ((mine - other) @ J / length).abs().max() <= SAME_POINT.get(kind, 1e-8)
    # Pivots and refusals, and the step that finds nothing to do.
    assert (turns[0] <= 3 * m + 3).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 3, 7])
def test_optimal_and_the_same_as_the_solver(kind, m):
    check(kind, m, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [4, 8, 11, 32])
def test_optimal_for_more_tasks(kind, m):
    check(kind, m, range(2 if m <= 11 else 1))


@pytest.mark.parametrize("rounding", [ROUNDING_EXACT, 1e-14, 5e-11, 1e-10, 1e-6])
def test_attempts_end_where_no_answer_keeps_every_task(rounding):
    """Two opposed rows and a target that both must gain from. Coarser roundings are tried, each once."""
    G = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    with steps_taken() as turns:
        mine = cone.nonnegative(G, b, rounding=rounding)
    attempts = 1 + sum(coarser > rounding for coarser in COARSER)
    assert attempts <= int(turns[0]) <= attempts * (8 * 3 + 16)
    assert (mine - HOST.nonnegative(G, b, rounding=rounding)).abs().max() <= 1e-12


def test_nearly_opposite_pairs_that_elimination_both_ways_cannot_solve():
    """Σλ is 1e6 and the least angle 1e-7: Gauss and Jordan's elimination left violations of 6e-8 here."""
    check("nearly opposite 1e-6", 11, [1])


@pytest.mark.parametrize("kind", KINDS)
def test_simplex_is_the_solvers(kind):
    for m in (1, 4, 5):
        J = MORE[kind](m, 0) if kind in MORE else draw(kind, m, max(2 * m, 8), 0)
        G = (J[:, None] * J).sum(-1)
        alpha = cone.simplex(G)
        assert (alpha >= 0).all()
        assert abs(alpha.sum() - 1) <= 1e-12
        scale = J.norm(dim=1).max()
        assert ((alpha - HOST.simplex(G)) @ J).abs().max() <= 1e-6 * scale
        # Optimality: no vertex of the hull lies further along −u than u itself.
        u = alpha @ J
        assert (J @ u >= u @ u - 1e-9 * scale * scale).all()


def test_simplex_with_some_left_out():
    G = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    allowed = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    got = cone.simplex(G, allowed=allowed)
    wanted = torch.stack([HOST.simplex(G, allowed=mask) for mask in allowed])
    assert (got - wanted).abs().max() <= 1e-12
    G[2, 2] = 0  # a row at the origin is the least there is
    assert torch.equal(cone.simplex(G), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("m", "kind"), [(2, "surrounding"), (5, "surrounding"), (9, "random")])
def test_upgrad_is_one_launch_of_m_programs(m, kind):
    J = draw(kind, m, 3 * m, 1)
    G = (J[:, None] * J).sum(-1)
    r = torch.rand(m, dtype=torch.float64) + 0.5
    wanted = r + r @ HOST.project_rows(G)
    assert ((r + r @ cone.project_rows(G) - wanted) @ J).abs().max() <= 1e-9 * J.norm()
    if m <= 5:
        both = r + r @ cone.project_rows(torch.stack([G, 4 * G]))
        assert both.shape == (2, m)
        assert (both[0] - both[1]).abs().max() <= 1e-9 * both.abs().max()


def test_broadcasting_and_batches():
    Js = torch.stack([draw("surrounding", 4, 12, seed) for seed in range(4)]).reshape(2, 2, 4, 12)
    G = Js @ Js.mT
    b = G.sum(-1)
    assert (cone.nonnegative(G, b) - HOST.nonnegative(G, b)).abs().max() <= 1e-9
    assert (cone.nonnegative(G[0, 0], b) - HOST.nonnegative(G[0, 0], b)).abs().max() <= 1e-9 * b.abs().max()
    allowed = torch.tensor([True, False, True, True])
    got = cone.nonnegative(G, b, allowed=allowed)
    assert (got - HOST.nonnegative(G, b, allowed=allowed)).abs().max() <= 1e-9
    assert not got[..., 1].any()
    shared = G[:, :1]  # one Gramian for a row of programs
    assert (cone.nonnegative(shared, b) - HOST.nonnegative(shared, b)).abs().max() <= 1e-9 * b.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
def test_idle_and_broken_programs():
    G = torch.eye(3, dtype=torch.float64).repeat(6, 1, 1)
    b = -torch.ones(6, 3, dtype=torch.float64)
    G[0, 1, 2] = float("nan")
    G[1, 0, 0] = float("inf")
    b[2, 1] = float("nan")
    b[3] = 0.0
    G[4] = 0.0
    got = cone.nonnegative(G, b)
    assert torch.isnan(got[:3]).all()
    assert torch.equal(got[3:5], torch.zeros(2, 3, dtype=torch.float64))
    assert (got[5] - 1).abs().max() <= 1e-15
    # Nobody is in conflict: 0, whatever else there is.
    assert torch.equal(cone.nonnegative(G[0], b[5].abs()), torch.zeros(3, dtype=torch.float64))
    assert torch.isnan(cone.nonnegative(G[5], b[5], scale=torch.tensor(float("nan")))).all()


def test_too_many_tasks():
    with pytest.raises(ValueError, match="at most 32"):
        cone.nonnegative(torch.eye(33, dtype=torch.float64), torch.ones(33, dtype=torch.float64))


@pytest.mark.parametrize(("m", "size"), [(3, 2), (5, 2), (6, 3), (8, 5)])
def test_margins_of_tasks_that_depend_on_each_other(m, size):
    """More tasks than numbers and b not in the range of G: a task has to replace one that it depends on."""
    rng = np.random.default_rng(m)
    J = torch.tensor(rng.integers(-3, 4, (3, m, size)).astype(float))
    norms = J.norm(dim=-1, keepdim=True)
    U = J / norms.where(norms > 0, 1.0)
    # All rows on one side of a direction: every margin is within reach.
    side = U @ torch.tensor(rng.standard_normal(size))
    U = U * torch.where(side < 0, -1.0, 1.0).unsqueeze(-1)
    G, b = U @ U.mT, torch.where(norms.squeeze(-1) > 0, -0.3, 0.0).double()
    mine, theirs = cone.nonnegative(G, b), HOST.nonnegative(G, b)
    for gramian, linear, lam in zip(G, b, mine, strict=True):
        assert kkt_residual(gramian, linear, lam, 0.3) <= 1e-9
    assert ((mine - theirs).unsqueeze(1) @ U).abs().max() <= 1e-8 * (theirs.unsqueeze(1) @ U).abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_balance_are_not_violated(seed):
    J = balanced(3, 4, 2, 1e-7, seed)
    G = (J[:, None] * J).sum(-1)
    w = 1 + cone.nonnegative(G, G.sum(1))
    u = w @ J
    if u.norm() > 8e-8 * (w @ J.norm(dim=1)):
        assert (J @ u / J.norm(dim=1)).min() >= -1e-4 * u.norm()
