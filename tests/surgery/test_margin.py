"""margin= in wrap: asked of the direction, of the update, cut where out of reach, and said in the report."""

import itertools
from math import sqrt

import pytest
import torch

import gradsurg
from gradsurg.surgery.margin import attainable, parse_margin
from tests.matrices import FAMILIES, draw

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def rows_of(J):
    return {f"t{i}": [row.clone()] for i, row in enumerate(J)}


def share_asked(J, tau):
    """Return kept · τ_i / √m by scipy, which knows nothing of our solvers."""
    from scipy.optimize import nnls

    units = J / J.norm(dim=1, keepdim=True)
    # The shortest v with U v ≥ τ by least distance programming, Lawson & Hanson 1974, chapter 23.4: v = −s_1 / s_2 of
    # the residual s of the nonnegative least squares problem [Uᵀ; τᵀ] y ≈ (0, 1).
    A = torch.cat([units.T, tau[None]]).numpy()
    solution, _ = nnls(A, torch.cat([torch.zeros(J.shape[1]), torch.ones(1)]).double().numpy())
    s = torch.tensor(A @ solution) - torch.cat([torch.zeros(J.shape[1]), torch.ones(1)]).double()
    v = s[:-1] / -s[-1]
    return min(1.0, sqrt(len(J)) / float(v.norm())) * tau / sqrt(len(J)), v


def test_the_share_that_can_be_kept_is_the_largest():
    for seed in range(20):
        J = draw("surrounding" if seed % 2 else "random", 4, 9, seed)
        tau = torch.tensor([0.6, 0.3, 0.0, 0.9], dtype=torch.float64)
        names = ("a", "b", "c", "d")
        asked, kept = attainable(J @ J.T, tuple(zip(names, tau.tolist(), strict=True)), names, None, 4e-16)
        expected, v = share_asked(J, tau)
        assert (J / J.norm(dim=1, keepdim=True) @ v - tau).min() >= -1e-9  # the reference is what it says
        assert (asked - expected).abs().max() <= 1e-8
        assert 0 < kept <= 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("margin", [0.3, {"t1": 0.5, "t2": 0.1}])
def test_direction_and_update_keep_the_margin(optimizer, margin):
    tau = torch.tensor([0.3] * 4 if isinstance(margin, float) else [0.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    for surgery, seed in itertools.product(("cone", "upgrad", "sum", "graddrop"), range(2)):
        p = torch.nn.Parameter(draw("random", 1, 30, 100 + seed)[0])
        inner = OPTIMIZERS[optimizer]([p])
        plain = OPTIMIZERS[optimizer]([q := torch.nn.Parameter(p.detach().clone())])
        wrapped = gradsurg.wrap(inner, margin=margin, surgery=surgery, normalize="none")
        for step in range(4):
            J = draw("random", 4, 30, 10 * seed + step)
            before = p.detach().clone()
            wrapped.zero_grad()
            wrapped.set_gradients(rows_of(J))
            kept = float(wrapped.report.margin_kept)
            lengths = J.norm(dim=1)
            assert (J @ p.grad - kept * tau * lengths * J.sum(0).norm() / 2).min() >= -1e-9
            # The inner optimizer by itself, given the same p.grad at the same point.
            q.data.copy_(before)
            q.grad = p.grad.clone()
            plain.step()
            d_0 = before - q.detach()
            wrapped.step()
            d = before - p.detach()
            assert (J @ d - kept * tau * lengths * d_0.norm() / 2).min() >= -1e-9
            assert kept == 1  # mild conflicts: it can be had in full


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_of_the_margin_holds_on_hostile_rows(family):
    for seed in range(6):
        J = draw(family, 2 + seed, 12, seed)
        m = len(J)
        p = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
        wrapped = gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin=0.4, normalize="none")
        wrapped.set_gradients(rows_of(J))
        u, kept = p.grad.clone(), float(wrapped.report.margin_kept)
        assert 0 <= kept <= 1
        cosines = wrapped.report.direction_cosines
        least = kept * 0.4 * J.sum(0).norm() / (sqrt(m) * u.norm()) if u.norm() > 0 else 0.0
        alive = J.norm(dim=1) > 0
        assert (cosines[alive] - least).min() >= -1e-4
        wrapped.step()
        assert wrapped.report.update_cosines.min() >= -1e-4


def test_out_of_reach_is_said():
    J = torch.tensor([[1.0, 0.0], [-1.0, 1e-3]], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    wrapped = gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin=0.9)
    wrapped.set_gradients(rows_of(J))
    assert 0 < float(wrapped.report.margin_kept) < 0.01
    assert "margins out of reach" in str(wrapped.report)
    assert wrapped.report.scalars()["margin_kept"] == float(wrapped.report.margin_kept)
    wrapped.step()
    assert wrapped.report.update_cosines.min() > 0


def test_without_a_margin_nothing_is_reported_and_zero_is_none():
    def run(**options):
        p = torch.nn.Parameter(torch.ones(30, dtype=torch.float64))
        wrapped = gradsurg.wrap(torch.optim.Adam([p], lr=0.01), **options)
        for step in range(3):
            wrapped.set_gradients(rows_of(draw("surrounding", 4, 30, step)))
            wrapped.step()
        return p.detach(), wrapped.report

    bare, report = run()
    for margin in (0, 0.0, {}, {"t1": 0.0}):
        got, other = run(margin=margin)
        assert torch.equal(got, bare)
        assert other.margin_kept is None
    assert report.margin_kept is None
    assert "margin" not in str(report)


def test_blocks_have_their_own_share():
    p, q = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    wrapped = gradsurg.wrap(torch.optim.SGD([p, q], lr=1.0), margin=0.5, granularity="tensor")
    easy, hard = [1.0, 0.0], [-1.0, 1e-6]
    wrapped.set_gradients(
        {"a": [torch.tensor(easy).double()] * 2, "b": [torch.tensor([0.0, 1.0]).double(), torch.tensor(hard).double()]}
    )
    assert wrapped.report.margin_kept[0] == 1
    assert wrapped.report.margin_kept[1] < 1e-3


@pytest.mark.parametrize(
    "wrong", [1.0, -0.1, "much", True, None, float("nan"), [0.1], {"t0": 1.0}, {"t0": "x"}, {3: 0.1}]
)
def test_wrong_margins(wrong):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"margin.*pass a number in \[0, 1\), or a dict"):
        gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin=wrong)


def test_margins_of_nobody_and_without_a_guarantee():
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="margin names the task 'c'"):
        gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin={"c": 0.1}, tasks=["a", "b"])
    with pytest.raises(ValueError, match="use guarantee='update' or 'gradient'"):
        gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin=0.1, guarantee="none")
    wrapped = gradsurg.wrap(torch.optim.SGD([p], lr=1.0), margin={"c": 0.1})
    with pytest.raises(ValueError, match="margin names the task 'c'"):
        wrapped.set_gradients({"a": [torch.ones(2)], "b": [torch.ones(2)]})
    assert parse_margin({"a": 0.0}) == ()
    assert parse_margin(0.1) == 0.1
    assert parse_margin({"depth": 0.2, "segment": 0}) == (("depth", 0.2),)
