"""batched=True: one backward pass through what the tasks share, and the rows of m passes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from tests.networks import MODELS, build, data, reference_rows, rows_of, run_backward, same, trained, twins
from tests.optimizer.cheap.batched_passes import agree, trains_alike, was_batched, wrapped


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


def test_checkpointing_without_reentry_is_batched():
    model, other = twins()
    optimizer = wrapped(model)
    z = checkpoint(model.trunk, data(0, 16, 5), use_reentrant=False)
    optimizer.total({name: head(z).square().mean() for name, head in model.heads.items()}).backward()
    z = other.trunk(data(0, 16, 5))
    want = {name: head(z).square().mean() for name, head in other.heads.items()}
    assert agree(rows_of(optimizer), reference_rows(want, trained(other)))
    assert was_batched(optimizer)


def test_one_task_is_one_ordinary_pass():
    model = build()
    optimizer = wrapped(model)
    optimizer.total({"left": model.losses(0)["left"]}).backward()
    assert not optimizer._gradsurg.told & {"batched works", "batched fails"}  # nothing tried yet
    assert optimizer._gradsurg.passes.fill(optimizer._gradsurg, {}, None, False) is False
