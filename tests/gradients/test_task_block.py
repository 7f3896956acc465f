"""with optimizer.task(name): when surgery runs, and what a block without a backward pass is."""

import pytest
import torch

import gradsurg
from tests.gradients.ways import gradients, wrapped
from tests.networks import equal_weights, reference_rows, rows_of, same, trained, twins


def test_several_backward_calls_in_one_task_add_up():
    model, other = twins()
    optimizer = wrapped(model)
    losses = model.losses(0)
    with optimizer.task("a"):
        losses["left"].backward(retain_graph=True)
        losses["right"].backward(retain_graph=True)
    with optimizer.task("b"):
        losses["whole"].backward()
    rows = reference_rows(other.losses(0), list(other.trunk.parameters()))
    trunk = slice(0, len(rows["left"]))
    assert same(rows_of(optimizer)["a"][trunk], [x + y for x, y in zip(rows["left"], rows["right"], strict=True)])


def test_surgery_is_redone_at_each_exit_of_an_undeclared_task():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses, want = model.losses(0), other.losses(0)
    given = {}
    for name in losses:
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
        given[name] = want[name]
        reference.zero_grad()
        reference.backward(given, retain_graph=True)
        assert same(gradients(model), gradients(other))


def test_declared_tasks_operate_once_at_the_last_exit(monkeypatch):
    model, other = twins()
    optimizer, reference = wrapped(model, tasks=["left", "right", "whole"]), wrapped(other)
    runs = []
    write = optimizer._gradsurg.capture.write
    monkeypatch.setattr(
        optimizer._gradsurg.capture, "write", lambda result, again=None: (runs.append(len(result)), write(result))
    )
    losses = model.losses(0)
    for name in ("whole", "left"):
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
    assert optimizer.report is None
    with optimizer.task("right"):
        losses["right"].backward()
    assert runs[-1] == len(trained(model))
    reference.backward({name: other.losses(0)[name] for name in ("whole", "left", "right")})
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # float32; autograd sums the trunk in another order
    optimizer.step()


def test_declared_tasks_that_did_not_all_come_operate_at_step():
    model, other = twins()
    optimizer, reference = wrapped(model, tasks=["left", "right", "whole"]), wrapped(other)
    for o, m in [(optimizer, model), (reference, other)]:
        losses = m.losses(0)
        for name in ("left", "right"):
            with o.task(name):
                losses[name].backward(retain_graph=True)
        o.step()
    assert equal_weights(model, other)
    for o, m in [(optimizer, model), (reference, other)]:  # and the next step starts afresh
        o.zero_grad()
        losses = m.losses(1)
        for name in ("left", "right", "whole"):
            with o.task(name):
                losses[name].backward(retain_graph=True)
        o.step()
    assert equal_weights(model, other)


def test_a_task_block_without_a_backward_is_an_absent_task():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for o, m in [(optimizer, model), (reference, other)]:
        losses = m.losses(0)
        if o is optimizer:
            with o.task("right"):
                pass
        with o.task("left"):
            losses["left"].backward()
        o.step()
    assert equal_weights(model, other)


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's own, of the cycle that create_graph=True makes
def test_create_graph_inside_a_block_is_refused():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(gradsurg.MultiTaskError, match="create_graph=True"), optimizer.task("a"):
        w.square().sum().backward(create_graph=True)
    assert w.grad is None
    with optimizer.task("a"):  # a penalty on gradients takes them from torch.autograd.grad
        (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        g.square().sum().backward()
    assert torch.allclose(w.grad, 36 * w.detach() ** 3)
