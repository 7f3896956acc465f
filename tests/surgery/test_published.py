"""Each method against its paper's formula, written plainly over the rows, and against the peer's package."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torchjd.aggregation import MGDA as PEER_MGDA
from torchjd.aggregation import DualProj
from torchjd.aggregation import PCGrad as PeerPCGrad
from torchjd.aggregation import UPGrad as PeerUPGrad
from torchjd.linalg import QuadprogProjector

import gradsurg
from gradsurg.surgery import MGDA
from tests.matrices import matrix


def project(t, J):
    """The nearest point of {u : J u ≥ 0} to t: t + Jᵀλ with λ from scipy's nonnegative least squares."""
    multipliers, _ = scipy.optimize.nnls(J.T.numpy(), -t.numpy())
    return t + torch.tensor(multipliers) @ J


cases = pytest.mark.parametrize(("m", "seed"), list(itertools.product([2, 3, 5, 8], range(10))))


@cases
def test_cone(m, seed):
    J = matrix(m, seed)
    r = torch.linspace(0.5, 2, m, dtype=torch.float64)
    assert torch.allclose(gradsurg.combine(J, "cone"), project(J.sum(0), J), atol=1e-10)
    assert torch.allclose(gradsurg.combine(J, "cone", preferences=r), project(r @ J, J), atol=1e-10)


@cases
def test_upgrad(m, seed):
    J = matrix(m, seed)
    r = torch.linspace(0.5, 2, m, dtype=torch.float64)
    plain = torch.stack([project(g, J) for g in J])
    assert torch.allclose(gradsurg.combine(J, "upgrad"), plain.sum(0), atol=1e-10)
    assert torch.allclose(gradsurg.combine(J, "upgrad", preferences=r), r @ plain, atol=1e-10)


@cases
def test_mgda(m, seed):
    J = matrix(m, seed)
    u = gradsurg.combine(J, "mgda")
    # Désidéri 2012, theorem 2.2: u is the minimum-norm point of the hull iff ⟨u, g_i⟩ ≥ ‖u‖² for all i.
    assert (J @ u >= u @ u - 1e-12).all()
    weights = gradsurg.weights(J @ J.T, "mgda")
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()
    r = torch.linspace(0.5, 2, m, dtype=torch.float64)
    preferred = gradsurg.combine(J, "mgda", preferences=r)
    assert (J @ preferred >= r * (preferred @ preferred) - 1e-12).all()


@pytest.mark.parametrize("seed", range(10))
def test_mgda_of_two_tasks_in_closed_form(seed):
    a, b = matrix(2, seed) * torch.tensor([[1.0], [10.0 ** (seed - 5)]])
    alpha = ((b @ (b - a)) / ((a - b) @ (a - b))).clamp(0, 1)
    assert torch.allclose(gradsurg.combine(torch.stack([a, b]), "mgda"), alpha * a + (1 - alpha) * b, atol=1e-12)


@cases
def test_pcgrad(m, seed):
    J = matrix(m, seed)
    weights = gradsurg.weights(J @ J.T, "pcgrad", generator=torch.Generator().manual_seed(seed))
    drawn = torch.Generator().manual_seed(seed)
    total = torch.zeros(J.shape[1], dtype=torch.float64)
    for i in range(m):  # Yu et al. 2020, algorithm 1, on the rows themselves
        v = J[i].clone()
        for j in torch.randperm(m, generator=drawn).tolist():
            if j != i and v @ J[j] < 0:
                v -= (v @ J[j]) / (J[j] @ J[j]) * J[j]
        total += v
    assert torch.allclose(weights @ J, total, atol=1e-12)


def test_pcgrad_draws_afresh_and_repeatably():
    J = matrix(6, 1)
    draws = [gradsurg.weights(J @ J.T, "pcgrad", generator=torch.Generator().manual_seed(s)) for s in range(5)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(gradsurg.weights(J @ J.T, "pcgrad"), gradsurg.weights(J @ J.T, "pcgrad"))


# The peer adds 1e-4 of the trace to the Gramian's diagonal before solving, so it is near the projection, not on it;
# without that term (reg_eps=0) on well-conditioned rows it agrees to its solver's accuracy.
@cases
def test_peer_cone_and_upgrad(m, seed):
    J = matrix(m, seed)
    exact = QuadprogProjector(reg_eps=0.0)
    mean = gradsurg.combine(J, "cone") / m
    assert torch.allclose(DualProj(projector=exact)(J), mean, atol=1e-9)
    assert torch.allclose(PeerUPGrad(projector=exact)(J), gradsurg.combine(J, "upgrad") / m, atol=1e-9)


@pytest.mark.parametrize(("m", "seed"), [(2, 0), (3, 1), (5, 2), (8, 3)])
def test_peer_mgda(m, seed):
    J = matrix(m, seed)
    ours, theirs = gradsurg.combine(J, "mgda"), PEER_MGDA(epsilon=1e-9, max_iters=20_000)(J)
    assert ours.norm() <= theirs.norm() + 1e-12, "theirs is 20 000 iterations of Frank-Wolfe, ours the minimum"
    assert torch.allclose(ours, theirs, atol=2e-2)


@pytest.mark.parametrize(("m", "seed"), [(2, 0), (3, 1), (5, 2), (8, 3)])
def test_mgda_by_frank_wolfe(m, seed):
    J = matrix(m, seed)
    theirs = PEER_MGDA(epsilon=1e-300, max_iters=50)(J)
    assert torch.allclose(gradsurg.combine(J, MGDA(frank_wolfe=50)), theirs, atol=1e-9)
    exact = gradsurg.combine(J, "mgda").norm()
    lengths = [float(gradsurg.combine(J, MGDA(frank_wolfe=k)).norm() - exact) for k in (1, 10, 100, 1000)]
    assert lengths == sorted(lengths, reverse=True)
    assert -1e-12 <= lengths[-1] < 0.02
    assert gradsurg.combine(J, MGDA(frank_wolfe=2), guarantee="gradient").norm() > 0
    with pytest.raises(ValueError, match="frank_wolfe=-1"):
        MGDA(frank_wolfe=-1)


def test_peer_pcgrad_of_two_tasks():
    for seed in range(10):  # with two tasks there is no order to draw
        J = matrix(2, seed)
        assert torch.allclose(PeerPCGrad()(J), gradsurg.combine(J, "pcgrad"), atol=1e-12)


def test_the_peers_ridge_breaks_the_promise_that_ours_keeps():
    """The reason for exact solvers: rows whose norms spread over 1e-3 … 1e3, eight tasks."""
    rng = np.random.default_rng(0)
    conflicts = {"peer": 0, "ours": 0}
    for _ in range(40):
        J = torch.tensor(rng.standard_normal((8, 40)) * 10 ** rng.uniform(-3, 3, (8, 1)))
        for who, u in {"peer": PeerUPGrad()(J), "ours": gradsurg.combine(J, "upgrad")}.items():
            conflicts[who] += bool((J @ u / (J.norm(dim=1) * u.norm())).min() < -1e-6)
    assert conflicts["ours"] == 0
    assert conflicts["peer"] > 20
