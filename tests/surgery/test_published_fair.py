"""CAGrad, Nash-MTL, FairGrad: their programs solved plainly or certified over the rows in float64, and the peers."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torchjd.aggregation import FairGradWeighting as PeerFairGrad

import gradsurg
from gradsurg.solvers.bargain import _solve
from gradsurg.surgery import MGDA, CAGrad, FairGrad, NashMTL
from tests.matrices import FAMILIES, draw, matrix, preferences


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


cases = pytest.mark.parametrize(("m", "seed"), list(itertools.product([2, 3, 5, 8], range(10))))
quiet = pytest.mark.filterwarnings("ignore")  # cvxpy warns of its own matters


def certify_cagrad(J, r, c, u, tolerance=1e-10):
    """u is feasible, and no direction in the ball does better: the dual of algorithm 1 has the same value."""
    mean = (r / r.sum()) @ J
    radius = c * mean.norm()
    assert (u - mean).norm() <= radius * (1 + 1e-12) + 1e-15
    worst = (J @ u).min()
    w, _ = scipy.optimize.nnls(J.T.numpy(), (u - mean).numpy())  # u − g_0 = Σ y_i g_i with y ≥ 0
    w = torch.tensor(w / max(w.sum(), 1e-300))
    if radius > 0 and w.sum() > 0:
        elementwise_direction = w @ J
        assert (
            abs(elementwise_direction @ mean + radius * elementwise_direction.norm() - worst)
            <= tolerance * J.norm(dim=1).max() ** 2
        )


@cases
@pytest.mark.parametrize("c", [0.0, 0.4, 1.0, 3.0])
def test_cagrad(m, seed, c):
    J, r = matrix(m, seed), preferences(m)
    certify_cagrad(J, torch.ones(m, dtype=torch.float64), c, gradsurg.combine(J, CAGrad(c)))
    certify_cagrad(J, r, c, gradsurg.combine(J, CAGrad(c), preferences=r))


@pytest.mark.parametrize("seed", range(6))
def test_cagrad_by_its_dual(seed):
    """Liu et al. 2021, algorithm 1: w over the simplex by scipy, then the update."""
    J, c = matrix(4, seed), 0.5
    mean = J.mean(0)
    radius = float(c * mean.norm())

    def dual(w):
        elementwise_direction = torch.tensor(w) @ J
        return float(elementwise_direction @ mean + radius * elementwise_direction.norm())

    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = scipy.optimize.minimize(
        dual, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=simplex, tol=1e-14, options={"maxiter": 500}
    )
    elementwise_direction = torch.tensor(found.x) @ J
    assert torch.allclose(
        gradsurg.combine(J, CAGrad(c)), mean + radius * elementwise_direction / elementwise_direction.norm(), atol=1e-4
    )


@quiet
@pytest.mark.parametrize(("m", "seed"), [(2, 0), (3, 1), (5, 2), (8, 3)])
def test_cagrad_of_the_peer(m, seed):
    from torchjd.aggregation import CAGradWeighting

    J = matrix(m, seed)
    theirs = CAGradWeighting(c=0.5, norm_eps=0.0)(J @ J.T) @ J  # an interior-point answer of the same program
    assert torch.allclose(gradsurg.combine(J, CAGrad(0.5)), theirs, atol=1e-4)


def test_cagrad_where_several_directions_are_best():
    """Pareto stationary rows: the worst gain is 0 at most, and within the ball the nearest point to the mean has it."""
    surrounding = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-0.5, -2.0]], dtype=torch.float64)
    assert gradsurg.combine(surrounding, CAGrad(1.5)).norm() < 1e-15
    assert gradsurg.combine(surrounding, CAGrad(0.5)).norm() > 0.1, "c < 1 goes on to the minimum of the mean"
    opposite = torch.tensor([[1.0, 0.0, 1.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    for c in (0.5, 1.5):
        certify_cagrad(opposite, torch.ones(3, dtype=torch.float64), c, gradsurg.combine(opposite, CAGrad(c)))
    line = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    assert gradsurg.combine(line, CAGrad(0.5)).tolist() == pytest.approx([-0.5])  # −1 + c: as little harm as allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_cagrad_of_hostile_gradients(family):
    for m, seed in itertools.product([2, 3, 5, 8], range(5)):
        J = draw(family, m, 20, seed)
        alive = J[J.norm(dim=1) > 0]
        if len(alive) == 0:
            continue
        for c in (0.5, 2.0):
            u = gradsurg.combine(J, CAGrad(c))
            assert torch.isfinite(u).all()
            mean = alive.mean(0)
            # Rows opposite to δ cancel to δ in u: the rounding of their squares, some 1e-14, becomes 1e-14 / δ².
            slack = {f"nearly opposite 1e-{k}": 10 ** (2 * k - 14) for k in (2, 4, 6)}.get(family, 1e-12)
            assert (u - mean).norm() <= c * mean.norm() * (1 + slack) + 1e-14 * J.norm(dim=1).max()
            assert (alive @ u).min() >= (alive @ mean).min() - slack * J.norm(dim=1).max() ** 2


@cases
def test_nash_mtl(m, seed):
    J, r = matrix(m, seed), preferences(m)
    G = J @ J.T
    for pull, options in ((torch.ones(m, dtype=torch.float64), {}), (r, {"preferences": r})):
        alpha = gradsurg.weights(G, NashMTL(units="absolute"), **options)
        assert torch.allclose(alpha * (G @ alpha), pull, rtol=1e-9)  # Navon et al. 2022, claim 3.1
        assert alpha.min() > 0
        relative = gradsurg.weights(G, "nash_mtl", **options)
        assert torch.allclose(relative, alpha * G.diagonal().mean().sqrt(), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_nash_mtl_maximises_the_product_of_gains(seed):
    J = matrix(3, seed)
    u = gradsurg.combine(J, "nash_mtl")
    best = float((J @ (u / u.norm())).log().sum())
    generator = torch.Generator().manual_seed(seed)
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            v = u / u.norm() + step * torch.randn(10, generator=generator, dtype=torch.float64)
            gains = J @ (v / v.norm())
            assert gains.min() <= 0 or float(gains.log().sum()) <= best + 1e-12


@cases
def test_nash_mtl_ignores_the_scale_of_a_loss(m, seed):
    J = matrix(m, seed)
    factors = 10.0 ** torch.linspace(-6, 6, m, dtype=torch.float64)[:, None]
    assert cosine(gradsurg.combine(J * factors, "nash_mtl"), gradsurg.combine(J, "nash_mtl")) > 1 - 1e-9


@quiet
def test_nash_mtl_of_the_peer():
    from torchjd.aggregation import NashMTL as PeerNashMTL

    def theirs(J):
        return PeerNashMTL(n_tasks=len(J), max_norm=0.0, update_weights_every=1, optim_niter=100)(J)

    for m, seed in ((2, 0), (2, 1), (3, 0)):  # theirs is scaled by √‖G‖
        J = matrix(m, seed)
        assert cosine(theirs(J), gradsurg.combine(J, "nash_mtl")) > 1 - 1e-6
    # Like the authors' code it stops when two linearised steps agree, or when the solver gives up, wherever that is.
    J = matrix(3, 1)
    assert (J @ theirs(J)).min() < 0
    assert (J @ gradsurg.combine(J, "nash_mtl")).min() > 0


@cases
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 5.0])
def test_fairgrad(m, seed, alpha):
    J, r = matrix(m, seed), preferences(m)
    G = J @ J.T
    for pull, options in ((torch.ones(m, dtype=torch.float64), {}), (r, {"preferences": r})):
        w = gradsurg.weights(G, FairGrad(alpha, units="absolute"), **options)
        assert torch.allclose((G @ w) ** alpha * w, pull, rtol=1e-8)  # Ban & Ji 2024, equation 4
        relative = gradsurg.weights(G, FairGrad(alpha), **options)
        assert torch.allclose((G / G.diagonal().mean() @ relative) ** alpha * relative, pull, rtol=1e-8)
    if m == 2:
        theirs = PeerFairGrad(alpha=alpha)(G)  # scipy's least squares on the same equation, to 1e-8 in the squares
        assert torch.allclose(gradsurg.weights(G, FairGrad(alpha, units="absolute")), theirs, rtol=1e-2)


def test_fairgrad_from_the_cone_to_mgda():
    J = matrix(4, 1)
    assert torch.equal(gradsurg.weights(J @ J.T, FairGrad(1.0)), gradsurg.weights(J @ J.T, "nash_mtl"))
    assert cosine(gradsurg.combine(J, FairGrad(0.02)), gradsurg.combine(J, "cone")) > 0.999
    assert cosine(J.sum(0), gradsurg.combine(J, "cone")) < 0.995
    closer = [cosine(gradsurg.combine(J, FairGrad(alpha)), gradsurg.combine(J, MGDA())) for alpha in (1.0, 4.0, 32.0)]
    assert closer == sorted(closer)
    assert closer[-1] > 0.999


@pytest.mark.parametrize("surgery", [NashMTL(), FairGrad(0.5), FairGrad(2.0), FairGrad(10.0)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_conflict_on_hostile_gradients(surgery, family):
    for m, seed in itertools.product([2, 3, 8], range(3)):
        J = draw(family, m, 20, seed)
        weights = gradsurg.weights(J @ J.T, surgery)
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()
        u = gradsurg.combine(J, surgery)
        alive = J.norm(dim=1) > 0
        if u.norm() > 0:
            assert (J[alive] @ u / (J[alive].norm(dim=1) * u.norm())).min() >= -1e-6
        elif alive.any():
            assert family in ("opposite", "rank 2", "nearly opposite 1e-6"), "only Pareto stationary points give 0"


@pytest.mark.parametrize(("alpha", "steps"), [(0.5, 40), (1.0, 20), (2.0, 40)])
def test_the_solver_needs_few_steps(alpha, steps):
    for family in set(FAMILIES) - {"nearly opposite 1e-6"}:
        for m, seed in itertools.product([2, 5], range(4)):
            J = draw(family, m, 20, seed)
            unit = J[J.norm(dim=1) > 0]
            unit = unit / unit.norm(dim=1, keepdim=True)
            log_q = (1 - alpha) * J[J.norm(dim=1) > 0].norm(dim=1).log()
            if len(unit):
                beta, taken = _solve((unit @ unit.T).tolist(), (log_q - log_q.mean()).tolist(), alpha)
                assert taken <= steps, f"{family} {m} {seed}: {beta}"


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"c=-1: must be finite and not negative"):
        CAGrad(-1)
    with pytest.raises(ValueError, match=r"alpha=0: must be positive and finite; 0 is the plain sum"):
        FairGrad(0)
    with pytest.raises(ValueError, match=r"units='relativ' is not known.*Did you mean 'relative'"):
        NashMTL(units="relativ")
