"""batched=True: one backward pass through what the tasks share, and the rows of m passes."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.distributed.layout import Layout
from gradsurg.optimizer.cheap.batched import OBSTACLES as OBSTACLES_BY_KIND
from gradsurg.optimizer.cheap.batched import run_batched
from tests.networks import MODELS, Snapshot, build, data, reference_rows, rows_of, run_backward, same, trained, twins


def wrapped(model, **options):
    return gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), batched=True, **options)


def was_batched(optimizer):
    return optimizer._gradsurg.batched.works is True


def agree(got, want, tolerance=2e-6):
    """Whether rows have the same gaps, shapes and dtypes, and numbers up to float32's rounding of their norm."""
    assert got.keys() == want.keys()
    for name, row in want.items():
        assert [g is None for g in got[name]] == [g is None for g in row], name
        for a, b in zip(got[name], row, strict=True):
            if b is not None:
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                rounding = tolerance if b.dtype != torch.bfloat16 else 1e-2
                assert (a - b).abs().max() <= rounding * b.abs().max() + 1e-12, name
    return True


def trains_alike(steps, rtol, atol, **options):
    """Train twins with batched passes and one by one, and compare their parameters."""
    model, other = twins()
    optimizer, reference = wrapped(model, **options), gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05), **options)
    for batch in range(steps):
        for each, of in ((optimizer, model), (reference, other)):
            each.zero_grad()
            each.total(of.losses(batch)).backward()
            each.step()
    assert was_batched(optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "sparse"])
def test_the_rows_are_those_of_passes_one_by_one(way, kind):
    model, other = twins(kind)
    optimizer = wrapped(model)
    for batch in range(3):
        run_backward(way, optimizer, model.losses(batch), scale=0.5)
        assert agree(rows_of(optimizer), reference_rows(other.losses(batch), trained(other), 0.5))
        optimizer.zero_grad()
    assert was_batched(optimizer)


def test_heads_get_their_gradient_to_the_bit():
    model, other = twins()
    optimizer = wrapped(model)
    run_backward("total", optimizer, model.losses(0))
    want = reference_rows(other.losses(0), list(other.heads.parameters()))
    got = {name: [optimizer._gradsurg.capture.rows[name].get(p) for p in model.heads.parameters()] for name in want}
    assert same(got, want)


def test_training_goes_as_without_it():
    trains_alike(20, 1e-4, 1e-6)


def test_the_shared_part_runs_once():
    model, calls = build(), []

    def count(_):
        calls.append(1)

    optimizer = wrapped(model)
    z = model.trunk[0](data(0, 4, 5))
    z.register_hook(count)
    y = model.trunk[1:](z)
    optimizer.total([head(y).square().mean() for head in model.heads.values()]).backward()
    assert len(calls) == 1


# -- graphs of every shape ----------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Parameters a to d, layers that read one or two earlier results, and losses that read any of them."""
    layers = [draw(st.tuples(st.integers(0, 3), st.integers(0, k), st.integers(0, k), st.booleans())) for k in range(5)]
    losses = draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=2, max_size=4))
    return layers, losses


def run_graph(graph, parameters):
    layers, losses = graph
    results = [data(7, 6, 4)]
    for which, one, other, twice in layers:
        results.append(torch.tanh(results[one] @ parameters[which] + (results[other] if twice else 0)))
    return {
        f"task{i}": sum((results[k] * (i + 1 - k)).square().mean() for k in read) + 0 * parameters[0].sum()
        for i, read in enumerate(losses)
    }


@given(graphs())
def test_rows_of_any_graph_are_those_of_passes_one_by_one(graph):
    model, other = (nn.ParameterList(data(k, 4, 4) / 2 for k in range(4)) for _ in range(2))
    optimizer = wrapped(model)
    optimizer.total(run_graph(graph, model)).backward()
    assert was_batched(optimizer)
    assert agree(rows_of(optimizer), reference_rows(run_graph(graph, other), list(other)), 1e-5)


def test_tasks_that_share_nothing():
    model = nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    other = copy.deepcopy(model)
    optimizer = wrapped(model)
    optimizer.total([each(data(0, 3, 2)).mean() for each in model]).backward()
    want = reference_rows({str(i): each(data(0, 3, 2)).mean() for i, each in enumerate(other)}, trained(other))
    assert same(rows_of(optimizer), want)
    assert was_batched(optimizer)


def test_one_loss_made_from_another():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), batched=True)
    first = p.square().sum()
    optimizer.total({"first": first, "double": 2 * first, "other": p.sum()}).backward()
    rows = rows_of(optimizer)
    assert [rows[name][0].tolist() for name in rows] == [[2.0, 4.0], [4.0, 8.0], [1.0, 1.0]]


def test_what_autograd_shares_between_leaves_is_not_added_to_twice():
    """The gradients of a and b in a + b are one tensor, and that of a sum is expanded; rows are added to in place."""
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([a, b], lr=0.1), batched=True)
    with optimizer.accumulate():
        for _ in range(2):
            z = a + b
            optimizer.total([z.sum(), (3 * z).sum()]).backward()
    z = a + b
    optimizer.total([z.sum(), (3 * z).sum()]).backward()
    assert [[g.tolist() for g in row] for row in rows_of(optimizer).values()] == [[[3.0] * 3] * 2, [[9.0] * 3] * 2]


# -- what else hangs on the passes --------------------------------------------------------------------------------


def test_a_hook_at_the_border_acts_once():
    model, other = twins()
    optimizer = wrapped(model)

    def losses_of(net):
        z = net.trunk(data(0, 8, 5))
        z.register_hook(lambda g: -3 * g)
        net.trunk[0].weight.register_hook(lambda g: 2 * g)
        return {name: head(z).square().mean() for name, head in net.heads.items()}

    optimizer.total(losses_of(model)).backward()
    assert was_batched(optimizer)
    assert agree(rows_of(optimizer), reference_rows(losses_of(other), trained(other)))


def test_leaves_that_the_optimizer_does_not_train_get_the_sum():
    model = build()
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    model.trunk[0].bias.grad = torch.ones(7)
    x = data(0, 16, 5).requires_grad_()
    optimizer = gradsurg.wrap(torch.optim.SGD(trunk[2:], lr=0.1), batched=True)
    losses = [head(model.trunk(x)).square().mean() for head in model.heads.values()]
    want = torch.autograd.grad(sum(losses), [x, *trunk[:2], *heads], retain_graph=True)
    optimizer.total(losses).backward()
    assert was_batched(optimizer)
    torch.testing.assert_close(model.trunk[0].bias.grad, want[2] + 1)
    for leaf, g in zip([x, trunk[0], *heads], [want[0], want[1], *want[3:]], strict=True):
        torch.testing.assert_close(leaf.grad, g)


def test_a_plain_loss_beside_it_and_the_graph_kept():
    model, other = twins()
    optimizer = wrapped(model)
    for net, opt in ((model, optimizer), (other, gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.1)))):
        losses = net.losses(0)
        opt.total(losses, plain=net.trunk[0].weight.square().sum()).backward(retain_graph=True)
        opt.total(losses).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert was_batched(optimizer)


def test_the_graph_is_used_up_as_by_any_backward():
    model = build()
    optimizer = wrapped(model)
    for batch in range(2):  # the first pass keeps the graph, in case it fails; from the second on it is let go
        losses = model.losses(batch)
        optimizer.total(losses).backward()
    with pytest.raises(RuntimeError, match="second time"):
        next(iter(losses.values())).backward()


@pytest.mark.parametrize("options", [{"rotate": 2}, {"refresh_every": 3}, {"row_dtype": torch.bfloat16}])
def test_it_goes_with_the_other_ways_to_save(options):
    trains_alike(7, 1e-3, 1e-5, **options)


# -- where it cannot be done --------------------------------------------------------------------------------------


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
    engine.capture.open()
    engine.session.layout = Layout()  # as it is set by lay_out(), before any pass
    with pytest.warns(UserWarning, match="several ranks"):
        assert run_batched(engine, losses, None, False) is False
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


def test_checkpointing_without_reentry_is_batched():
    model, other = twins()
    optimizer = wrapped(model)
    z = checkpoint(model.trunk, data(0, 16, 5), use_reentrant=False)
    optimizer.total({name: head(z).square().mean() for name, head in model.heads.items()}).backward()
    z = other.trunk(data(0, 16, 5))
    want = {name: head(z).square().mean() for name, head in other.heads.items()}
    assert agree(rows_of(optimizer), reference_rows(want, trained(other)))
    assert was_batched(optimizer)


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


def test_one_task_is_one_ordinary_pass():
    model = build()
    optimizer = wrapped(model)
    optimizer.total({"left": model.losses(0)["left"]}).backward()
    assert optimizer._gradsurg.batched.works is None  # nothing tried yet
    assert run_batched(optimizer._gradsurg, {}, None, False) is False


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_wrong_value_is_an_error(value):
    with pytest.raises(ValueError, match="batched="):
        gradsurg.wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), batched=value)
