"""GradDrop and trimmed mean: formulas element by element, guarantees on top, and inside a real optimizer."""

import pytest
import torch
from torchjd.aggregation import GradDrop as PeerGradDrop
from torchjd.aggregation import TrimmedMean as PeerTrimmedMean

import gradsurg
from gradsurg.surgery import GradDrop, TrimmedMean
from tests.matrices import FAMILIES, draw
from tests.networks import MODELS, build

SURGERIES = [GradDrop(), GradDrop(leak=0.3, sharpness=2.0), TrimmedMean()]
each = pytest.mark.parametrize("surgery", SURGERIES, ids=repr)


def matrix(m, seed, P=40):
    return torch.randn(m, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize(("leak", "sharpness"), [(0.0, 1.0), (0.4, 1.0), (0.0, 3.0)])
def test_graddrop(m, leak, sharpness):
    J, r = matrix(m, m), torch.linspace(0.5, 2, m, dtype=torch.float64)
    u = gradsurg.combine(J, GradDrop(leak, sharpness), preferences=r, generator=torch.Generator().manual_seed(5))
    drawn = torch.rand(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for k in range(40):  # Chen et al. 2020, algorithm 1, number by number
        g = r * J[:, k]
        purity = 0.5 * (1 + g.sum() / g.abs().sum())
        up = 0.5 + sharpness * (purity - 0.5) > drawn[k]
        expected = sum(x * (1 if (x > 0) == up else leak) for x in g)
        assert float(u[k]) == pytest.approx(float(expected), abs=1e-12)


def test_graddrop_of_the_peer():
    J = matrix(5, 0)
    torch.manual_seed(3)
    theirs = PeerGradDrop()(J)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    generator = torch.Generator()
    generator.set_state(state)
    assert torch.allclose(gradsurg.combine(J, "graddrop", generator=generator), theirs, atol=1e-12)


def test_graddrop_is_the_sum_on_average_over_signs():
    J = torch.tensor([[3.0], [-1.0]], dtype=torch.float64).expand(2, 4000)
    u = gradsurg.combine(J, "graddrop")
    assert set(u.tolist()) == {3.0, -1.0}
    assert abs(float((u == 3.0).double().mean()) - 0.75) < 0.03  # purity ½ (1 + 2 / 4); four standard errors


@pytest.mark.parametrize(("m", "trim"), [(1, 1), (2, 1), (3, 1), (6, 0), (6, 2), (7, 3), (4, 9)])
def test_trimmed_mean(m, trim):
    J, r = matrix(m, m), torch.linspace(0.5, 2, m, dtype=torch.float64)
    u, preferred = (gradsurg.combine(J, TrimmedMean(trim), **options) for options in ({}, {"preferences": r}))
    cut = min(trim, (m - 1) // 2)
    for k in range(40):
        kept = sorted(range(m), key=lambda i: float(J[i, k]))[cut : m - cut]
        assert float(u[k]) == pytest.approx(float(J[kept, k].mean()), abs=1e-12)
        assert float(preferred[k]) == pytest.approx(float((r[kept] @ J[kept, k]) / r[kept].sum()), abs=1e-12)
    if cut == trim:
        assert torch.allclose(u, PeerTrimmedMean(trim)(J), atol=1e-12)


def test_trimmed_mean_is_not_turned_by_corrupt_gradients():
    J = torch.cat([1 + matrix(4, 0) / 10, torch.full((1, 40), -1e9).double()])
    assert gradsurg.combine(J, "trimmed_mean").min() > 0.5
    assert gradsurg.combine(J, "mean").max() < -1e5


@each
@pytest.mark.parametrize("family", FAMILIES)
def test_the_guarantee_on_top(surgery, family):
    for m, seed in ((2, 0), (3, 1), (6, 2)):
        J = draw(family, m, 30, seed)
        u = gradsurg.combine(J, surgery, guarantee="gradient")
        assert torch.isfinite(u).all()
        alive = J.norm(dim=1) > 0
        if u.norm() > 0:
            assert (J[alive] @ u / (J[alive].norm(dim=1) * u.norm())).min() >= -1e-6


@each
def test_the_guarantee_changes_as_little_as_it_can(surgery):
    agreeing = matrix(3, 0).abs()
    plain = gradsurg.combine(agreeing, surgery)
    assert torch.equal(gradsurg.combine(agreeing, surgery, guarantee="gradient"), plain)
    J = matrix(3, 1) - 0.9 * matrix(3, 1).mean(0)
    u, held = (gradsurg.combine(J, surgery, guarantee=g) for g in ("none", "gradient"))
    # held is the projection of u onto the cone iff held − u is a nonnegative combination orthogonal to held.
    assert abs(float((held - u) @ held)) < 1e-10


@each
def test_normalisation_comes_before(surgery):
    J = matrix(3, 2) * torch.tensor([[1e-3], [1.0], [1e3]])
    norms = J.norm(dim=1, keepdim=True)
    by_hand = gradsurg.combine(J / norms * norms.mean(), surgery)
    assert torch.allclose(gradsurg.combine(J, surgery, normalize="norm"), by_hand, rtol=1e-9)


@each
def test_there_are_no_weights_and_no_levels(surgery):
    with pytest.raises(ValueError, match=r"treats every number of the gradients by itself, so it has no weights"):
        gradsurg.weights(torch.eye(2), surgery)
    with pytest.raises(ValueError, match=r"has no use for \['primary'\]"):
        gradsurg.combine(torch.eye(2), surgery, primary=0)
    optimizer, losses = training("heads", surgery=surgery, primary="left")
    with pytest.raises(ValueError, match=r"primary= weighs whole gradients"):
        optimizer.backward(losses())


def training(model_name, **options):
    model = build(model_name)
    kind = torch.optim.SparseAdam if model_name == "sparse" else torch.optim.Adam
    optimizer = gradsurg.wrap(kind(list(model.parameters()), lr=1e-2), **options)
    return optimizer, lambda batch=0: model.losses(batch)


@each
@pytest.mark.parametrize("model_name", MODELS)
def test_inside_an_optimizer(surgery, model_name):
    for guarantee in ("gradient", "update"):
        optimizer, losses = training(model_name, surgery=surgery, guarantee=guarantee)
        for batch in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses(batch))
            report = optimizer.report
            if guarantee == "gradient":
                assert report.direction_cosines.min() >= -1e-2 if model_name == "dtypes" else -1e-4
            optimizer.step()
            assert optimizer.report.weights.isnan().all()
            if guarantee == "update" and model_name != "dtypes":
                assert optimizer.report.update_cosines.min() >= -1e-4


@each
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_p_grad_is_the_formula(surgery, granularity):
    """One parameter at a time either way, so granularity changes nothing without normalisation."""
    model = build("all shared")
    optimizer = gradsurg.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1),
        surgery=surgery,
        normalize="none",
        guarantee="none",
        granularity=granularity,
    )
    losses = model.losses(0)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses.values()]
    optimizer.backward(losses)
    generator = torch.Generator().manual_seed(0)  # of (seed, step) = (0, 0)
    for k, p in enumerate(model.parameters()):
        columns = torch.stack([row[k].flatten() for row in rows])
        expected = surgery.combine(columns, torch.ones(3), generator)
        assert torch.allclose(p.grad.flatten(), expected, atol=1e-6)


def test_options_are_checked():
    for build_it, message in (
        (lambda: GradDrop(leak=2), "leak=2"),
        (lambda: GradDrop(sharpness=-1), "sharpness=-1"),
        (lambda: TrimmedMean(-1), "trim=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            build_it()
