"""refresh_every=k: new weights every k-th step; between, one backward pass of the weighted sum."""

import copy
import functools
import operator
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from gradsurg import MultiTaskError
from tests.networks import MODELS, build, data, equal_weights, same, trained


def wrapped(model, cls=torch.optim.SGD, lr=0.05, **options):
    return gradsurg.wrap(cls(trained(model), lr=lr), **options)


def step(optimizer, losses, way="total"):
    optimizer.zero_grad()
    if way == "total":
        optimizer.total(losses).backward()
    else:
        optimizer.backward(losses)
    gradients = [None if p.grad is None else p.grad.clone() for g in optimizer.param_groups for p in g["params"]]
    optimizer.step()
    return gradients


def weighted(losses, parameters, weights):
    """Σ w_i g_i where at least two tasks reach a parameter, the one task's own gradient elsewhere."""
    rows = {k: torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for k, v in losses.items()}
    result = []
    for k in range(len(parameters)):
        terms = {name: row[k] for name, row in rows.items() if row[k] is not None}
        if len(terms) > 1:
            result.append(functools.reduce(operator.add, [weights[name] * g for name, g in terms.items()]))
        else:
            result.append(next(iter(terms.values()), None))
    return result


def close(a, b):
    return all(
        (x is None and y is None) or torch.allclose(x.to_dense(), y.to_dense(), rtol=1e-4, atol=1e-6)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "dtypes"])
def test_between_the_weighted_sum_and_plain_heads(kind, way):
    model = build(kind)
    optimizer = wrapped(model, refresh_every=3)
    step(optimizer, model.losses(0), way)
    weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
    for batch in (1, 2):
        expected = weighted(model.losses(batch), trained(model), weights)
        assert close(step(optimizer, model.losses(batch), way), expected)
        assert optimizer.report.level == "reused weights"
        assert optimizer.report.fresh == ()
        assert dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True)) == weights
    step(optimizer, model.losses(3), way)
    assert optimizer.report.level == "gradients"


@given(seed=st.integers(0, 1000), surgery=st.sampled_from(["cone", "upgrad", "mgda"]))
def test_heads_get_their_plain_gradient_to_the_bit(seed, surgery):
    model = build(seed=seed)
    optimizer = wrapped(model, refresh_every=2, surgery=surgery)
    step(optimizer, model.losses(seed))
    own = list(model.heads.parameters())
    expected = torch.autograd.grad(sum(model.losses(seed + 1).values()), own)
    optimizer.zero_grad()
    optimizer.total(model.losses(seed + 1)).backward()
    assert optimizer.report.level == "reused weights"
    assert same([p.grad for p in own], list(expected))


def test_one_pass_between():
    model = build()
    passes = []
    model.trunk[0].weight.register_hook(lambda _: passes.append(1))
    optimizer = wrapped(model, refresh_every=4)
    counts = []
    for batch in range(9):
        passes.clear()
        step(optimizer, model.losses(batch))
        counts.append(len(passes))
    assert counts == [3, 1, 1, 1, 3, 1, 1, 1, 3]


def test_nothing_is_left_in_the_graph():
    """The hooks that weigh are gone after the pass: another pass over a kept graph is a plain one."""
    model = build()
    optimizer = wrapped(model, refresh_every=2)
    step(optimizer, model.losses(0))
    losses = model.losses(1)
    expected = torch.autograd.grad(sum(losses.values()), trained(model), retain_graph=True)
    optimizer.zero_grad()
    optimizer.backward(losses, retain_graph=True)
    assert same(torch.autograd.grad(sum(losses.values()), trained(model)), expected)


class Crossed(nn.Module):
    """A loss inside another, a parameter read directly, a tensor used twice, a loss that is a parameter."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.scale = nn.Linear(5, 4), nn.Linear(4, 1), nn.Parameter(torch.tensor(2.0))

    def losses(self, batch):
        h = torch.tanh(self.trunk(data(batch, 8, 5)))
        inner = self.head(h).square().mean()
        return {
            "inner": inner,
            "outer": inner * self.scale + h.mean(),
            "scale": self.scale,
            "both": (h * h).sum() + self.scale**2,
        }


def test_losses_that_meet_in_unusual_places():
    torch.manual_seed(0)
    model = Crossed()
    optimizer = wrapped(model, refresh_every=2, normalize="none", surgery="mgda")
    step(optimizer, model.losses(0))
    weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
    expected = weighted(model.losses(1), trained(model), weights)
    assert close(step(optimizer, model.losses(1)), expected)


def test_custom_functions_and_checkpoints_at_the_border():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    torch.manual_seed(0)
    trunk, heads = nn.Linear(5, 4), nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1), refresh_every=2)

    def losses(batch):
        h = checkpoint(trunk, data(batch, 8, 5).requires_grad_(), use_reentrant=True)
        return {
            "custom": heads[0](Double.apply(h)).square().mean(),
            "checkpoint": checkpoint(heads[1], h, use_reentrant=False).mean(),
        }

    def plain(batch):
        h = trunk(data(batch, 8, 5))
        return {"custom": heads[0](2 * h).square().mean(), "checkpoint": heads[1](h).mean()}

    step(optimizer, losses(0))
    weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
    expected = weighted(plain(1), parameters, weights)
    assert close(step(optimizer, losses(1)), expected)
    h = trunk(data(0, 8, 5))
    hiding = {"custom": heads[0](h).mean(), "checkpoint": checkpoint(heads[1], h, use_reentrant=True).mean()}
    step(optimizer, losses(2))
    optimizer.zero_grad()
    with pytest.raises(MultiTaskError, match="use_reentrant=False"):
        optimizer.backward(hiding)
    assert all(p.grad is None for p in parameters)


def test_tasks_that_come_and_go_refresh():
    model = build()
    optimizer = wrapped(model, refresh_every=10)
    levels = []
    for batch, names in enumerate(["abc", "abc", "ab", "ab", "abc", "a", "abc", "abc"]):
        losses = dict(zip("abc", model.losses(batch).values(), strict=True))
        step(optimizer, {name: losses[name] for name in names})
        levels.append(optimizer.report.level)
    new, old = "gradients", "reused weights"
    assert levels == [new, old, new, old, new, new, old, old]


@pytest.mark.parametrize("route", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_resuming_is_not_noticed(route, before):
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.01, refresh_every=3)
    for batch in range(before):
        step(optimizer, model.losses(batch))
    if route == "state_dict":
        twin = copy.deepcopy(model)
        other = wrapped(twin, torch.optim.Adam, lr=0.01, refresh_every=3)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        copied = (copy.deepcopy if route == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x)))((model, optimizer))
        twin, other = copied
    for batch in range(before, before + 4):
        step(optimizer, model.losses(batch))
        step(other, twin.losses(batch))
        assert optimizer.report.level == other.report.level
    assert equal_weights(model, twin)


def test_the_first_step_of_all_is_that_of_the_plain_wrap():
    """refresh_every changes nothing in a step that finds new weights: bit for bit."""
    one, other = build(), build()
    a, b = wrapped(one, torch.optim.Adam, refresh_every=5), wrapped(other, torch.optim.Adam)
    assert same(step(a, one.losses(0)), step(b, other.losses(0)))
    assert equal_weights(one, other)


def test_micro_batches_of_one_step_go_one_way():
    model = build()
    optimizer = wrapped(model, refresh_every=2)
    for number in range(4):
        optimizer.zero_grad()
        levels = []
        expected = None
        if number % 2:
            weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
            halves = [weighted(model.losses(2 * number + i), trained(model), weights) for i in range(2)]
            expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        for i in range(2):
            (optimizer.total(model.losses(2 * number + i)) / 2).backward()
            levels.append(optimizer.report.level)
        assert levels == [["gradients"] * 2, ["reused weights"] * 2][number % 2]
        if expected is not None:
            assert close([p.grad for p in trained(model)], expected)
        optimizer.step()


def test_a_scaler_that_skips_a_step_does_not_count_it():
    model = build()
    optimizer = wrapped(model, refresh_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    levels = []
    for batch, factor in enumerate([float("inf"), 1.0, float("inf"), 1.0, 1.0]):
        optimizer.zero_grad()
        losses = model.losses(batch)
        losses["left"] = losses["left"] * factor
        scaler.scale(optimizer.total(losses)).backward()
        levels.append(optimizer.report.level)
        scaler.step(optimizer)
        scaler.update()
    new, old = "gradients", "reused weights"
    assert levels == [new, new, old, old, new]


@pytest.mark.parametrize("policy", ["skip_task", "raise"])
def test_nonfinite_between_is_found_by_name(policy):
    model = build()
    optimizer = wrapped(model, refresh_every=5, nonfinite=policy)
    step(optimizer, model.losses(0))
    step(optimizer, model.losses(1))
    assert optimizer.report.level == "reused weights"
    optimizer.zero_grad()
    losses = model.losses(2)
    losses["right"] = losses["right"] * float("nan")
    if policy == "raise":
        with pytest.raises(MultiTaskError, match="'right'"):
            optimizer.backward(losses)
        assert all(p.grad is None for p in trained(model))
    else:
        optimizer.backward(losses)
        assert optimizer.report.nonfinite == ("right",)
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained(model))


def test_plain_and_penalties_are_added_untouched():
    model = build()
    optimizer = wrapped(model, refresh_every=2)
    step(optimizer, model.losses(0))
    weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
    expected = weighted(model.losses(1), trained(model), weights)
    expected[0] = expected[0] + 6 * model.trunk[0].weight.detach()
    optimizer.zero_grad()
    square = model.trunk[0].weight.square().sum
    (optimizer.total(model.losses(1), plain=2 * square()) + square()).backward()
    assert close([p.grad for p in trained(model)], expected)


def test_an_exception_between_leaves_everything_as_it_was():
    model = build()
    optimizer = wrapped(model, refresh_every=3)
    step(optimizer, model.losses(0))
    optimizer.zero_grad()
    losses = model.losses(1)

    def fails(_):
        raise RuntimeError("mine")

    handle = model.trunk[0].weight.register_hook(fails)
    with pytest.raises(RuntimeError, match="mine"):
        optimizer.total(losses).backward()
    handle.remove()
    assert all(p.grad is None for p in trained(model))
    step(optimizer, model.losses(1))
    assert optimizer.report.level == "reused weights"


def test_shared_declared():
    """One pass serves only where exactly the declared parameters are those that several tasks reach."""
    model = build()
    optimizer = wrapped(model, refresh_every=2, shared=model.trunk)
    step(optimizer, model.losses(0))
    step(optimizer, model.losses(1))
    assert optimizer.report.level == "reused weights"
    optimizer = wrapped(model, refresh_every=2, shared=model.trunk[2])
    step(optimizer, model.losses(0))
    with pytest.raises(MultiTaskError, match="not in shared="):
        optimizer.backward(model.losses(1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"refresh_every": True}, "refresh_every=True"),
        ({"refresh_every": 2.0}, "refresh_every=2.0"),
        ({"refresh_every": 2, "rotate": 1}, "choose one"),
        ({"refresh_every": 2, "granularity": "tensor"}, "granularity='model'"),
        ({"refresh_every": 2, "surgery": "graddrop"}, "has none"),
    ],
)
def test_options_that_do_not_go_together(options, match):
    with pytest.raises(ValueError, match=match):
        wrapped(build(), **options)


def test_gradients_that_users_bring_themselves():
    model = build()
    optimizer = wrapped(model, refresh_every=2)
    with pytest.raises(MultiTaskError, match="refresh_every=2"), optimizer.task("left"):
        pass
    with pytest.raises(MultiTaskError, match="refresh_every=2"):
        optimizer.set_gradients({"left": []})
    with pytest.raises(ValueError, match="function"):
        optimizer.backward({"left": lambda: model.losses(0)["left"]})
