"""The toy problem of the CAGrad and Nash-MTL papers: its formulas, its front, and who gets there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.toy import FRONT_HEIGHT, SETTINGS, losses_and_gradients, on_front, pipelines, run

LOW = 5e-6


def published(theta, scales):
    """Liu et al. 2021, appendix, in torch."""
    x, y = theta.unbind(-1)
    f_1 = torch.log(torch.clamp((0.5 * (-x - 7) - torch.tanh(-y)).abs(), min=LOW)) + 6
    f_2 = torch.log(torch.clamp((0.5 * (-x + 3) + torch.tanh(-y) + 2).abs(), min=LOW)) + 6
    q_1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    q_2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    up, down = torch.clamp(torch.tanh(0.5 * y), min=0), torch.clamp(torch.tanh(-0.5 * y), min=0)
    return scales[0] * (f_1 * up + q_1 * down), scales[1] * (f_2 * up + q_2 * down)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.1, 1.0)])
def test_losses_and_gradients_are_the_published_ones(scales):
    drawn = np.random.default_rng(0).uniform(-10, 10, (200, 2))
    theta = np.concatenate([drawn, [(0.0, 0.0)], *(s.starts for s in SETTINGS.values())])
    L, J = losses_and_gradients(theta, scales)
    point = torch.tensor(theta, requires_grad=True)
    for i, loss in enumerate(published(point, scales)):
        (gradient,) = torch.autograd.grad(loss.sum(), point, retain_graph=True)
        assert np.abs(L[:, i] - loss.detach().numpy()).max() <= 1e-12
        assert np.abs(J[:, i] - gradient.numpy()).max() <= 1e-9 * np.abs(J[:, i]).max()


def test_the_front_is_pareto_stationary_and_what_lies_off_it_below_is_not():
    x = np.linspace(-6.5, 6.5, 27)

    def least(height):
        """Return the shortest convex combination of the two unit gradients, over the line at this height."""
        _, J = losses_and_gradients(np.stack([x, np.full_like(x, height)], -1))
        units = J / np.linalg.norm(J, axis=-1, keepdims=True)
        return np.linalg.norm(units.sum(1) / 2, axis=-1)

    assert (
        np.minimum(least(FRONT_HEIGHT - 0.06), np.minimum(least(FRONT_HEIGHT), least(FRONT_HEIGHT + 0.06))).max() < 0.05
    )
    assert least(-5.0).min() > 0.05
    assert on_front(np.array([[-7.05, -8.4], [0.0, -8.2], [0.0, -7.9], [7.3, -8.3]])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_adam_is_torchs():
    """One of each kind of direction for a hundred steps, against torch.optim.Adam on autograd's gradients."""
    import gradsurg

    setting = SETTINGS["cagrad"]
    for name in ("sum", "mgda", "upgrad"):
        path = run(setting, {name: pipelines()[name]}, steps=100, every=100)[name]
        for s, start in enumerate(setting.starts):
            p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
            optimizer = torch.optim.Adam([p], lr=1e-3)
            for _ in range(100):
                rows = torch.stack(
                    [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in published(p, (1, 1))]
                )
                p.grad = gradsurg.combine(rows, name)
                optimizer.step()
            assert np.abs(path[-1, s] - p.detach().numpy()).max() <= 1e-9


@pytest.fixture(scope="module")
def short():
    """A tenth of the steps at ten times the rate, from the papers' starts in the valleys and in the bowls."""
    names = ("sum", "pcgrad", "mgda", "cagrad")
    methods = {name: pipelines()[name] for name in names}
    setting = replace(SETTINGS["cagrad"], steps=10_000)
    return run(setting, methods, every=10_000, rate=1e-2)


def test_mgda_and_pcgrad_stop_anywhere_on_the_front_and_the_mean_in_its_middle(short):
    """Liu et al. 2021, figure 1: without control over where on the front a run ends, it ends where it arrives."""
    for name in ("mgda", "pcgrad"):
        assert on_front(short[name][-1]).all()
        assert np.abs(short[name][-1, :, 0]).max() > 4
    for name in ("sum", "cagrad"):
        end = short[name][-1]
        assert np.abs(end[on_front(end), 0]).max() < 0.2  # the minimum of the mean loss
