"""Losses that hold derivatives of the network (create_graph=True), as in physics-informed networks, in every way."""

import numpy as np
import pytest
import torch
from torch import nn

import gradsurg
from tests.gradients.ways import WAYS
from tests.nearest import default_direction, gradients_of, vector
from tests.networks import run_backward


class Heat(nn.Module):
    """u_t = 0.1 u_xx on [0, 1], in three losses: in one forward pass, or each in its own (their graphs do not meet)."""

    def __init__(self, together):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh()), nn.Linear(9, 1)
        self.together = together

    def points(self, batch):
        generator = torch.Generator().manual_seed(batch)
        inside, edge, first = torch.rand(3, 12, 2, generator=generator).unbind()
        edge[:, 0].round_()
        first[:, 1] = 0
        return inside.requires_grad_(), edge, first

    def u(self, points):
        return self.head(self.body(points))[:, 0]

    def functions(self, batch):
        """Functions that return one loss each."""
        inside, edge, first = self.points(batch)

        def equation():
            u = self.u(inside)
            u_x, u_t = torch.autograd.grad(u.sum(), inside, create_graph=True)[0].unbind(1)
            u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 0]
            return (u_t - 0.1 * u_xx).square().mean()

        return {
            "equation": equation,
            "edge": lambda: self.u(edge).square().mean(),
            "first": lambda: (self.u(first) - torch.sin(torch.pi * first[:, 0])).square().mean(),
        }

    def losses(self, batch, features=None):
        """The losses; `features` is a list that gets the hidden values of the common forward pass."""
        if not self.together:
            return {name: function() for name, function in self.functions(batch).items()}
        inside, edge, first = self.points(batch)
        points = torch.cat([inside, edge, first])
        h = self.body(points)
        if features is not None:
            features.append(h)
        u, v, w = self.head(h)[:, 0].split(12)
        u_x, u_t = torch.autograd.grad(u.sum(), points, create_graph=True)[0][:12].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:12, 0]
        return {
            "equation": (u_t - 0.1 * u_xx).square().mean(),
            "edge": v.square().mean(),
            "first": (w - torch.sin(torch.pi * first[:, 0])).square().mean(),
        }


def build(together, **options):
    model = Heat(together)
    return model, gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=1e-2), **options)


def p_grad(model):
    return vector(p.grad for p in model.parameters())


def close(got, want, tolerance=1e-5):
    return np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def check_step(model, optimizer, J):
    """Step, and see that p.grad was the independent solution and that no task is hurt."""
    assert close(p_grad(model), default_direction(J))
    before = vector(model.parameters())
    optimizer.step()
    moved = before - vector(model.parameters())
    assert moved.any()
    assert (J @ moved >= -1e-4 * np.linalg.norm(J, axis=1) * np.linalg.norm(moved)).all()


@pytest.mark.parametrize("together", [True, False], ids=["one forward pass", "graphs apart"])
@pytest.mark.parametrize("way", [*WAYS, "batched"])
def test_every_way_of_passing(way, together):
    model, optimizer = build(together, batched=way == "batched")
    for batch in range(6):
        losses = model.losses(batch)
        J = gradients_of(losses.values(), list(model.parameters()))
        optimizer.zero_grad()
        run_backward("total" if way == "batched" else way, optimizer, losses)
        check_step(model, optimizer, J)


@pytest.mark.parametrize("way", ["functions", "mixed"])
def test_functions_build_their_graphs_one_at_a_time(way):
    model, optimizer = build(False)
    for batch in range(6):
        J = gradients_of(model.losses(batch).values(), list(model.parameters()))
        given = model.functions(batch)
        if way == "mixed":
            given["edge"] = given["edge"]()
        optimizer.zero_grad()
        optimizer.backward(given)
        check_step(model, optimizer, J)


@pytest.mark.parametrize("together", [True, False], ids=["one forward pass", "graphs apart"])
@pytest.mark.parametrize("options", [{}, {"batched": True}], ids=["one by one", "batched"])
def test_micro_batches(options, together):
    model, optimizer = build(together, **options)
    for step in range(4):
        J = 0
        optimizer.zero_grad()
        for micro in range(3):
            losses = model.losses(10 * step + micro)
            J = J + gradients_of(losses.values(), list(model.parameters())) / 3
            (optimizer.total(losses) / 3).backward()
        check_step(model, optimizer, J)


@pytest.mark.parametrize("way", ["reused weights", "reused weights, graphs apart", "features"])
def test_one_weighted_pass_has_the_weights_of_the_report(way):
    model, optimizer = build("apart" not in way, **({} if way == "features" else {"refresh_every": 2}))
    for batch in range(4):
        h = []
        losses = model.losses(batch, h)
        J = gradients_of(losses.values(), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.total(losses, features=h if way == "features" else None).backward()
        assert close(p_grad(model), optimizer.report.weights.flatten().double().numpy() @ J)
        optimizer.step()
    assert optimizer.report.level == ("features" if way == "features" else "reused weights")


@pytest.mark.parametrize("together", [True, False], ids=["one forward pass", "graphs apart"])
def test_tasks_take_turns(together):
    model, optimizer = build(together, rotate=1)
    sums, shares = np.zeros((3, 1)), np.zeros((3, 1))
    for batch in range(7):
        losses = model.losses(batch)
        now = gradients_of(losses.values(), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        fresh = [batch == 0 or name in optimizer.report.fresh for name in losses]
        due = np.array(fresh)[:, None]
        sums, shares = sums + due * 0.1 * (now - sums), shares + due * 0.1 * (1 - shares)
        assert sum(fresh) == (3 if batch == 0 else 1)
        assert close(p_grad(model), default_direction(np.where(due, now, sums / shares)))
        optimizer.step()


@pytest.mark.parametrize("way", ["total", "backward"])
def test_a_plain_penalty_on_derivatives_takes_no_part(way):
    model, optimizer = build(True, guarantee="none")
    for batch in range(4):
        losses, other = model.losses(batch), model.losses(batch + 50)["equation"]
        J = gradients_of([*losses.values(), other], list(model.parameters()))
        optimizer.zero_grad()
        run_backward(way, optimizer, losses, plain=other)
        assert close(p_grad(model), default_direction(J[:3]) + J[3])
        optimizer.step()


@pytest.mark.parametrize("together", [True, False], ids=["one forward pass", "graphs apart"])
@pytest.mark.parametrize("way", ["total", "backward", "batched"])
def test_points_that_ask_for_gradients_get_their_sum(way, together):
    """`inside` is a leaf that the optimizer does not train: it gets what a plain backward pass of the sum gives it."""
    model, optimizer = build(together, batched=way == "batched")
    points, plain = model.points(0), model.points(0)
    model.points = lambda batch: points
    run_backward("backward" if way == "backward" else "total", optimizer, model.losses(0))
    model.points = lambda batch: plain
    sum(model.losses(0).values()).backward()
    torch.testing.assert_close(points[0].grad, plain[0].grad)


def test_a_closure_of_lbfgs():
    model = Heat(True)
    optimizer = gradsurg.wrap(
        torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe"), guarantee="gradient"
    )

    def closure():
        optimizer.zero_grad()
        total = optimizer.total(model.losses(0))
        total.backward()
        return total

    first = optimizer.step(closure).item()
    for _ in range(3):
        last = optimizer.step(closure).item()
    assert last < 0.3 * first


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of torch.func.jvp
@pytest.mark.parametrize("way", ["vjp", "jvp"])
def test_derivatives_of_torch_func(way):
    model, optimizer = build(True)
    x = torch.rand(10, 1)

    def u(x):
        return model.u(torch.cat([x, x.square()], 1))

    for batch in range(4):
        x = x.roll(batch, 0)
        derivative = torch.func.vjp(u, x)[1](torch.ones(10))[0] if way == "vjp" else torch.func.jvp(u, (x,), (x,))[1]
        losses = {"slope": (derivative + u(x) - 3).square().mean(), "value": (u(x) + 1).square().mean()}
        J = gradients_of(losses.values(), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        check_step(model, optimizer, J)
