"""The nonnegative program, judged by its optimality conditions, by scipy and by quadprog."""

import numpy as np
import pytest
import quadprog
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsurg.solvers.active_set import bound, solve_small
from gradsurg.solvers.nonnegative import SMALL, nonnegative, path
from gradsurg.solvers.pivoting import TURNS, solve_batched
from gradsurg.solvers.rows import project_rows
from tests.matrices import FAMILIES, draw

EXACT = 4e-16
TWINS = ["small", "batched"]


def _ill_conditioned(m, seed):
    """Singular values from 1 down to 1e-5."""
    rng = np.random.default_rng(seed)
    left, right = (
        np.linalg.qr(rng.standard_normal((m, m)))[0],
        np.linalg.qr(rng.standard_normal((2 * m, m)))[0],
    )
    return left @ np.diag(np.logspace(0, -5, m)) @ right.T


def _bundle(m, seed):
    """All rows within 1e-3 of one line, pointing either way along it."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(2 * m) + 1e-3 * rng.standard_normal((m, 2 * m))) * rng.choice([1.0, -1.0], (m, 1))


def _half_rank(m, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, max(1, m // 2))) @ rng.standard_normal((max(1, m // 2), 2 * m))


def _one_line(m, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, 1)) @ rng.standard_normal((1, 2 * m))


def _more_rows_than_columns(m, seed):
    return np.random.default_rng(seed).standard_normal((m, max(2, m // 3)))


MORE = {f.__name__[1:]: f for f in (_ill_conditioned, _bundle, _half_rank, _one_line, _more_rows_than_columns)}
KINDS = [*FAMILIES, *MORE]


def matrix(kind, m, seed):
    return torch.tensor(MORE[kind](m, seed)) if kind in MORE else draw(kind, m, max(2 * m, 8), seed)


def program(kind, m, seed):
    """Return J, G, the target's coefficients r and length, or None where the target is nothing but rounding."""
    J = matrix(kind, m, seed)
    r = torch.ones(m, dtype=torch.float64)
    if seed % 2:
        r = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    length = (r @ J).norm()
    if length <= 1e-7 * (r * J.norm(dim=1)).sum():
        return None
    return J, (J[:, None] * J).sum(-1), r, length


def solve(twin, G, b, scale):
    """Return λ and the number of changes of the passive set."""
    if twin == "small":
        answers, counts = solve_small(G.tolist(), [b.tolist()], None, [float(scale)], EXACT)
        return torch.tensor(answers[0], dtype=torch.float64), counts[0]
    answer, counts = solve_batched(G[None], b[None], None, scale[None], EXACT)
    return answer[0], counts[0]


def kkt_residual(G, b, lam, scale):
    """max |min(λ_i, r_i)| with rows scaled to unit length and the target to length one: 0 only at the answer."""
    norms = G.diagonal().sqrt()
    s = torch.where(norms > 0, 1 / norms, 0)
    slack = (G @ lam + b) * s / scale
    multiplier = lam * norms / scale
    return float(torch.where(norms > 0, torch.minimum(multiplier, slack), 0).abs().max())


def slack_and_products(G, b, lam, length):
    """min r_i, max |λ_i r_i| and Σλ in units of rows and target of length one, in 80-bit arithmetic."""
    wide = [x.numpy().astype(np.longdouble) for x in (G, b, lam)]
    norms = np.sqrt(np.diag(wide[0]))
    r = (wide[0] @ wide[2] + wide[1]) / np.where(norms > 0, norms, 1) / float(length)
    multipliers = wide[2] * norms / float(length)
    return float(r.min()), float(np.abs(multipliers * r).max()), float(multipliers.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16, 32, 64])
def test_optimality_conditions(kind, m):
    for seed in range(8 if m <= 16 else 2):
        instance = program(kind, m, seed)
        if instance is None:
            continue
        _, G, r, length = instance
        b = G @ r
        for twin in TWINS:
            lam, count = solve(twin, G, b, length)
            assert (lam >= 0).all()
            slack, product, total = slack_and_products(G, b, lam, length)
            assert slack >= -1e-9, (twin, seed)
            # λ is a float64: rounding it turns r by 1e-16 Σλ, and no answer can be better than that.
            assert product <= 1e-15 * (1 + total) ** 2, (twin, seed)
            assert kkt_residual(G, b, lam, length) <= 1e-9, (twin, seed)
            assert count <= 2 * m + 2 + (TURNS if twin == "batched" else 0)
            assert count < bound(m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [2, 5, 16, 64])
def test_scipy_finds_the_same_point(kind, m):
    for seed in range(4 if m <= 16 else 1):
        instance = program(kind, m, seed)
        if instance is None:
            continue
        J, G, r, length = instance
        norms = J.norm(dim=1, keepdim=True)
        unit = (J / norms.where(norms > 0, torch.ones_like(norms))).numpy()  # nnls has absolute tolerances
        t = (r @ J) / length
        theirs = t.numpy() + scipy.optimize.nnls(unit.T, -t.numpy(), maxiter=1000)[0] @ unit
        ours = (t + nonnegative(G, G @ r, scale=length) @ J / length).numpy()
        # From G alone u is known to its rounding over the square of the angle by which rows miss dependence.
        tolerance = {"nearly opposite 1e-6": 1e-3, "nearly opposite 1e-4": 1e-7}.get(kind, 1e-8)
        assert np.abs(ours - theirs).max() <= tolerance


@pytest.mark.parametrize("kind", ["random", "spread", "surrounding", "nearly opposite 1e-2", "huge", "tiny"])
@pytest.mark.parametrize("m", [2, 5, 16, 64])
def test_quadprog_finds_the_same_multipliers(kind, m):
    for seed in range(4):
        _, G, r, length = program(kind, m, seed)
        s = 1 / G.diagonal().sqrt()
        A, q = (G * s * s[:, None]).numpy(), (G @ r * s / length).numpy()
        theirs = quadprog.solve_qp(A, -q, np.eye(m), np.zeros(m))[0]
        ours = (nonnegative(G, G @ r, scale=length) / s / length).numpy()
        assert np.abs(ours - theirs).max() <= 1e-8 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_twins_agree(kind):
    for m in (2, 4, 9, 16):
        for seed in range(5):
            instance = program(kind, m, seed)
            if instance is None:
                continue
            J, G, r, length = instance
            us = [(r + solve(twin, G, G @ r, length)[0]) @ J / length for twin in TWINS]
            tolerance = {"nearly opposite 1e-6": 1e-3, "nearly opposite 1e-4": 1e-7}.get(kind, 1e-8)
            assert (us[0] - us[1]).abs().max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_rows_projected_by_themselves(kind):
    for m in (2, 3, 5, 8, 16, 20):
        for seed in range(5):
            J = matrix(kind, m, seed)
            G = (J[:, None] * J).sum(-1)
            got = project_rows(G)
            norms = J.norm(dim=1)
            for i in range(m):
                if norms[i] > 0:
                    assert kkt_residual(G, G[i], got[i], norms[i]) <= 1e-9
                else:
                    assert (got[i] == 0).all()


@pytest.mark.parametrize(
    ("m", "programs", "want"),
    [
        (8, SMALL // 64, "small"),
        (8, SMALL // 64 + 1, "batched"),
        (14, 1, "small"),
        (15, 1, "batched"),
        (1, SMALL, "small"),
        (1, SMALL + 1, "batched"),
    ],
)
def test_which_twin_runs(m, programs, want):
    assert path(m, programs) == want


@pytest.mark.parametrize("m", [1, 4, 7, 20, 32, 40])
def test_many_programs_are_those_one_by_one(m):
    """One Gramian and several, with and without a mask, below and above the size at which finished programs leave."""
    n = 36
    Js = torch.stack([draw("surrounding", m, 2 * m, seed) for seed in range(n)])
    several = Js @ Js.mT
    weights = torch.rand(n, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    some = torch.rand(n, m, generator=torch.Generator().manual_seed(m + 1)) < 0.7
    for G in (several[0], several):
        b = (G @ weights.unsqueeze(-1)).squeeze(-1)
        for allowed in (None, some):
            together, counts = solve_batched(G, b, allowed, None, EXACT)
            assert max(counts) <= TURNS
            assert torch.allclose(together, nonnegative(G, b, allowed=allowed), rtol=1e-9, atol=1e-12)
            for p in range(n):
                one = G if G.ndim == 2 else G[p]
                mask = None if allowed is None else [allowed[p].tolist()]
                alone, _ = solve_small(one.tolist(), [b[p].tolist()], mask, None, EXACT)
                assert torch.allclose(together[p], torch.tensor(alone[0], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_exchange_hands_over_what_it_cannot_finish():
    """Equal rows make the passive block singular; the other programs of the batch keep what exchange found."""
    J = draw("surrounding", 6, 12, 0)
    J[1] = J[0]
    fine = draw("surrounding", 6, 12, 1)
    G = torch.stack([J @ J.T, fine @ fine.T])
    b = G.sum(-1) - 2 * G[..., 0]  # t = Σ g_i − 2 g_0: rows 0 and 1 are both in conflict
    answer, counts = solve_batched(G, b, None, None, EXACT)
    assert counts[0] > counts[1]
    assert counts[1] <= TURNS
    for p in range(2):
        length = float((torch.tensor([-1.0, 1, 1, 1, 1, 1]).double() @ (J, fine)[p]).norm())
        assert kkt_residual(G[p], b[p], answer[p], length) <= 1e-12


def test_batches_are_solved_one_by_one():
    Js = torch.stack([draw("surrounding", 5, 12, seed) for seed in range(6)]).reshape(2, 3, 5, 12)
    G = Js @ Js.mT
    b = G.sum(-1)
    together = nonnegative(G, b)
    assert together.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            # max |b_i| / ‖g_i‖ as scale either way, so the same tolerances
            assert (together[i, j] - nonnegative(G[i, j], b[i, j])).abs().max() <= 1e-9 * (1 + together[i, j].max())


def test_broadcasting():
    G = draw("surrounding", 4, 8, 0) @ draw("surrounding", 4, 8, 0).T
    assert nonnegative(G.unsqueeze(-3), G).shape == (4, 4)
    assert nonnegative(torch.stack([G, 2 * G]), G.sum(0)).shape == (2, 4)
    allowed = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert nonnegative(G, G[0], allowed=allowed).shape == (2, 4)
    with pytest.raises(ValueError, match=r"must be \(\.\.\., m, m\)"):
        nonnegative(G, torch.ones(3))


@pytest.mark.parametrize("m", [4, 20])
def test_only_allowed_constraints_count(m):
    for seed in range(10):
        J = draw("surrounding", m, 2 * m, seed)
        G = J @ J.T
        allowed = torch.arange(m) % 3 > 0
        lam = nonnegative(G, G.sum(1), allowed=allowed)
        assert (lam[~allowed] == 0).all()
        inner = nonnegative(G[allowed][:, allowed], G.sum(1)[allowed])
        assert torch.allclose(lam[allowed], inner, rtol=1e-9, atol=1e-12)


@given(
    m=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["random", "spread", "surrounding"]),
)
def test_order_and_scale_change_nothing(m, seed, kind):
    J = draw(kind, m, 2 * m, seed)
    G = J @ J.T
    b = G.sum(1)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    norms = J.norm(dim=1)
    plain = nonnegative(G, b) * norms
    assert ((nonnegative(G[order][:, order], b[order]) * norms[order]) - plain[order]).abs().max() <= 1e-9 * norms.max()
    factor = 4.0 ** (seed % 20 - 10)
    assert torch.equal(
        nonnegative(G * factor, b * factor) * norms, plain
    )  # a power of four rounds nothing, nor its root


@given(m=st.integers(2, 16), seed=st.integers(0, 100_000), rank=st.integers(1, 4))
def test_integers_with_ties(m, seed, rank):
    """Small whole numbers: exact ties, duplicates, opposites and dependent rows all at once."""
    rng = np.random.default_rng(seed)
    J = torch.tensor(rng.integers(-2, 3, (m, rank)).astype(float))
    G = J @ J.T
    t = J.sum(0)
    if t.norm() == 0:
        assert (nonnegative(G, G.sum(1)) == 0).all()
        return
    for twin in TWINS:
        lam, count = solve(twin, G, G.sum(1), t.norm())
        assert kkt_residual(G, G.sum(1), lam, t.norm()) <= 1e-9
        assert count <= 2 * m + 2 + (TURNS if twin == "batched" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [1e-7, 4e-13])
def test_the_noise_of_the_gramian_is_respected(kind, noise):
    """A dependent row must not be inverted: no real cosine falls below −√(8 · rounding), and u is no longer than t."""
    for m in (2, 3, 5, 8, 16):
        for seed in range(5):
            instance = program(kind, m, seed)
            if instance is None or instance[3] < 1e-2 * (instance[2] * instance[0].norm(dim=1)).sum():
                continue  # b itself is known to noise / 1e-2 only
            J, G, r, length = instance
            norms = J.norm(dim=1)
            error = torch.tensor(np.random.default_rng(seed).uniform(-noise, noise, (m, m))) * norms * norms[:, None]
            noisy = G + (error + error.T) / 2
            for solved in (
                torch.tensor(
                    solve_small(noisy.tolist(), [(noisy @ r).tolist()], None, [length.item()], noise)[0][0],
                    dtype=torch.float64,
                ),
                solve_batched(noisy[None], (noisy @ r)[None], None, length[None], noise)[0][0],
            ):
                u = (r + solved) @ J / length
                assert (J @ u >= -((8 * noise) ** 0.5) * norms).all()
                assert u.norm() <= 1 + 1e-3


def test_nothing_to_do_is_exactly_nothing():
    G = torch.rand(5, 5, dtype=torch.float64)
    assert (nonnegative(G @ G.T, torch.rand(5)) == 0).all()
    assert (nonnegative(torch.zeros(3, 3), torch.zeros(3)) == 0).all()
    assert nonnegative(torch.zeros(0, 3, 3), torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [3, 20])
def test_not_a_number_stays_in_its_program(bad, m):
    good = draw("surrounding", m, 2 * m, 0)
    G = torch.stack([good @ good.T] * 3)
    b = G.sum(-1)
    G[1, 0, 0] = bad
    b[2, 1] = bad
    lam = nonnegative(G, b)
    assert torch.isfinite(lam[0]).all()
    assert lam[1].isnan().all()
    assert lam[2].isnan().all()
    assert nonnegative(G[1], b[0]).isnan().all()


def test_inputs_are_not_written():
    J = draw("surrounding", 5, 10, 0)
    G, b = J @ J.T, J @ J.sum(0)
    copies = G.clone(), b.clone()
    nonnegative(G, b)
    project_rows(G)
    assert torch.equal(G, copies[0])
    assert torch.equal(b, copies[1])
