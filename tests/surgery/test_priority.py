"""Who yields to whom: the two readings of primary and auxiliary, levels, names.

Properties are inequalities of ⟨u, g_i⟩, each judged against the rounding of its own terms, on hostile gradients.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import Unscaled
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import resolve_surgery
from gradsurg.surgery.pipeline import Pipeline
from gradsurg.surgery.priority import check_names, levels_of, order, parse_levels, protected
from tests.matrices import FAMILIES, draw

P = 10
families = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 10_000)
tasks = st.integers(2, 6)
# 1e-9 of Σ |w_i| ‖g_i‖ times ‖g_i‖: what is known of ⟨u, g_i⟩ when u is a sum of vectors of that total length, with
# room for a solver that stops at violations of √(8 · 4e-16) = 6e-8 of ‖u‖ only where G is singular.
ROUNDING = 1e-9


def progress(J, **options):
    """Return ⟨u, g_i⟩, how much of each is rounding, and u."""
    weights = gradsurg.weights(J @ J.T, **options)
    u = weights @ J
    norms = J.norm(dim=1)
    return J @ u, ROUNDING * float(weights.abs() @ norms) * norms + 1e-7 * u.norm() * norms, u


@families
@settings(max_examples=12)  # in each of 12 families
@given(m=tasks, seed=seeds, surgery=st.sampled_from(["sum", "cone", "upgrad", "mgda", "pcgrad"]))
def test_protect_improves_the_primary_by_the_square_of_the_step_and_hurts_nobody(family, m, seed, surgery):
    """⟨u, g_0⟩ = ‖u‖²: u is the projection of g_0 onto a cone. One primary: its surgery has nothing to do."""
    J = draw(family, m, P, seed)
    inner, error, u = progress(J, surgery=surgery, primary=0)
    assert (inner >= -error).all()
    assert abs(inner[0] - u @ u) <= error[0]
    assert u.norm() <= J[0].norm() * (1 + 1e-9), "a projection onto a cone does not lengthen"


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds)
def test_protect_with_one_auxiliary_in_closed_form(family, seed):
    """λ = relu(−⟨g_0, g_1⟩) / ‖g_1‖²."""
    J = draw(family, 2, P, seed)
    inner, square = float(J[0] @ J[1]), float(J[1] @ J[1])
    published = max(-inner, 0.0) / square if square else 0.0
    weights = gradsurg.weights(J @ J.T, primary=0)
    if family == "opposite":  # only u = 0 is left: both forms say so, with weights or without
        assert (weights @ J).norm() <= 1e-12 * J[0].norm()
        return
    assert float(weights[0]) == 1.0
    assert float(weights[1]) == pytest.approx(published, rel=1e-9)
    swapped = gradsurg.weights((J @ J.T).flip(0, 1), primary=1)
    assert swapped.tolist() == pytest.approx(weights.tolist()[::-1], rel=1e-12)


@given(m=tasks, seed=seeds)
def test_protect_is_the_nearest_direction_that_hurts_nobody(m, seed):
    """Optimality: u − g_0 is a nonnegative combination of auxiliaries that u is orthogonal to."""
    J = draw("surrounding", m, P, seed)
    weights = gradsurg.weights(J @ J.T, primary=0)
    inner = J @ (weights @ J)
    assert float(weights[0]) in (0.0, 1.0)
    assert (weights[1:] >= 0).all()
    assert (weights[1:] * inner[1:]).abs().max() <= 1e-9 * float(weights.abs() @ J.norm(dim=1)) ** 2


@families
@settings(max_examples=12)  # in each of 12 families
@given(m=tasks, seed=seeds, surgery=st.sampled_from(["sum", "cone", "upgrad", "mgda", "pcgrad"]))
def test_help_never_slows_the_primary(family, m, seed, surgery):
    """⟨u, g_0⟩ ≥ ‖g_0‖²."""
    J = draw(family, m, P, seed)
    inner, error, _ = progress(J, surgery=surgery, primary=0, auxiliary="help")
    assert inner[0] >= J[0] @ J[0] - error[0]


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds)
def test_help_with_one_auxiliary_in_closed_form(family, seed):
    """u = g_0 + a + relu(−⟨a, g_0⟩) / ‖g_0‖² g_0."""
    J = draw(family, 2, P, seed)
    inner, square = float(J[0] @ J[1]), float(J[0] @ J[0])
    published = 1 + (max(-inner, 0.0) / square if square else 0.0)
    weights = gradsurg.weights(J @ J.T, primary=0, auxiliary="help")
    assert weights.tolist() == pytest.approx([published, 1.0], rel=1e-9)


@pytest.mark.parametrize("surgery", ["sum", "cone", "upgrad", "pcgrad"])
@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds)
def test_a_lower_level_never_reduces_the_progress_of_a_higher_task(family, surgery, seed):
    """Levels are added one by one; each compares with the run that has not got it."""
    J = draw(family, 6, P, seed)
    levels = [[0], [1, 2], [3], [4, 5]]
    before = None
    for k in range(1, len(levels) + 1):
        rows = [i for level in levels[:k] for i in level]
        inner, error, _ = progress(J[rows], surgery=surgery, primary=levels[:k], auxiliary="help")
        if before is not None:
            n = len(before[0])
            assert (inner[:n] >= before[0] - before[1] - error[:n]).all()
        before = inner, error


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds, surgery=st.sampled_from(["cone", "upgrad", "mgda"]))
def test_protect_with_two_primaries_hurts_no_auxiliary(family, seed, surgery):
    J = draw(family, 5, P, seed)
    inner, error, _ = progress(J, surgery=surgery, primary=[[0, 1], [2], [3]])
    assert (inner[2:] >= -error[2:]).all()


def test_three_levels_by_hand():
    """Main along x; aux hurts main and is cut to y; reg hurts aux and main and is cut to z."""
    J = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -2.0, 1.0]], dtype=torch.float64)
    u = gradsurg.combine(J, primary=[[0], [1], [2]], auxiliary="help")
    # main (1, 0, 0); aux + 1·main (0, 1, 0); reg made harmless to both: nearest to (-1, -2, 1) with x ≥ 0, y ≥ x is z.
    assert u.tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)
    two = gradsurg.combine(J, primary=[[0], [1, 2]], surgery="sum", auxiliary="help")
    # aux + reg = (-2, -1, 1) has only main to spare.
    assert two.tolist() == pytest.approx([1.0, -1.0, 1.0], abs=1e-12)


@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds, auxiliaries=st.permutations(range(1, 5)), auxiliary=st.sampled_from(["protect", "help"]))
def test_the_order_of_auxiliaries_in_a_level_is_of_no_consequence(family, seed, auxiliaries, auxiliary):
    J = draw(family, 5, P, seed)
    permuted = [0, *auxiliaries]
    weights = gradsurg.weights(J @ J.T, primary=0, auxiliary=auxiliary)
    u, error = weights @ J, float(weights.abs() @ J.norm(dim=1))
    other = gradsurg.weights(J[permuted] @ J[permuted].T, primary=0, auxiliary=auxiliary) @ J[permuted]
    # The cones of nearly opposite gradients are so thin that which task is refused moves u by √(8 · 4e-16).
    assert (other - u).norm() <= 1e-9 * error + 1e-6 * u.norm()


@given(seed=seeds)
def test_protect_has_no_order_among_lower_levels(seed):
    J = draw("surrounding", 5, P, seed)
    one = gradsurg.weights(J @ J.T, primary=[[0], [1], [2], [3, 4]])
    assert torch.equal(one, gradsurg.weights(J @ J.T, primary=[[0], [3], [4], [2, 1]]))
    assert torch.equal(one, gradsurg.weights(J @ J.T, primary=0))


@given(seed=seeds, r=st.floats(0.1, 10))
def test_preferences_reach_every_level(seed, r):
    """help: u = r_0 g_0 + Π(Σ r_i g_i); protect: the projection of r_0 g_0."""
    J = draw("random", 4, P, seed)
    preferences = [2.0, r, 0.5, 1.0]
    weights = gradsurg.weights(J @ J.T, "sum", primary=0, auxiliary="help", preferences=preferences)
    a = torch.tensor(preferences[1:], dtype=torch.float64) @ J[1:]
    expected = 2 * J[0] + a + max(-float(a @ J[0]), 0.0) / float(J[0] @ J[0]) * J[0]
    assert (weights @ J - expected).abs().max() <= 1e-12 * J.norm(dim=1).sum() * 10
    alone = gradsurg.weights(J @ J.T, "sum", primary=0)
    assert torch.allclose(gradsurg.weights(J @ J.T, "sum", primary=0, preferences=preferences), 2 * alone, rtol=1e-12)


@pytest.mark.parametrize("auxiliary", ["protect", "help"])
@families
@settings(max_examples=12)  # in each of 12 families
@given(seed=seeds, surgery=st.sampled_from(["sum", "pcgrad", "cone"]))
def test_a_guarantee_on_top(family, auxiliary, seed, surgery):
    """protect: nobody is hurt, even where two primaries conflict; help: the first level is not."""
    J = draw(family, 5, P, seed)
    options = {"surgery": surgery, "primary": [[0, 1], [2, 3]], "auxiliary": auxiliary}
    inner, error, u = progress(J, guarantee="gradient", **options)
    watched = slice(None) if auxiliary == "protect" else slice(2)
    assert (inner[watched] >= -error[watched]).all()
    bare, bare_error, _ = progress(J, **options)
    if (bare[watched] >= bare_error[watched]).all():
        assert (u - progress(J, **options)[2]).norm() <= 1e-9 * (u.norm() + 1e-300), "nothing to repair"


def test_the_guarantee_has_something_to_do_there():
    """Two conflicting primaries under the plain sum: without it the first loses."""
    J = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert (J @ gradsurg.combine(J, "sum", primary=[[0, 1]]))[0] < 0
    assert (J @ gradsurg.combine(J, "sum", primary=[[0, 1]], guarantee="gradient") >= -1e-12).all()


@pytest.mark.parametrize("auxiliary", ["protect", "help"])
@pytest.mark.parametrize("primary", [0, 2, [[1], [0, 3]], [[0, 2], [1]]])
def test_batch_is_one_by_one(auxiliary, primary):
    J = torch.stack([draw(family, 4, P, 3) for family in ("random", "surrounding", "zeros", "duplicates")])
    G = (J @ J.mT).reshape(2, 2, 4, 4)
    together = gradsurg.weights(G, primary=primary, auxiliary=auxiliary)
    assert together.shape == (2, 2, 4)
    for i in range(2):
        for j in range(2):
            alone = gradsurg.weights(G[i, j], primary=primary, auxiliary=auxiliary)
            assert ((together[i, j] - alone) @ J[2 * i + j]).abs().max() <= 1e-9


def test_levels_of_absent_tasks():
    assert parse_levels("main") == (("main",),)
    assert parse_levels(["left", "right"]) == (("left", "right"),), "one level of two primaries"
    levels = parse_levels([["main"], ["aux", "other"], ["reg"]])
    assert levels == (("main",), ("aux", "other"), ("reg",))
    assert levels_of(("reg", "main", "aux"), levels) == [[1], [2], [0]]
    assert levels_of(("reg", "aux", "new"), levels) == [[1], [0], [2]], "no main today: the next level leads"
    assert levels_of(("new", "newer"), levels) == [[0, 1]]
    assert levels_of(("main",), None) is None


def test_an_absent_primary_in_training():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), normalize="none", primary="main", tasks=["main", "a", "b"])
    optimizer.set_gradients({"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([-3.0, 1.0])]})
    assert w.grad.tolist() == [0.0, 1.0], "a and b are the first level then"
    optimizer.step()
    optimizer.zero_grad()
    optimizer.set_gradients(
        {"main": [torch.tensor([0.0, -1.0])], "a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([0.0, 1.0])]}
    )
    assert w.grad.tolist() == [0.0, 0.0], "main against b: nothing of it is left"


def test_protected_tasks():
    cpu = torch.device("cpu")
    assert protected(4, None, "protect", cpu) is None
    assert protected(4, [[1], [0, 2, 3]], "protect", cpu) is None
    assert protected(4, [[1, 3], [0, 2]], "help", cpu).tolist() == [False, True, False, True]


def test_order_asks_the_surgery_for_each_level_alone():
    asked = []

    def surgery(gramian, level):
        asked.append((gramian.tolist(), level))
        return torch.ones(len(level), dtype=torch.float64)

    G = torch.tensor([[4.0, 1.0, 0.0], [1.0, 9.0, 2.0], [0.0, 2.0, 16.0]], dtype=torch.float64)
    order(G, [[2], [0, 1]], "help", surgery)
    assert asked == [([[16.0]], [2]), ([[4.0, 1.0], [1.0, 9.0]], [0, 1])]
    asked.clear()
    order(G, [[2], [0, 1]], "protect", surgery)
    assert asked == [([[16.0]], [2])], "protected tasks have no direction of their own"


@pytest.mark.parametrize(
    ("primary", "message"),
    [
        ([], "empty level"),
        ([["a"], []], "empty level"),
        ([["a"], "b"], "mixes names and lists"),
        ([["a"], ["b", "a"]], "names a task twice"),
    ],
)
def test_wrong_levels(primary, message):
    with pytest.raises(ValueError, match=message):
        parse_levels(primary)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"primary names the task 'mian'.*Did you mean 'main'\?.*tasks=\[\.\.\.\]"):
        check_names(parse_levels("mian"), ["main", "aux"])
    with pytest.raises(ValueError, match=r"the rows are 0 … 2"):
        gradsurg.weights(torch.eye(3), primary=3)
    with pytest.raises(ValueError, match=r"the rows are 0 … 2"):
        gradsurg.weights(torch.eye(3), primary=[[0], [-1]])
    with pytest.raises(ValueError, match=r"auxiliary='halp'.*'protect', 'help'.*Did you mean 'help'"):
        gradsurg.weights(torch.eye(3), primary=0, auxiliary="halp")
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), primary="mian")
    with pytest.raises(ValueError, match="Did you mean 'main'"):
        optimizer.total({"main": w.sum(), "aux": (2 * w).sum()})


margins = st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.9]), min_size=4, max_size=4).filter(any)


def kept_share(J, margin, **options):
    """Return what was kept of the margins, and the least ⟨u, g_i⟩ asked for, had all of it been kept."""
    m, ones = len(J), torch.ones(len(J), dtype=torch.float64)
    names = tuple(map(str, range(m)))
    pairs = tuple(zip(names, margin, strict=True))
    pipeline = Pipeline(Unscaled(), resolve_surgery(options.get("surgery", "sum")), margin=pairs)
    direction = pipeline.direction(Problem(J @ J.T, ones, names), {})
    asked = torch.tensor(margin, dtype=torch.float64) * J.norm(dim=1) * J.sum(0).norm() / m**0.5
    return float(direction.margin_kept), asked


@families
@settings(max_examples=15)  # in each of 12 families
@given(seed=seeds, margin=margins, surgery=st.sampled_from(["sum", "cone", "upgrad", "pcgrad"]))
def test_margins_are_kept_as_far_as_a_step_as_long_as_the_sum_can(family, seed, margin, surgery):
    """⟨u, g_i⟩ ≥ share · τ_i ‖g_i‖ ‖t‖ / √m; ‖u‖ ≤ ‖t‖ + 2 ‖u without margin‖."""
    J = draw(family, 4, P, seed)
    share, asked = kept_share(J, margin, surgery=surgery)
    assert 0 <= share <= 1
    inner, error, u = progress(J, surgery=surgery, margin=margin)
    t = J.sum(0).norm()
    assert (inner >= share * asked - error - 1e-7 * t * J.norm(dim=1)).all()
    before = progress(J, surgery=surgery)[2].norm()
    assert u.norm() <= (t + 2 * before) * (1 + 1e-6) + 1e-9 * J.norm(dim=1).sum()


@given(seed=seeds, tau=st.sampled_from([0.05, 0.5, 0.99]))
def test_orthogonal_gradients_of_one_length_keep_every_margin(seed, tau):
    """The reason for √m: their sum has ⟨t, g_i⟩ = ‖g_i‖ ‖t‖ / √m, so nothing has to move for any τ < 1."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.linalg.qr(torch.randn(P, 4, generator=generator, dtype=torch.float64)).Q.T * 3
    assert kept_share(J, [tau] * 4)[0] == 1.0
    assert gradsurg.weights(J @ J.T, "sum", margin=tau).tolist() == [1.0] * 4


def test_a_margin_by_hand():
    """Row 0 is orthogonal to t = (0, 2): it is given 0.6 · 1 · 2 / √2 along itself."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    assert gradsurg.combine(J, "sum", margin=0.0).tolist() == [0.0, 2.0]
    u = gradsurg.combine(J, "sum", margin=[0.6, 0.0])
    assert u.tolist() == pytest.approx([1.2 / 2**0.5, 2.0], abs=1e-12)
    assert gradsurg.combine(J, "sum", margin={0: 0.6}).tolist() == u.tolist()


def test_margins_out_of_reach_are_cut_and_said():
    """Two unit vectors 2ε short of opposite: no direction has a larger cosine with both than sin ε."""
    for opening in (0.3, 1e-2, 1e-4):
        angle = torch.tensor([opening, torch.pi - opening], dtype=torch.float64)
        J = torch.stack([angle.cos(), angle.sin()], dim=1)
        share, asked = kept_share(J, [0.9, 0.9])
        # A step of length ‖t‖ upwards has ⟨u, g_i⟩ = ‖t‖ sin ε; 0.9 ‖t‖ / √2 was asked.
        published = min(1.0, float(angle[0].sin()) * 2**0.5 / 0.9)
        assert share == pytest.approx(published, rel=1e-6)
        u = gradsurg.combine(J, "sum", margin=0.9)
        assert (J @ u >= share * asked * (1 - 1e-6)).all()
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert kept_share(opposite, [0.5, 0.5, 0.5])[0] == 0.0
    assert gradsurg.combine(opposite, "sum", margin=0.5).tolist() == [0.0, 1.0]


def test_with_help_margins_are_the_first_levels():
    J = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    options = {"surgery": "sum", "primary": 0, "auxiliary": "help"}
    assert gradsurg.combine(J, margin={1: 0.9}, **options).tolist() == gradsurg.combine(J, **options).tolist()
    u = gradsurg.combine(J, margin=0.9, **options)
    assert float(u[0]) == pytest.approx(max(1.0, 0.9 * 5**0.5 / 2**0.5), rel=1e-12)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan"), "much", [0.1], {3: 0.1}, [0.1, 0.1, 2.0], None])
def test_wrong_margins(wrong):
    with pytest.raises(ValueError, match=r"margin=.*: pass a number in \[0, 1\), 3 of them, or a dict from row"):
        gradsurg.weights(torch.eye(3), margin=wrong)
