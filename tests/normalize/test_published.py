"""Every normaliser against its paper's formula, written plainly in float64 for this test.

Scales are compared up to the common factor, which the pipeline chooses. What a paper trains with an optimizer is
trained here by torch's own Adam on the paper's objective, differentiated by autograd.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradsurg.normalize import (
    DWA,
    FAMO,
    IMTLL,
    STCH,
    CurrentLoss,
    GeneralizedMean,
    GradNorm,
    InitialLoss,
    LogVariances,
    Norm,
    PriorLoss,
    RandomWeights,
    Tchebycheff,
    Uncertainty,
    class_entropy,
    target_variance,
)
from gradsurg.solvers.problem import Problem

TASKS = ("a", "b", "c")
STEPS = 12
ONES = torch.ones(3, dtype=torch.float64)


def story(seed=0):
    """Losses (steps, 3) that fall at different speeds, with noise, and gradients (steps, 3, 8) of different lengths."""
    rng = np.random.default_rng(seed)
    time = np.arange(STEPS)[:, None]
    losses = (
        np.array([0.7, 3.0, 40.0]) * np.exp(-time * np.array([0.01, 0.2, 0.05])) * rng.uniform(0.8, 1.2, (STEPS, 3))
    )
    rows = rng.standard_normal((STEPS, 3, 8)) * np.array([0.1, 1.0, 30.0])[:, None]
    return torch.tensor(losses), torch.tensor(rows)


def scales_of(normalizer, losses, rows=None, preferences=ONES):
    """Return the scales of each step, summing to 1."""
    state, result = {}, []
    for t in range(len(losses)):
        J = torch.eye(3, dtype=torch.float64) if rows is None else rows[t]
        scales, state = normalizer.scales(Problem(J @ J.T, preferences, TASKS, losses[t]), state)
        result.append(scales / scales.sum())
    return torch.stack(result)


def assert_same(ours, published):
    published = torch.as_tensor(published, dtype=torch.float64)
    published = published / published.sum(-1, keepdim=True)
    assert (ours / published - 1).abs().max() < 1e-12


def test_norm_smoothed():
    losses, rows = story()
    beta, published = 0.9, []
    for t in range(STEPS):
        share = [beta ** (t - k) for k in range(t + 1)]  # of step k in the average at t
        norms = rows[: t + 1].norm(dim=2)
        published.append(1 / (torch.tensor(share, dtype=torch.float64)[:, None] * norms).sum(0) * sum(share))
    assert_same(scales_of(Norm(smoothing=beta), losses, rows), torch.stack(published))


def test_loss_is_the_gradient_of_the_geometric_mean():
    losses, _ = story()
    published = []
    for now in losses:
        leaf = now.clone().requires_grad_()
        leaf.prod().pow(1 / 3).backward()
        published.append(leaf.grad)
    assert_same(scales_of(CurrentLoss(), losses), torch.stack(published))


def test_initial_loss():
    losses, _ = story()
    published = [1 / losses[: min(t + 1, 4)].mean(0) for t in range(STEPS)]
    assert_same(scales_of(InitialLoss(steps=4), losses), torch.stack(published))
    assert_same(scales_of(InitialLoss(), losses), (1 / losses[0]).expand(STEPS, 3))


def test_prior_loss():
    losses, _ = story()
    assert_same(scales_of(PriorLoss({"c": 4.0, "a": 1.0, "b": 2.0}), losses), [[4.0, 2.0, 1.0]] * STEPS)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_entropy_of_equal_classes_is_log_k(classes):
    assert class_entropy([7] * classes) == pytest.approx(math.log(classes), rel=1e-12)


def test_entropy_is_the_least_cross_entropy_of_a_constant():
    counts = torch.tensor([5.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    labels = torch.repeat_interleave(torch.arange(4), counts.long())
    entropy = class_entropy(counts)
    best = torch.nn.functional.cross_entropy((counts / 10 + 1e-300).log().expand(10, 4), labels)
    assert entropy == pytest.approx(float(best), rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.randn(4, generator=generator, dtype=torch.float64)
        assert torch.nn.functional.cross_entropy(other.expand(10, 4), labels) > entropy


def test_variance_is_the_least_squared_error_of_a_constant():
    targets = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 + 7
    constant = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.mse_loss(constant.expand(50, 3, 2), targets)
    (gradient,) = torch.autograd.grad(loss, constant)
    # A quadratic with Hessian 2 / 6 in each output: one Newton step is the minimum.
    best = torch.nn.functional.mse_loss((constant - 3 * gradient).detach().expand(50, 3, 2), targets)
    assert target_variance(targets) == pytest.approx(float(best), rel=1e-12)
    assert target_variance(torch.tensor([1.0, 3.0])) == 1.0


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[1.0, 1.0]], []])
def test_frequencies_that_have_no_entropy(wrong):
    with pytest.raises(ValueError, match=r"frequencies=.*nonnegative numbers, one per class"):
        class_entropy(wrong)


@pytest.mark.parametrize("wrong", [[2.0, 2.0], 3.0, [], [1.0, math.inf], [1.0, math.nan]])
def test_targets_that_have_no_variance(wrong):
    with pytest.raises(ValueError, match=r"targets of shape .* must vary, and be finite"):
        target_variance(torch.tensor(wrong))


@pytest.mark.parametrize("gamma", [-3.0, -1.0, 0.5, 1.0, 2.0, 5.0])
def test_generalized_mean(gamma):
    losses, _ = story()
    published = []
    for now in losses:
        leaf = now.clone().requires_grad_()
        leaf.pow(gamma).mean().pow(1 / gamma).backward()
        published.append(leaf.grad)
    assert_same(scales_of(GeneralizedMean(gamma), losses), torch.stack(published))


def test_generalized_mean_at_zero_is_the_limit():
    losses, _ = story()
    assert_same(scales_of(GeneralizedMean(0), losses), 1 / losses)
    assert (scales_of(GeneralizedMean(1e-9), losses) / scales_of(GeneralizedMean(0), losses) - 1).abs().max() < 1e-7


def test_dwa():
    losses, _ = story()
    temperature, published = 2.0, [[1.0] * 3] * 2
    for t in range(2, STEPS):
        published.append([math.exp(float(losses[t - 1, k] / losses[t - 2, k]) / temperature) for k in range(3)])
    assert_same(scales_of(DWA(), losses), published)


def test_dwa_with_epochs_of_three_steps():
    losses, _ = story()
    epochs = losses.reshape(4, 3, 3).mean(1)
    published = [[1.0] * 3] * 6
    for epoch in (2, 3):
        published += [(epochs[epoch - 1] / epochs[epoch - 2] / 0.5).exp().tolist()] * 3
    assert_same(scales_of(DWA(temperature=0.5, period=3), losses), published)


def test_uncertainty():
    """Equations 7 and 10: 1/(2σ²) L + log σ for squared errors, 1/σ² L + log σ for classes."""
    losses, _ = story()
    log_variances = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_variances], lr=0.05)
    factor = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    published = []
    for now in losses:
        sigma = torch.exp(log_variances / 2)
        published.append((factor / sigma**2).detach())
        optimizer.zero_grad()
        (factor / sigma**2 * now + sigma.log()).sum().backward()
        optimizer.step()
    assert_same(scales_of(Uncertainty(rate=0.05, classification=("b",)), losses), torch.stack(published))


def test_uncertainty_ends_at_the_variance():
    """With a constant loss, exp(−v) k L = ½."""
    losses = torch.tensor([[0.5, 2.0, 4.0]], dtype=torch.float64).expand(3000, 3)
    last = scales_of(Uncertainty(rate=0.01, classification=("b",)), losses)[-1]
    assert (last / torch.tensor([8.0, 2.0, 1.0]) * 11 - 1).abs().max() < 1e-6


def test_log_variances_are_the_published_losses():
    losses = {"a": torch.tensor(3.0), "b": torch.tensor(2.0), "c": None}
    module = LogVariances(["a", "b", "c"], classification=["b"])
    with torch.no_grad():
        for value, v in zip(module.values, (0.3, -1.2, 5.0), strict=True):
            value.fill_(v)
    weighted = module(losses)
    assert weighted["a"].item() == pytest.approx(0.5 * math.exp(-0.3) * 3 + 0.15, rel=1e-6)
    assert weighted["b"].item() == pytest.approx(math.exp(1.2) * 2 - 0.6, rel=1e-6)
    assert weighted["c"] is None


def test_imtl_l():
    losses, _ = story()
    a = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a], lr=0.05)
    published = []
    for now in losses:
        published.append(a.exp().detach())
        optimizer.zero_grad()
        (a.exp() * now - a).sum().backward()
        optimizer.step()
    assert_same(scales_of(IMTLL(rate=0.05), losses), torch.stack(published))


def test_imtl_l_ends_where_all_scaled_losses_are_equal():
    losses = torch.tensor([[0.5, 2.0, 4.0]], dtype=torch.float64).expand(3000, 3)
    scaled = scales_of(IMTLL(rate=0.01), losses)[-1] * losses[0]
    assert (scaled / scaled.mean() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_gradnorm(alpha):
    losses, rows = story()
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.025)
    published = []
    for now, J in zip(losses, rows, strict=True):
        published.append(w.detach().clone())
        norms = (w[:, None] * J).norm(dim=1)
        progress = now / losses[0]
        target = (norms.mean() * (progress / progress.mean()) ** alpha).detach()
        optimizer.zero_grad()
        (norms - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            w *= 3 / w.sum()
    assert_same(scales_of(GradNorm(alpha=alpha), losses, rows), torch.stack(published))


def test_gradnorm_at_alpha_zero_learns_equal_norms():
    _, rows = story()
    rows = rows[:1].expand(4000, 3, 8) * torch.tensor([5.0, 1.0, 0.05], dtype=torch.float64)[:, None]
    losses = torch.ones(len(rows), 3, dtype=torch.float64)
    lengths = scales_of(GradNorm(alpha=0.0, rate=1e-3), losses, rows)[-1] * rows[0].norm(dim=1)
    assert (lengths / lengths.mean() - 1).abs().max() < 0.02


def test_famo():
    losses, _ = story()
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-2)
    published = []
    for t, now in enumerate(losses):
        if t > 0:
            z = torch.softmax(xi, 0)
            optimizer.zero_grad()
            z.backward(losses[t - 1].log() - now.log())
            optimizer.step()
        z = torch.softmax(xi, 0).detach()
        published.append(z / now / (z / now).sum())
    assert_same(scales_of(FAMO(), losses), torch.stack(published))


def test_random():
    draws = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    problem = Problem(torch.eye(3).double(), ONES, TASKS, None, torch.Generator().manual_seed(5))
    scales, _ = RandomWeights().scales(problem, {})
    assert_same(scales / scales.sum(), draws.exp())


def test_tchebycheff():
    losses, _ = story()
    preferences = torch.tensor([10.0, 3.0, 0.3], dtype=torch.float64)
    ideal = torch.tensor([0.1, 0.0, 2.0], dtype=torch.float64)
    ours = scales_of(Tchebycheff({"a": 0.1, "c": 2.0}), losses, preferences=preferences)
    seen = set()
    for now, scales in zip(losses, ours, strict=True):
        leaf = now.clone().requires_grad_()
        (preferences * (leaf - ideal)).max().backward()
        published = leaf.grad / preferences  # surgery multiplies by the preferences
        assert (scales - published / published.sum()).abs().max() < 1e-15
        seen.add(int(scales.argmax()))
    assert len(seen) > 1, "the story must change its worst task"


@pytest.mark.parametrize("mu", [0.5, 3.0, 100.0])
def test_stch(mu):
    losses, _ = story()
    preferences = torch.tensor([10.0, 3.0, 0.3], dtype=torch.float64)
    ideal = torch.tensor([0.1, 0.0, 2.0], dtype=torch.float64)
    published = []
    for now in losses:
        leaf = now.clone().requires_grad_()
        (mu * torch.logsumexp(preferences * (leaf - ideal) / mu, 0)).backward()
        published.append(leaf.grad / preferences)
    assert_same(scales_of(STCH(mu, {"a": 0.1, "c": 2.0}), losses, preferences=preferences), torch.stack(published))
