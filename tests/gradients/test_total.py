"""total(): its value, its graph, and what stands beside it in one backward pass."""

import warnings

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.gradients.total import at_end_of_backward
from tests.gradients.ways import gradients, wrapped
from tests.networks import build, reference_rows, rows_of, run_backward, same, trained, twins


def test_total_is_the_weighted_sum():
    model = build()
    optimizer = wrapped(model, preferences={"left": 2.0, "whole": 0.5})
    losses = model.losses(0)
    total = optimizer.total(losses, plain=torch.tensor(3.0))
    assert total.shape == ()
    want = 2 * losses["left"] + losses["right"] + 0.5 * losses["whole"] + 3
    torch.testing.assert_close(total.detach(), want.detach(), rtol=1e-6, atol=0)  # float32 sums of four numbers
    total.backward()


def test_total_without_grad_is_a_plain_number():
    model = build()
    optimizer = wrapped(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            losses = model.losses(0)
            total = optimizer.total(losses)
        assert not total.requires_grad
        assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # evaluating is not forgetting to call backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_total_is_at_least_float32(dtype):
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    total = gradsurg.wrap(torch.optim.SGD([w], lr=0.1)).total([w.sum(), w.square().sum()])
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    total.backward()
    assert w.grad.dtype == dtype


@pytest.mark.parametrize("order", ["total first", "penalty first"])
@pytest.mark.parametrize("shared_graph", [False, True])
def test_a_penalty_in_the_same_backward(order, shared_graph):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    penalty = sum(p.square().sum() for p in model.trunk.parameters())
    total = optimizer.total(model.losses(0))
    if shared_graph:
        total, penalty = total * 1.0, penalty * 1.0
    (total + penalty if order == "total first" else penalty + total).backward()
    run_backward("backward", reference, other.losses(0))
    want = [p.grad + 2 * p.detach() for p in other.trunk.parameters()]
    assert same(gradients(model.trunk), want)
    assert same(gradients(model.heads), gradients(other.heads))
    assert same(rows_of(optimizer), rows_of(reference))


@pytest.mark.parametrize("penalised", [False, True])
def test_two_totals_in_one_backward(penalised):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    both = optimizer.total(model.losses(0)) + 2 * optimizer.total(model.losses(1))
    if penalised:
        both = model.heads["left"].bias.square().sum() + both + model.trunk[0].bias.square().sum()
    both.backward()
    second = {name: loss * 2 for name, loss in other.losses(1).items()}
    reference.backward(second)  # autograd runs what was built last first
    reference.backward(other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    for a, b in zip(gradients(model), gradients(other), strict=True):
        extra = 0
        if penalised and any(a is p.grad for p in (model.heads["left"].bias, model.trunk[0].bias)):
            extra = 2 * next(p for p in model.parameters() if p.grad is a).detach()
        assert torch.equal(a, b + extra)
    optimizer.step()
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("way", ["total", "backward"])
def test_plain_is_a_loss_that_takes_no_part(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for batch in range(2):  # with accumulation too
        losses = model.losses(batch)
        penalty = losses["left"] * 2.0 + model.trunk[0].weight.square().sum()  # shares the tasks' graph
        if way == "total":
            optimizer.total(losses, plain=penalty).backward()
        else:
            optimizer.backward(losses, plain=penalty)
        run_backward("backward", reference, other.losses(batch))
    foreign = [torch.zeros_like(p) for p in other.parameters()]
    for batch in range(2):
        penalty = other.losses(batch)["left"] * 2.0 + other.trunk[0].weight.square().sum()
        for f, g in zip(
            foreign, torch.autograd.grad(penalty, list(other.parameters()), allow_unused=True), strict=True
        ):
            f += 0 if g is None else g
    assert same(rows_of(optimizer), rows_of(reference))
    for a, b, f in zip(gradients(model), gradients(other), foreign, strict=True):
        torch.testing.assert_close(a, b + f, rtol=1e-6, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize(
    ("plain", "match"),
    [(torch.ones(3, requires_grad=True), "shape"), (0.5, "float"), (torch.tensor(1j, requires_grad=True), "complex")],
)
def test_plain_must_be_a_real_scalar_too(way, plain, match):
    model = build()
    optimizer = wrapped(model)
    with pytest.raises(ValueError, match=f"plain.*{match}"):
        getattr(optimizer, way)(model.losses(0), plain=plain)
    assert gradients(model) == [None] * len(gradients(model))


def test_plain_alone_trains():
    model = build()
    optimizer = wrapped(model)
    losses = {name: loss.detach() for name, loss in model.losses(0).items()}
    penalty = model.trunk[0].weight.square().sum()
    optimizer.total(losses, plain=penalty).backward()
    assert same(model.trunk[0].weight.grad, 2 * model.trunk[0].weight.detach())
    optimizer.zero_grad()
    penalty = model.trunk[0].weight.square().sum()
    optimizer.backward(losses, plain=penalty)
    assert same(model.trunk[0].weight.grad, 2 * model.trunk[0].weight.detach())
    optimizer.step()


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["total", "backward"])
def test_retain_graph_allows_a_second_run(way):
    model, other = twins()
    optimizer = wrapped(model)
    losses = model.losses(0)
    if way == "total":
        total = optimizer.total(losses)
        total.backward(retain_graph=True)
        total.backward()
    else:
        optimizer.backward(losses, retain_graph=True)
        optimizer.backward(losses)
    want = reference_rows(other.losses(0), trained(other))
    assert same(rows_of(optimizer), {n: [None if g is None else g + g for g in row] for n, row in want.items()})


def test_a_total_run_twice_without_retain_graph_is_refused():
    model = build()
    total = wrapped(model).total(model.losses(0))
    total.backward()
    want = [g.clone() for g in gradients(model)]
    with pytest.raises(MultiTaskError, match="second time"):
        total.backward()
    assert same(gradients(model), want)


def test_create_graph_is_refused():
    model = build()
    optimizer = wrapped(model)
    with pytest.raises(MultiTaskError, match="create_graph"):
        optimizer.total(model.losses(0)).backward(create_graph=True)
    assert gradients(model) == [None] * len(gradients(model))
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("how", ["never run", "inputs=", "autograd.grad"])
def test_a_total_that_did_not_run_warns(how, zeros):
    model = build()
    optimizer = wrapped(model)
    if zeros:
        run_backward("total", optimizer, model.losses(0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    total = optimizer.total(model.losses(0))
    if how == "inputs=":
        total.backward(inputs=trained(model))
    elif how == "autograd.grad":
        torch.autograd.grad(total, trained(model), allow_unused=True)
    with pytest.warns(UserWarning, match="never ran") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        optimizer.step()


def test_inputs_that_leave_the_total_out_of_a_sum_warn():
    model = build()
    optimizer = wrapped(model)
    penalty = model.trunk[0].weight.square().sum()
    (optimizer.total(model.losses(0)) + penalty).backward(inputs=[model.trunk[0].weight])
    with pytest.warns(UserWarning, match="never ran") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_the_graph_is_freed_after_the_run():
    model = build()
    optimizer = wrapped(model)
    losses = model.losses(0)
    total = optimizer.total(losses)
    total.backward()
    last = list(losses.values())[-1]
    with pytest.raises(RuntimeError, match="second time"):
        last.backward()


def test_the_callback_runs_at_the_end_of_the_backward_pass():
    seen = []

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            at_end_of_backward(lambda: seen.append("end"), lambda: seen.append("dead"))
            return g

    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda g: seen.append("leaf"))
    Early.apply(x).backward()
    assert seen == ["leaf", "end"]
