"""SDMGrad, MoDo, CR-MOGM, ExcessMTL, PCD, Krum: each paper's formula over the rows in float64, over several steps."""

import itertools
import math

import numpy as np
import pytest
import quadprog
import torch
from torchjd.aggregation import PCD as PEER_PCD
from torchjd.aggregation import CRMOGMWeighting, ExcessMTLWeighting, KrumWeighting, MGDAWeighting, MoDoWeighting
from torchjd.aggregation import SDMGradWeighting as PeerSDMGrad

import gradsurg
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.simplex import onto_simplex
from gradsurg.surgery import CRMOGM, MGDA, PCD, ExcessMTL, Krum, MoDo, Random, SDMGrad
from tests.matrices import matrix, preferences

cases = pytest.mark.parametrize(("m", "seed"), list(itertools.product([2, 3, 5, 8], range(5))))
STATEFUL = [SDMGrad(), MoDo(), CRMOGM(), ExcessMTL(), PCD()]


def names(m):
    return tuple(f"task {i}" for i in range(m))


def over_steps(surgery, matrices, r=None, tasks=None):
    """The weights of every step, the state carried along."""
    state, found = {}, []
    for J in matrices:
        m = J.shape[0]
        problem = Problem(J @ J.T, torch.ones(m).double() if r is None else r, tasks or names(m))
        weights, state = surgery.weights(problem, state)
        found.append(weights)
    return found


@cases
def test_projection_onto_the_simplex(m, seed):
    y = matrix(m, seed)[:, 0] * 10.0 ** (seed - 2)
    p = torch.tensor(onto_simplex(y.tolist()), dtype=torch.float64)
    assert p.min() >= 0
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    # It is nearest iff ⟨y − p, e_i − p⟩ ≤ 0 for every corner e_i.
    assert ((y - p) - (y - p) @ p).max() <= 1e-12 * (1 + y.abs().max())
    assert onto_simplex([1e30, 0.0, -1e30]) == [1.0, 0.0, 0.0]
    assert onto_simplex([-1e30, -2e30]) == [1.0, 0.0]


@cases
def test_sdmgrad_by_the_authors_steps(m, seed):
    steps = [matrix(m, 10 * seed + k) for k in range(4)]
    peer = PeerSDMGrad()
    for ours, J in zip(over_steps(SDMGrad(), steps), steps, strict=True):
        # The peer adds 1e-8 to the squared unit, and steps of 10 amplify that.
        assert torch.allclose(ours, peer(J @ J.T), atol=1e-4)


@cases
@pytest.mark.parametrize("pull", [0.0, 0.3, 5.0])
def test_sdmgrad_exactly(m, seed, pull):
    J, r = matrix(m, seed), preferences(m)
    weights = gradsurg.weights(J @ J.T, SDMGrad(pull=pull, iterations=0), preferences=r)
    preferred = r / r.sum()
    w = (1 + pull) * weights - pull * preferred
    assert float(w.sum()) == pytest.approx(1, abs=1e-9)
    assert w.min() >= -1e-12
    # Xiao et al. 2023, equation 4: minimal over the simplex iff no corner's slope is below the mean slope.
    slope = J @ ((w + pull * preferred) @ J)
    assert slope.min() >= w @ slope - 1e-10
    if pull == 0:
        assert torch.allclose(weights @ J, gradsurg.combine(J, "mgda"), atol=1e-9)


@cases
def test_modo(m, seed):
    steps, r = [matrix(m, 10 * seed + k) for k in range(6)], preferences(m)
    expected = r / r.sum()
    for ours, J in zip(over_steps(MoDo(0.05, 0.2, "absolute"), steps, r), steps, strict=True):
        y = expected - 0.05 * (J @ (expected @ J) + 0.2 * expected)  # Chen et al. 2023, algorithm 1
        expected = torch.tensor(onto_simplex(y.tolist()), dtype=torch.float64)
        assert torch.allclose(ours, expected, atol=1e-12)
    peer = MoDoWeighting(gamma=0.05, rho=0.2)
    for ours, J in zip(over_steps(MoDo(0.05, 0.2, "absolute"), steps), steps, strict=True):
        assert torch.allclose(ours, peer(J @ J.T), atol=1e-12)


def test_modo_arrives_at_mgda():
    J = matrix(4, 0)
    last = over_steps(MoDo(rho=0.0), [J] * 2000)[-1]
    assert torch.allclose(last @ J, gradsurg.combine(J, "mgda"), atol=1e-6)


@cases
def test_cr_mogm(m, seed):
    steps = [matrix(m, 10 * seed + k) for k in range(6)]
    expected = None
    for ours, J in zip(over_steps(CRMOGM(alpha=0.7), steps), steps, strict=True):
        fresh = gradsurg.weights(J @ J.T, "mgda")
        expected = fresh if expected is None else 0.7 * expected + 0.3 * fresh  # Zhou et al. 2022, algorithm 1
        assert torch.allclose(ours, expected, atol=1e-14)
    peer = CRMOGMWeighting(MGDAWeighting(epsilon=1e-9, max_iters=5000), alpha=0.7)
    theirs = [peer(J @ J.T) for J in steps][-1]  # over 5000 iterations of Frank–Wolfe
    assert torch.allclose(expected, theirs, atol=2e-2)


def test_cr_mogm_may_conflict_in_later_steps():
    steps = [matrix(3, 0), -matrix(3, 0) + 0.5, matrix(3, 1), matrix(3, 2)]
    worst = min(float((J @ (w @ J)).min()) for J, w in zip(steps, over_steps(CRMOGM(), steps), strict=True))
    assert worst < 0
    problem = Problem(steps[1] @ steps[1].T, torch.ones(3).double(), names(3))
    assert torch.equal(CRMOGM(alpha=0.0).weights(problem, {})[0], MGDA().weights(problem, {})[0])


@cases
def test_excess_mtl(m, seed):
    steps, r = [matrix(m, 10 * seed + k) for k in range(6)], preferences(m)
    squares, baseline, log_weights = torch.zeros(m).double(), None, torch.zeros(m).double()
    for ours, J in zip(over_steps(ExcessMTL(0.5), steps, r), steps, strict=True):
        squares += J.square().sum(1)
        excess = J.square().sum(1) / squares.sqrt()  # equations 6 and 7, with one number for H
        if baseline is None:
            baseline = excess
        else:
            log_weights += 0.5 * excess / baseline  # equation 9
        assert torch.allclose(ours, (log_weights + r.log()).softmax(0), atol=1e-12)


@pytest.mark.parametrize("warmup", [1, 3])
def test_excess_mtl_of_the_peer_for_one_parameter(warmup):
    """With P = 1 the diagonal Hessian is one number; the peer adds 1e-7 to it."""
    steps = [matrix(4, k, P=1) for k in range(8)]
    peer = ExcessMTLWeighting(robust_step_size=0.5, n_warmup_steps=warmup)
    for ours, J in zip(over_steps(ExcessMTL(0.5, warmup), steps), steps, strict=True):
        assert torch.allclose(ours, peer(J), atol=1e-4)


def test_excess_mtl_lifts_the_task_that_does_not_improve():
    steps = [torch.tensor([[1.0, 0.0], [0.0, 0.8**k]], dtype=torch.float64) for k in range(30)]
    weights = over_steps(ExcessMTL(), steps)
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[-1][0] > 0.9


def pcd_by_quadprog(J, tau, scales):
    """min ½‖d − a_0‖² s.t. ⟨a_j, d⟩ ≥ τ‖a_j‖², over all P numbers; None where there is no such d."""
    A = (J * scales[:, None]).numpy()
    try:
        d = quadprog.solve_qp(np.eye(A.shape[1]), A[0], A[1:].T, tau * (A[1:] ** 2).sum(1))[0]
    except ValueError:
        d = A[0]
    return torch.tensor(d) * float(J[0].norm()) / np.linalg.norm(d)


@cases
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
def test_pcd(m, seed, tau):
    steps = [matrix(m, 10 * seed + k) * (1 + k) for k in range(4)]
    average = torch.zeros(m).double()
    peer = PEER_PCD(tau=tau, beta=0.9, eps=0.0)
    for k, (weights, J) in enumerate(zip(over_steps(PCD(tau=tau, beta=0.9), steps), steps, strict=True)):
        average = 0.9 * average + 0.1 * J.square().sum(1)
        expected = pcd_by_quadprog(J, tau, (average / (1 - 0.9 ** (k + 1))).rsqrt())
        assert torch.allclose(weights @ J, expected, atol=1e-9)
        assert torch.allclose(weights @ J, peer(J), atol=1e-7)


def test_pcd_of_shares_that_cannot_be_met():
    J = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    assert gradsurg.combine(J, PCD(tau=0.5)).tolist() == J[0].tolist()
    assert gradsurg.combine(J[:2] * torch.tensor([[-1.0], [1.0]]), PCD(tau=0.5))[1] > 0
    with pytest.raises(ValueError, match=r"primary='2' is not a task of this step: those are \['0', '1'\]"):
        gradsurg.combine(J[:2], PCD(primary="2"))
    swapped = gradsurg.combine(J[[1, 0]], PCD(primary="1", tau=0.5))
    assert torch.allclose(swapped, gradsurg.combine(J[:2], PCD(tau=0.5)), atol=1e-15)


@pytest.mark.parametrize(("byzantine", "selected"), [(0, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("seed", range(10))
def test_krum(byzantine, selected, seed):
    J, r = matrix(8, seed), preferences(8)
    distances = (J[:, None] - J).square().sum(-1)
    near = distances.fill_diagonal_(math.inf).sort(dim=1).values[:, : 8 - byzantine - 2]
    best = near.sum(1).argsort()[:selected]  # Blanchard et al. 2017, section 4
    u = gradsurg.combine(J, Krum(byzantine, selected))
    assert torch.allclose(u, J[best].mean(0), atol=1e-12)
    preferred = gradsurg.combine(J, Krum(byzantine, selected), preferences=r)
    assert torch.allclose(preferred, (r[best] @ J[best]) / r[best].sum(), atol=1e-12)


def test_krum_of_the_peer_and_of_the_paper():
    agree = 0
    for seed in range(100):
        J = matrix(8, seed, P=2)
        ours, theirs = gradsurg.weights(J @ J.T, Krum(2)), KrumWeighting(n_byzantine=2)(J @ J.T)
        agree += torch.equal(ours, theirs)
    assert 70 <= agree < 100, "the peer adds up distances, the paper their squares"


def test_krum_is_not_turned_by_corrupt_gradients():
    honest = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + matrix(5, 0, P=3) / 10
    J = torch.cat([honest, torch.full((1, 3), -1e6).double()])
    assert (gradsurg.combine(J, Krum(1)) - honest.mean(0)).norm() < 0.5
    assert gradsurg.combine(J, "mean").norm() > 1e5


def test_krum_shares_a_tie():
    assert gradsurg.weights(torch.eye(2), "krum").tolist() == [0.5, 0.5]
    J = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    assert gradsurg.weights(J @ J.T, "krum").tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("surgery", STATEFUL, ids=lambda s: s.name)
def test_state_is_plain_and_pure(surgery):
    """Nothing but what a state dict may hold, and the state handed in is left as it was."""
    state = {}
    for seed in range(3):
        J = matrix(3, seed)
        before = repr(state)
        _, new = surgery.weights(Problem(J @ J.T, torch.ones(3).double(), names(3)), state)
        assert repr(state) == before
        assert plain(new)
        assert new != {}
        state = new


def plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(x) for key, x in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (int, float, str) or isinstance(value, torch.Tensor)


@pytest.mark.parametrize("surgery", STATEFUL, ids=lambda s: s.name)
def test_tasks_come_and_go(surgery):
    """A task that is away keeps what is known of it; order and company do not matter to whose memory is whose."""
    J = matrix(4, 3)

    def step(rows, state):
        part = J[rows] * torch.tensor([[10.0 ** (i * len(rows) % 3)] for i in rows])
        tasks = tuple(f"task {i}" for i in rows)
        return surgery.weights(Problem(part @ part.T, torch.ones(len(rows)).double(), tasks), state)

    state = {}
    for rows in ([0, 1, 2], [0, 1], [0, 1, 2, 3], [0], [0, 1, 2]):
        weights, state = step(rows, state)
        assert torch.isfinite(weights).all()
        assert len(weights) == len(rows)
    forth, _ = step([0, 1, 2, 3], state)
    order = [0, 3, 2, 1]  # the first is PCD's primary
    back, _ = step(order, state)
    assert torch.allclose(back, forth[torch.tensor(order)], atol=1e-12)
    fresh, _ = step([0, 1, 2, 3], {})
    assert not torch.allclose(forth, fresh, atol=1e-6), "it does remember"


@pytest.mark.parametrize("surgery", STATEFUL, ids=lambda s: s.name)
def test_blocks_remember_apart(surgery):
    Gs = [torch.stack([matrix(3, s) @ matrix(3, s).T, matrix(3, s + 50) @ matrix(3, s + 50).T]) for s in range(4)]
    ones, together, apart = torch.ones(3).double(), {}, [{}, {}]
    for G in Gs:
        weights, together = surgery.weights(Problem(G, ones, names(3)), together)
        for i in range(2):
            alone, apart[i] = surgery.weights(Problem(G[i], ones, names(3)), apart[i])
            assert torch.allclose(weights[i], alone, atol=1e-13)
    weights, _ = surgery.weights(Problem(Gs[0][0], ones, names(3)), together)  # another number of blocks
    afresh, _ = surgery.weights(Problem(Gs[0][0], ones, names(3)), {})
    assert torch.allclose(weights, afresh, atol=1e-13)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Krum(-1), "byzantine=-1"),
        (lambda: Krum(selected=0), "selected=0"),
        (lambda: PCD(tau=2), "tau=2"),
        (lambda: PCD(beta=1), "beta=1"),
        (lambda: PCD(eps=-1), "eps=-1"),
        (lambda: SDMGrad(pull=-1), "pull=-1"),
        (lambda: SDMGrad(iterations=-1), "iterations=-1"),
        (lambda: SDMGrad(lr=0), "lr=0"),
        (lambda: SDMGrad(momentum=1), "momentum=1"),
        (lambda: MoDo(gamma=0), "gamma=0"),
        (lambda: MoDo(rho=-1), "rho=-1"),
        (lambda: MoDo(units="x"), "units='x'"),
        (lambda: CRMOGM(inner="mgda"), "inner='mgda'"),
        (lambda: CRMOGM(alpha=2), "alpha=2"),
        (lambda: ExcessMTL(0), "step_size=0"),
        (lambda: ExcessMTL(warmup=-1), "warmup=-1"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_cr_mogm_around_a_random_method():
    J, generator = matrix(3, 0), torch.Generator().manual_seed(1)
    weights = gradsurg.weights(J @ J.T, CRMOGM(Random()), generator=generator)
    assert torch.equal(weights, gradsurg.weights(J @ J.T, "random", generator=torch.Generator().manual_seed(1)))
