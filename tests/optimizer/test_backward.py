"""Functions instead of losses: each task's own forward and backward pass, one graph at a time."""

import gc
import weakref

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from tests.networks import build, data, equal_weights, reference_rows, rows_of, same, trained

TASKS = ("left", "right", "whole")


def wrapped(model, cls=torch.optim.SGD, lr=0.05, **options):
    return gradsurg.wrap(cls(trained(model), lr=lr), **options)


def functions(model, batch=0, names=TASKS):
    return {name: lambda name=name: model.losses(batch)[name] for name in names}


@pytest.mark.parametrize("kind", ["heads", "all shared", "tied", "complex", "sparse", "patchy"])
def test_rows_are_those_of_the_losses_to_the_bit(kind):
    model = build(kind)
    optimizer = wrapped(model)
    losses = model.losses(0)
    expected = reference_rows(losses, trained(model))
    optimizer.backward(functions(model, names=tuple(losses)))
    rows = rows_of(optimizer)
    held = [p.requires_grad for p in model.parameters()]
    assert held  # frozen parameters are not the optimizer's
    assert rows.keys() == expected.keys()
    for name in rows:
        assert same(rows[name], expected[name])
    assert {k: v.item() for k, v in optimizer.report.losses.items()} == {k: v.item() for k, v in losses.items()}


def test_training_is_that_with_losses_to_the_bit():
    one, other = build(), build()
    a, b = wrapped(one, torch.optim.AdamW), wrapped(other, torch.optim.AdamW)
    for batch in range(4):
        a.zero_grad()
        b.zero_grad()
        a.backward(functions(one, batch))
        b.backward(other.losses(batch))
        a.step()
        b.step()
    assert equal_weights(one, other)


def test_one_graph_at_a_time():
    model = build()
    optimizer = wrapped(model)
    alive = []
    graphs = []

    def compute(name):
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))
        loss = model.losses(0)[name]
        graphs.append(weakref.ref(loss))
        return loss

    optimizer.backward({name: lambda name=name: compute(name) for name in TASKS})
    assert alive == [0, 0, 0]


def test_functions_beside_losses_and_plain():
    model = build()
    optimizer = wrapped(model)
    losses = model.losses(0)
    square = model.trunk[0].weight.square().sum()
    optimizer.backward(
        {**functions(model, names=("left",)), "right": losses["right"], "whole": losses["whole"]}, plain=square
    )
    got = [p.grad.clone() for p in trained(model)]
    optimizer.zero_grad()
    optimizer.backward(model.losses(0), plain=model.trunk[0].weight.square().sum())
    assert same(got, [p.grad for p in trained(model)])


def test_absent_tasks():
    model = build()
    optimizer = wrapped(model)
    optimizer.backward({**functions(model, names=("left", "right")), "whole": lambda: None})
    assert optimizer.report.tasks == ("left", "right")
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="no function of"):
        optimizer.backward({"left": lambda: None, "right": lambda: torch.tensor(1.0)})
    assert all(p.grad is None for p in trained(model))


def test_accumulation():
    model = build()
    optimizer = wrapped(model)
    with optimizer.accumulate():
        optimizer.backward({k: lambda f=f: f() / 2 for k, f in functions(model, 0).items()})
    optimizer.backward({k: lambda f=f: f() / 2 for k, f in functions(model, 1).items()})
    got = [p.grad.clone() for p in trained(model)]
    optimizer.zero_grad()
    a, b = model.losses(0), model.losses(1)
    optimizer.backward({name: (a[name] + b[name]) / 2 for name in a})
    assert all(torch.allclose(x, p.grad, rtol=1e-4, atol=1e-6) for x, p in zip(got, trained(model), strict=True))


def test_under_no_grad_a_function_still_builds_its_graph():
    model = build()
    optimizer = wrapped(model)
    with torch.no_grad():
        optimizer.backward(functions(model))
    assert all(p.grad is not None for p in trained(model))


class Mine(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("which", range(3))
def test_an_exception_leaves_everything_as_it_was(which):
    model = build()
    optimizer = wrapped(model)
    before = torch.ones_like(model.trunk[0].weight)
    model.trunk[0].weight.grad = before

    def fails():
        raise Mine

    given = functions(model)
    given[TASKS[which]] = fails
    with pytest.raises(Mine):
        optimizer.backward(given)
    assert model.trunk[0].weight.grad is before
    assert all(p.grad is None for p in trained(model)[1:])
    optimizer.zero_grad()
    optimizer.backward(functions(model))
    assert optimizer.report.tasks == TASKS


def test_what_functions_must_not_do():
    model = build()
    optimizer = wrapped(model)
    losses = model.losses(0)
    with pytest.raises(ValueError, match=r"losses\['left'\]\(\) has shape"):
        optimizer.backward({"left": lambda: model.trunk(data(0, 3, 5))})
    with pytest.raises(ValueError, match=r"losses\['left'\]\(\) is a float"):
        optimizer.backward({"left": lambda: 1.0})
    with pytest.raises(ValueError, match="is a function"):
        optimizer.total(functions(model))
    for inside in (optimizer.zero_grad, lambda: optimizer.backward(model.losses(0))):

        def meddles(inside=inside):
            inside()
            return model.losses(0)["left"]

        with pytest.raises(MultiTaskError, match="must only compute a loss"):
            optimizer.backward({"right": lambda: model.losses(0)["right"], "left": meddles})
    assert all(p.grad is None for p in trained(model))
    optimizer.backward(losses)


def test_functions_that_share_a_graph():
    model = build()
    optimizer = wrapped(model)
    h = model.trunk(data(0, 16, 5))
    given = {name: lambda head=head: head(h).square().mean() for name, head in model.heads.items()}
    with pytest.raises(MultiTaskError, match="retain_graph=True"):
        optimizer.backward(given)
    assert all(p.grad is None for p in trained(model))
    h = model.trunk(data(0, 16, 5))
    optimizer.backward(given, retain_graph=True)
    assert optimizer.report.tasks == TASKS


class Moody(nn.Module):
    """Batch norm and dropout in what tasks share."""

    def __init__(self, dropout):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(dropout))
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])

    def loss(self, i):
        return (self.heads[i](self.trunk(data(0, 16, 5))) - i).square().mean()


def test_batch_norm_sees_the_batch_once_a_task():
    """The gradients are those of one forward pass; the running statistics move once per function."""
    torch.manual_seed(0)
    model = Moody(0.0)
    optimizer = wrapped(model)
    optimizer.backward([lambda i=i: model.loss(i) for i in range(3)])
    assert model.trunk[1].num_batches_tracked == 3
    got = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    h = model.trunk(data(0, 16, 5))
    optimizer.backward([(model.heads[i](h) - i).square().mean() for i in range(3)])
    assert same(got, [p.grad for p in model.parameters()])
    assert model.trunk[1].num_batches_tracked == 4


def test_dropout_draws_anew_for_every_task_unless_the_seed_is_set():
    torch.manual_seed(0)
    model = Moody(0.5)
    optimizer = wrapped(model)

    def seeded(i):
        torch.manual_seed(7)
        return model.loss(i)

    def row(name, function):
        optimizer.zero_grad()
        optimizer.backward({"other": lambda: function(0), name: lambda: function(1)})
        return rows_of(optimizer)[name][0].clone()

    alone = torch.autograd.grad(seeded(1), model.trunk[0].weight)[0]
    assert torch.equal(row("b", seeded), alone)  # the mask is the one of the first function too
    assert not torch.equal(row("b", model.loss), row("b", model.loss))
