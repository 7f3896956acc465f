"""mean, random, IMTL-G, GradVac, Aligned-MTL, ConFIG: each paper's formula over the rows in float64, and the peers."""

import itertools
import math

import pytest
import torch
from conflictfree.grad_operator import ConFIG_update
from torchjd.aggregation import IMTLG as PEER_IMTLG
from torchjd.aggregation import AlignedMTL as PeerAlignedMTL
from torchjd.aggregation import ConFIG as PeerConFIG
from torchjd.aggregation import GradVacWeighting as PeerGradVac
from torchjd.aggregation import Mean as PeerMean

import gradsurg
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import AlignedMTL, GradVac, Random
from tests.matrices import matrix, preferences


def same_direction(u, v):
    return (u / u.norm() - v / v.norm()).abs().max() < 1e-7


cases = pytest.mark.parametrize(("m", "seed"), list(itertools.product([2, 3, 5, 8], range(10))))


@cases
def test_mean(m, seed):
    J, r = matrix(m, seed), preferences(m)
    assert torch.allclose(gradsurg.combine(J, "mean"), J.mean(0), atol=1e-14)
    assert torch.allclose(gradsurg.combine(J, "mean"), PeerMean()(J), atol=1e-14)
    assert torch.allclose(gradsurg.combine(J, "mean", preferences=r), (r @ J) / r.sum(), atol=1e-14)
    J[0] = 0
    assert torch.allclose(gradsurg.combine(J, "mean"), J[1:].mean(0), atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_random(seed):
    G, r = torch.eye(4, dtype=torch.float64), preferences(4)
    z = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = gradsurg.weights(G, "random", generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(drawn, z.softmax(0), atol=1e-15)  # Lin et al. 2022, algorithm 2
    preferred = gradsurg.weights(G, "random", generator=torch.Generator().manual_seed(seed), preferences=r)
    assert torch.allclose(preferred, (z + r.log()).softmax(0), atol=1e-15)


def test_random_is_fair_on_average():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([gradsurg.weights(torch.eye(4), "random", generator=generator) for _ in range(4000)])
    assert (draws.mean(0) - 0.25).abs().max() < 0.01  # its standard error is 0.003
    assert draws.std(0).min() > 0.1


@cases
def test_imtl_g(m, seed):
    J, r = matrix(m, seed, spread=0.3), preferences(m)
    norms = J.norm(dim=1)
    weights = gradsurg.weights(J @ J.T, "imtl_g")
    # Liu et al. 2021, equation 8, for the weights of all tasks but the first.
    unit = J / norms[:, None]
    D, U = J[0] - J[1:], unit[0] - unit[1:]
    others = J[0] @ U.T @ torch.linalg.inv(D @ U.T)
    assert torch.allclose(weights[1:], others, rtol=1e-7, atol=1e-9)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    projections = unit @ gradsurg.combine(J, "imtl_g", preferences=r)
    assert torch.allclose(projections / r, (projections / r)[0], rtol=1e-7)
    assert torch.allclose(gradsurg.combine(J, "imtl_g"), PEER_IMTLG()(J), rtol=1e-7, atol=1e-9)


def test_imtl_g_where_the_peer_is_inexact():
    """The peer compares Σ v, which is of the size of 1 / ‖g‖, with 1e-12, and inverts rows of unequal norm unscaled."""
    J = matrix(3, 0)
    assert torch.equal(PEER_IMTLG()(J * 1e15), torch.zeros(10, dtype=torch.float64))
    assert torch.allclose(gradsurg.combine(J * 1e15, "imtl_g"), 1e15 * gradsurg.combine(J, "imtl_g"), rtol=1e-9)
    spread = J * torch.tensor([[1e-9], [1.0], [1.0]])
    unit = spread / spread.norm(dim=1, keepdim=True)
    ours, theirs = unit @ gradsurg.combine(spread, "imtl_g"), unit @ PEER_IMTLG()(spread)
    assert ours.max() - ours.min() < 1e-6 * ours.abs().max()
    assert theirs.max() - theirs.min() > 0.5 * theirs.abs().max()


def test_imtl_g_can_turn_against_everybody_and_not_with_normalised_rows():
    # The middle one of three agreeing gradients has a negative coefficient; if it is short, a large negative weight.
    J = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.6, 0.1], [0.0, 1.0, 0.0]], dtype=torch.float64)
    J[1] /= 100
    assert (J @ J.T >= 0).all(), "nobody is in conflict"
    assert (J @ gradsurg.combine(J, "imtl_g")).max() < 0
    assert (J @ gradsurg.combine(J, "imtl_g", normalize="norm")).min() > 0


@cases
@pytest.mark.parametrize("length", ["min", "median", "rmse"])
def test_aligned_mtl(m, seed, length):
    J, r = matrix(m, seed), preferences(m)
    # Senushkin et al. 2023, algorithm 1, by the singular values of the rows themselves.
    U, S, Vh = torch.linalg.svd(J, full_matrices=False)
    sigma = {"min": S.min(), "median": S.square().median().sqrt(), "rmse": S.square().mean().sqrt()}[length]
    aligned = sigma * U @ Vh
    surgery = AlignedMTL(length=length)
    assert torch.allclose(gradsurg.combine(J, surgery), aligned.sum(0), atol=1e-9)
    assert torch.allclose(gradsurg.combine(J, surgery, preferences=r), r @ aligned, atol=1e-9)
    if length != "median" or m % 2:  # of an even number the peer's list is in the other order: its upper one is lower
        assert torch.allclose(PeerAlignedMTL(scale_mode=length)(J) * m, gradsurg.combine(J, surgery), atol=1e-9)


@pytest.mark.parametrize("length", ["min", "median", "rmse"])
def test_aligned_mtl_of_dependent_rows(length):
    J = matrix(2, 0)
    J = torch.stack([J[0], J[1], J[0] + J[1], J[0] - 2 * J[1]])
    U, S, Vh = (part for part in torch.linalg.svd(J, full_matrices=False))
    U, S, Vh = U[:, :2], S[:2], Vh[:2]
    sigma = {"min": S.min(), "median": S.square().median().sqrt(), "rmse": S.square().mean().sqrt()}[length]
    assert torch.allclose(gradsurg.combine(J, AlignedMTL(length=length)), (sigma * U @ Vh).sum(0), atol=1e-9)


@cases
def test_config(m, seed):
    J, r = matrix(m, seed, spread=0.5), preferences(m)
    for pull, options in ((torch.ones(m, dtype=torch.float64), {}), (r, {"preferences": r})):
        unit = J / J.norm(dim=1, keepdim=True)
        best = torch.linalg.pinv(unit) @ pull  # Liu et al. 2024, equation 2
        best = best / best.norm()
        u = gradsurg.combine(J, "config", **options)
        assert torch.allclose(u, (J @ best).sum() * best, rtol=1e-7, atol=1e-9)
        cosines = unit @ u / u.norm()
        assert torch.allclose(cosines / pull, (cosines / pull)[0], atol=1e-8)
        assert cosines.min() > 0
    assert torch.allclose(gradsurg.combine(J, "config"), PeerConFIG()(J), rtol=1e-7, atol=1e-9)


@cases
def test_config_of_its_authors(m, seed):
    J = matrix(m, seed).float()
    assert torch.allclose(ConFIG_update(J), gradsurg.combine(J, "config"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("m", [4, 6, 9])
def test_config_of_dependent_rows_is_the_least_squares_direction(m):
    J = matrix(m, m, P=3)
    unit = J / J.norm(dim=1, keepdim=True)
    best = torch.linalg.lstsq(unit, torch.ones(m, 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
    assert same_direction(gradsurg.combine(J, "config") * torch.sign((J @ best).sum()), best)


def vaccinate(J, usual, beta, orders, r):
    """Wang et al. 2021, algorithm 1, on the rows themselves; `usual` is updated in place."""
    total = torch.zeros(J.shape[1], dtype=torch.float64)
    for i in range(len(J)):
        g = J[i].clone()
        for j in orders[i]:
            if j == i:
                continue
            phi, goal = float(g @ J[j] / (g.norm() * J[j].norm())), usual[i][j]
            if phi < goal:
                across = math.sqrt(1 - goal**2)
                g = g + J[j] * g.norm() * (goal * math.sqrt(1 - phi**2) - phi * across) / (J[j].norm() * across)
            usual[i][j] = (1 - beta) * goal + beta * phi
        total += r[i] * g
    return total


@pytest.mark.parametrize("beta", [0.01, 0.5])
@pytest.mark.parametrize("m", [2, 3, 6])
def test_gradvac_over_many_steps(m, beta):
    r, state, usual = preferences(m), {}, [[0.0] * m for _ in range(m)]
    tasks, highest = tuple(f"task {i}" for i in range(m)), 0.0
    for seed in range(20):
        J = matrix(m, seed) + (seed % 7) / 4  # from conflict to agreement and back
        problem = Problem(J @ J.T, r, tasks, generator=torch.Generator().manual_seed(seed))
        weights, state = GradVac(beta).weights(problem, state)
        drawn = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(m, generator=drawn).tolist() for _ in range(m)]
        assert torch.allclose(weights @ J, vaccinate(J, usual, beta, orders, r), rtol=1e-9, atol=1e-9)
        highest = max(highest, *map(max, usual))
    if beta == 0.5:
        assert highest > 0.3, "else no goal but 0 was ever tried"


def test_gradvac_makes_a_pair_as_similar_as_it_usually_is():
    agreeing, conflicting = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    tasks, r, state = ("a", "b"), torch.ones(2, dtype=torch.float64), {}
    for J in [agreeing] * 200:
        _, state = GradVac(0.1).weights(Problem((J @ J.T).double(), r, tasks), state)
    assert state["blocks"][0]["a"]["b"] == pytest.approx(0.8, abs=1e-6)
    weights, _ = GradVac(0.1).weights(Problem((conflicting @ conflicting.T).double(), r, tasks), state)
    u = weights @ conflicting.double()
    # Each turns towards the other until their cosine is 0.8; the two together lie in the middle.
    assert (conflicting.double() @ u).min() > 0


def test_gradvac_against_the_peer():
    for seed in range(10):  # with two tasks there is no order to draw; the peer adds 1e-8 to denominators
        J = matrix(2, seed)
        theirs = PeerGradVac(beta=0.5)(J @ J.T)
        assert torch.allclose(gradsurg.weights(J @ J.T, GradVac(0.5)), theirs, rtol=1e-6)


@pytest.mark.parametrize("name", ["imtl_g", "config", "aligned_mtl"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_that_is_not_finite_stays_alone(name, bad):
    G = torch.stack([matrix(3, 0) @ matrix(3, 0).T, torch.full((3, 3), bad).double()])
    weights = gradsurg.weights(G, name)
    assert torch.allclose(weights[0], gradsurg.weights(G[0], name))
    assert weights[1].isnan().all()


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"length='rms' is not known: use one of 'min', 'median', 'rmse'"):
        AlignedMTL(length="rms")
    with pytest.raises(ValueError, match=r"beta=2: must lie in \[0, 1\]"):
        GradVac(beta=2)
    assert Random() == Random()
