"""preferences= of one step: for that step alone, under every way to hand over gradients, and 0 allowed."""

import pytest
import torch

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.surgery import SURGERIES
from gradsurg.surgery.base import ElementwiseSurgery
from tests.networks import TASKS, build, equal_weights, same, trained, twins

OWN = {"right": 0.3}
WAYS = {
    "total": lambda o, m, b, p: o.total(m.losses(b), preferences=p).backward(),
    "scaled": lambda o, m, b, p: (o.total(m.losses(b), preferences=p) * 2).backward(),
    "backward": lambda o, m, b, p: o.backward(m.losses(b), preferences=p),
    "functions": lambda o, m, b, p: o.backward(
        {name: lambda name=name: m.losses(b)[name] for name in TASKS}, preferences=p
    ),
    "joined": lambda o, m, b, p: joined(o, m, b, p),
    "task": lambda o, m, b, p: blocks(o, m, b, p),
    "set_gradients": lambda o, m, b, p: o.set_gradients(rows(m, b), preferences=p),
    "accumulate": lambda o, m, b, p: accumulated(o, m, b, p),
    "features": lambda o, m, b, p: through_features(o, m, b, p),
}


def joined(optimizer, model, batch, preferences):
    first = optimizer.total({name: model.losses(batch)[name] for name in TASKS[:1]})
    losses = model.losses(batch)  # a graph of its own
    rest = {name: losses[name] for name in TASKS[1:]}
    (first + optimizer.total(rest, preferences=preferences)).backward()


def blocks(optimizer, model, batch, preferences):
    for name in TASKS:
        mine = {k: v for k, v in (preferences or {}).items() if k == name}
        with optimizer.task(name, preferences=mine):
            model.losses(batch)[name].backward()


def rows(model, batch):
    return {
        name: torch.autograd.grad(loss, trained(model), allow_unused=True, retain_graph=True)
        for name, loss in model.losses(batch).items()
    }


def accumulated(optimizer, model, batch, preferences):
    with optimizer.accumulate():
        (optimizer.total(model.losses(batch), preferences=preferences) / 2).backward()
    (optimizer.total(model.losses(batch + 1)) / 2).backward()  # it is still the same step


def through_features(optimizer, model, batch, preferences):
    h = model.trunk(torch.ones(3, 5))
    losses = {name: (head(h) - batch).square().mean() for name, head in model.heads.items()}
    optimizer.total(losses, features=h, preferences=preferences).backward()


@pytest.mark.parametrize("options", [{}, {"batched": True}, {"surgery": "mgda"}, {"surgery": "graddrop"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_steps_own_preferences_are_those_of_wrap_for_that_step_alone(way, options):
    if way in ("functions", "joined", "accumulate") and "batched" in options:
        options = {}
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), **options)
    plain = gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05), **options)
    for batch, own in enumerate((None, OWN, None)):
        if own:
            gradsurg.unwrap(plain)
            plain = gradsurg.wrap(plain, preferences=own, **options)
            plain._gradsurg.checkpoint.end_step(None)  # it is the second step
            plain._gradsurg.checkpoint.learn(TASKS)
        for o, m, p in ((optimizer, model, own), (plain, other, None)):
            o.zero_grad()
            WAYS[way](o, m, batch, p)
            o.step()
        assert equal_weights(model, other)
        if own:
            report = optimizer.report  # joined totals run in the order of autograd's choice
            assert dict(zip(report.tasks, report.preferences.tolist(), strict=True)) == {
                **dict.fromkeys(TASKS, 1.0),
                **own,
            }
            gradsurg.unwrap(plain)
            plain = gradsurg.wrap(plain, **options)
            for _ in range(2):
                plain._gradsurg.checkpoint.end_step(None)


def test_the_totals_value_is_weighted():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), preferences={"left": 2.0})
    losses = model.losses(0)
    total = optimizer.total(losses, preferences={"right": 0.0, "left": 0.5})
    assert torch.allclose(total, 0.5 * losses["left"] + losses["whole"])


J = torch.tensor([[1.0, 0.2, 0.0], [0.3, 1.0, 0.1], [-1.0, 0.1, 0.5]], dtype=torch.float64)
WEIGHING = [name for name, kind in SURGERIES.items() if not issubclass(kind, ElementwiseSurgery) and name != "random"]


def direction(surgery, rows, preferences=None, **options):
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    options = {"normalize": "none", "guarantee": "none", "surgery": surgery} | options
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), **options)
    optimizer.set_gradients({name: [row] for name, row in rows.items()}, preferences=preferences)
    return w.grad.clone(), optimizer


@pytest.mark.parametrize("name", SURGERIES)
def test_a_task_with_0_has_no_part_in_the_direction(name):
    """Without conflicts all that is left is what the others want: in each surgery's own words, or for 0 as a limit."""
    quiet = {"a": J[0], "b": J[1], "kl": torch.tensor([0.5, 0.5, 0.9], dtype=torch.float64)}
    found, _ = direction(name, quiet, {"kl": 0})
    alone, _ = direction(name, {name: quiet[name] for name in ("a", "b")})
    if name in ("graddrop", "random"):  # they draw other numbers for other tasks
        assert found.isfinite().all()
    elif getattr(SURGERIES[name], "linear", False):
        limit, _ = direction(name, quiet, {"kl": 1e-13})
        assert torch.allclose(found, limit, atol=1e-10)
    else:
        assert torch.allclose(found, alone, atol=1e-12)


@pytest.mark.parametrize("primary", [None, "a"])
@pytest.mark.parametrize("name", WEIGHING)
def test_a_task_with_0_is_protected(name, primary):
    """J's last row conflicts with the first."""
    given = dict(zip("abc", J, strict=True))
    if SURGERIES[name].conflict_free and primary is None:
        u, _ = direction(name, given, {"c": 0})
        assert (J @ u >= -1e-9).all()
    for guarantee in ("gradient", "update"):
        u, optimizer = direction(name, given, {"c": 0}, guarantee=guarantee, primary=primary)
        w = optimizer.param_groups[0]["params"][0]
        optimizer.step()
        if name != "random":
            moved = -w.detach()
            assert (J @ moved >= -1e-4 * J.norm(dim=1) * moved.norm()).all()
        assert guarantee == "update" or (J @ u >= -1e-4 * J.norm(dim=1) * u.norm()).all()


def test_cone_with_0_is_the_projection_of_the_others_sum():
    """Dykstra's algorithm, in plain arithmetic."""
    u, _ = direction("cone", dict(zip("abc", J, strict=True)), {"c": 0})
    x, corrections = J[0] + J[1], [torch.zeros(3, dtype=torch.float64)] * 3
    for _ in range(5000):
        for i, g in enumerate(J):
            y = x + corrections[i]
            x = y - min(float(g @ y), 0.0) / float(g @ g) * g
            corrections[i] = y - x
    assert torch.allclose(u, x, atol=1e-9)


@pytest.mark.parametrize("surgery", ["cone", "mgda", "trimmed_mean"])
def test_all_0_leaves_the_shared_parameters_where_they_are(surgery):
    u, _ = direction(surgery, dict(zip("abc", J, strict=True)), dict.fromkeys("abc", 0))
    assert not u.any()


def test_the_head_of_a_task_with_0_gets_its_plain_gradient():
    model = build()
    expected = torch.autograd.grad(model.losses(0)["right"], model.heads["right"].weight)[0]
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05))
    optimizer.total(model.losses(0), preferences={"right": 0}).backward()
    assert torch.equal(model.heads["right"].weight.grad, expected)


def test_refreshed_weights_belong_to_their_preferences():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), refresh_every=10)
    levels = []
    for batch, own in enumerate((None, None, OWN, OWN, {"right": 0}, None, None)):
        optimizer.zero_grad()
        optimizer.total(model.losses(batch), preferences=own).backward()
        optimizer.step()
        levels.append(optimizer.report.level == "reused weights")
        optimizer.load_state_dict(optimizer.state_dict())
    assert levels == [False, True, False, True, False, False, True]


def test_under_rotation_the_averages_are_weighed_too():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), rotate=1)
    plain = gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05), rotate=1, preferences=OWN)
    for batch in range(4):
        for o, m, p in ((optimizer, model, OWN), (plain, other, None)):
            o.zero_grad()
            o.total(m.losses(batch), preferences=p).backward()
            o.step()
    assert equal_weights(model, other)


@pytest.mark.parametrize(
    "wrong", [{"right": -1.0}, {"right": float("nan")}, {"right": "1"}, {"rihgt": 1.0}, 3, {1: 1.0}]
)
def test_wrong_preferences_are_refused_before_anything_changes(wrong):
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05))
    twin = gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05))
    for call in (
        lambda: optimizer.total(model.losses(0), preferences=wrong),
        lambda: optimizer.backward(model.losses(0), preferences=wrong),
        lambda: optimizer.task("right", preferences=wrong).__enter__(),
        lambda: optimizer.set_gradients(rows(model, 0), preferences=wrong),
    ):
        with pytest.raises(ValueError, match="preferences"):
            call()
    for o, m in ((optimizer, model), (twin, other)):
        o.total(m.losses(0)).backward()
        o.step()
    assert equal_weights(model, other)


def test_a_failed_run_leaves_no_preferences_behind():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), nonfinite="raise")
    twin = gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05), nonfinite="raise")
    losses = model.losses(0)
    losses["left"] = losses["left"] * float("nan")
    with pytest.raises(MultiTaskError):
        optimizer.total(losses, preferences=OWN).backward()
    optimizer.total(model.losses(0)).backward()
    twin.total(other.losses(0)).backward()
    assert same([p.grad for p in trained(model)], [p.grad for p in trained(other)])
    optimizer.zero_grad()
    optimizer.total(model.losses(0), preferences=OWN).backward()
    optimizer.zero_grad()  # this step is dropped, and its preferences with it
    optimizer.total(model.losses(0)).backward()
    assert same([p.grad for p in trained(model)], [p.grad for p in trained(other)])
