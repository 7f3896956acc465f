"""batched=True where it cannot be done: one warning that says why, and the result of m passes."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.distributed.layout import Layout
from gradsurg.optimizer.cheap.batched import OBSTACLES as OBSTACLES_BY_KIND
from gradsurg.optimizer.run import Run
from tests.networks import Snapshot, build, data, reference_rows, rows_of, same, trained, twins
from tests.optimizer.cheap.batched_passes import was_batched, wrapped


class Plain(torch.autograd.Function):
    """A function that does nothing; its node is called as its class is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Measured(torch.autograd.Function):
    """A function whose backward pass looks at numbers, which vmap does not allow."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * (1.0 if g.sum().item() < 1e9 else 0.0)


class Nested(torch.autograd.Function):
    """A function that runs a backward pass of its own, into p.grad."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            ctx.weight.square().sum().backward()
        return g, None


def look(_):
    """Look at a parameter and leave it alone."""


def measured(model):
    z = Measured.apply(model.trunk(data(0, 8, 5)))
    return {name: head(z).square().mean() for name, head in model.heads.items()}


def reentrant(model):
    z = checkpoint(model.trunk, data(0, 8, 5).requires_grad_(), use_reentrant=True)
    return {name: head(z).square().mean() for name, head in model.heads.items()}


def nested(model):
    z = Nested.apply(model.trunk(data(0, 8, 5)), model.trunk[0].weight)
    return {name: head(z).square().mean() for name, head in model.heads.items()}


def nested_in_a_head(model):
    z = model.trunk(data(0, 8, 5))
    first, *others = [head(z).square().mean() for head in model.heads.values()]
    return dict(zip(model.heads, [Nested.apply(first, model.trunk[0].weight), *others], strict=True))


def hooked(model):
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    return model.losses(0)


def functions(model):
    return {name: lambda name=name: model.losses(0)[name] for name in model.losses(0)}


OBSTACLES = {
    measured: "item",
    reentrant: "use_reentrant=False can be batched",
    nested: "inside torch.vmap",
    nested_in_a_head: "wrote to p.grad",
    hooked: "post_accumulate",
    functions: "functions",
}


@pytest.mark.parametrize("losses_of", OBSTACLES)
def test_where_it_cannot_be_done_one_warning_says_why_and_the_result_is_the_same(losses_of):
    model, other = twins()
    optimizer, reference = wrapped(model), gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05))
    with pytest.warns(UserWarning, match=OBSTACLES[losses_of]) as caught:
        optimizer.backward(losses_of(model))
    assert len(caught) == 1
    assert not was_batched(optimizer)
    reference.backward(losses_of(other))
    assert same(rows_of(optimizer), rows_of(reference))
    assert same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(losses_of(model))


@pytest.mark.parametrize("kind", ["CompiledFunctionBackward", "_DDPSinkBackward", "CheckpointFunctionBackward"])
def test_nodes_that_cannot_be_batched_are_known_by_name(kind):
    """Wherever in the graph they are; none of them says so by itself before it runs, or at all."""
    namesake = type(kind.removesuffix("Backward"), (Plain,), {})
    model = build()
    optimizer = wrapped(model)
    z = namesake.apply(model.trunk(data(0, 8, 5)))
    with pytest.warns(UserWarning, match=re.escape(OBSTACLES_BY_KIND[kind])):
        optimizer.backward({name: head(z).square().mean() for name, head in model.heads.items()})
    assert not was_batched(optimizer)
    assert all(p.grad is not None for p in trained(model))


def test_several_ranks_run_one_by_one():
    model = build()
    optimizer = wrapped(model)
    engine, losses = optimizer._gradsurg, model.losses(0)
    engine.open(Run())
    engine.session.layout = Layout()  # as it is set by lay_out(), before any pass
    with pytest.warns(UserWarning, match="several ranks"):
        assert engine.passes.fill(engine, losses, None, False) is False
    engine.abort()
    assert all(p.grad is None for p in trained(model))


def test_compiled_autograd_runs_one_by_one(monkeypatch):
    monkeypatch.setattr("gradsurg.optimizer.cheap.batched.in_compiled_autograd", lambda: True)
    model = build()
    optimizer = wrapped(model)
    with pytest.warns(UserWarning, match="compiled autograd"):
        optimizer.backward(model.losses(0))
    assert not was_batched(optimizer)
    assert all(p.grad is not None for p in trained(model))


def test_sparse_gradients_run_one_by_one():
    model, other = twins("sparse")
    optimizer = wrapped(model)
    with pytest.warns(UserWarning, match="batched=True has no effect"):
        optimizer.backward(model.losses(0))
    assert same(rows_of(optimizer), reference_rows(other.losses(0), trained(other)))


def test_a_pass_that_fails_later_leaves_everything_as_it_was():
    model = build()
    optimizer = wrapped(model)
    optimizer.total(model.losses(0)).backward()
    before = Snapshot.of(model)
    with pytest.raises(MultiTaskError, match=r"batched=True.*item.*Leave out batched="):
        optimizer.total(measured(model)).backward()
    assert same(Snapshot.of(model), before)
    optimizer.zero_grad()
    optimizer.total(model.losses(1)).backward()
    optimizer.step()
    assert was_batched(optimizer)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_wrong_value_is_an_error(value):
    with pytest.raises(ValueError, match="batched="):
        gradsurg.wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), batched=value)
