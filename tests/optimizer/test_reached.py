"""What the losses reach is looked at once: nothing at all, or a tensor whose numbers belong to one task each."""

import copy

import pytest
import torch
from torch import nn

import gradsurg
from tests.kernels.elsewhere import DEVICE, Elsewhere


def trunk_of(tasks=2):
    torch.manual_seed(0)
    return nn.Linear(4, 6), torch.randn(8, 4)


@pytest.mark.parametrize("way", ["total", "backward", "task", "closure"])
def test_no_loss_reaches_a_parameter(way):
    model, x = trunk_of()
    master = copy.deepcopy(model)
    optimizer = gradsurg.wrap(torch.optim.SGD(master.parameters(), lr=0.1))

    def give():
        y = model(x)
        losses = {"a": y[:, 0].sum(), "b": y.square().sum()}
        if way == "task":
            for name, loss in losses.items():
                with optimizer.task(name):
                    loss.backward(retain_graph=True)
        elif way == "backward":
            optimizer.backward(losses)
        else:
            optimizer.total(losses).backward()
        for p, q in zip(master.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        return sum(losses.values()).detach()

    def step():
        if way == "closure":
            optimizer.step(give)
        else:
            give()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"\['a', 'b'\] reach no parameter of this optimizer.*set_gradients") as caught:
        step()
    assert len(caught) == 1
    step()  # once


def test_the_way_out_works():
    model, x = trunk_of()
    master = copy.deepcopy(model)
    optimizer = gradsurg.wrap(torch.optim.SGD(master.parameters(), lr=0.1))
    y, parameters = model(x), list(model.parameters())
    losses = {"a": y[:, 0].sum(), "b": -y.sum()}
    rows = {n: torch.autograd.grad(v, parameters, retain_graph=True) for n, v in losses.items()}
    optimizer.set_gradients(rows)
    optimizer.step()
    moved = [q.detach() - p.detach() for p, q in zip(master.parameters(), model.parameters(), strict=True)]
    for row in rows.values():
        assert sum((d * g).sum() for d, g in zip(moved, row, strict=True)) >= -1e-5


def heads(kind):
    """Return a module that makes two outputs, the tensors that it warns of, and the outputs of h."""
    if kind == "one Linear":
        head = nn.Linear(6, 2)
        return head, ("1.weight", "1.bias"), lambda h: head(h).unbind(1)
    if kind == "log-variances":
        head = nn.ParameterList([nn.Parameter(torch.zeros(2))])
        return head, ("1.0",), lambda h: [h[:, i] * torch.exp(-head[0][i]) for i in range(2)]
    if kind == "one head each":
        head = nn.ModuleList([nn.Linear(6, 1) for _ in range(2)])
        return head, (), lambda h: [each(h)[:, 0] for each in head]
    if kind == "embedding":  # each batch happens to touch rows that differ
        head = nn.Embedding(100, 6)
        return head, (), lambda h: [(h * head(torch.tensor(8 * [i]))).sum(1) for i in range(2)]
    head = nn.Linear(6, 2)  # both tasks use both outputs
    return head, (), lambda h: [head(h).sum(1), head(h).square().sum(1)]


@pytest.mark.parametrize("kind", ["one Linear", "log-variances", "one head each", "embedding", "truly shared"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_tensor_with_one_part_per_task_is_named(kind, closure, recwarn):
    trunk, x = trunk_of()
    head, names, outputs = heads(kind)
    model = nn.Sequential(trunk, head)
    optimizer = gradsurg.wrap(torch.optim.SGD(list(model.named_parameters()), lr=0.01))

    def give():
        a, b = outputs(trunk(x).tanh())
        loss = optimizer.total({"a": (a - 1).square().mean(), "b": (b + 1).square().mean()})
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        if not closure:
            give()
        optimizer.step(*[give] * closure)
    assert len(recwarn) == bool(names)
    for warning in recwarn:
        assert f"same number of {', '.join(names)}, though" in str(warning.message)
        assert "shared=trunk" in str(warning.message)


def test_on_a_device_it_is_named_when_the_report_is_read(recwarn):
    """To look at once would wait for the device in every program."""
    with Elsewhere() as device:
        trunk, x = (each.to(DEVICE) for each in trunk_of())
        head, names, outputs = heads("one Linear")
        head.to(DEVICE)
        optimizer = gradsurg.wrap(torch.optim.SGD([*nn.Sequential(trunk, head).named_parameters()], lr=0.01))
        a, b = outputs(trunk(x).tanh())
        optimizer.total({"a": (a - 1).square().mean(), "b": (b + 1).square().mean()}).backward()
        optimizer.step()
        assert not recwarn.list
        before = device.reads
        assert optimizer.report is not None
        assert device.reads > before
        (warning,) = recwarn.list
        assert optimizer.report is not None
    assert f"same number of {', '.join(names)}, though" in str(warning.message)
    assert warning.filename == __file__
    assert len(recwarn) == 1


def test_declared_parameters_are_not_questioned():
    trunk, x = trunk_of()
    head, _, outputs = heads("one Linear")
    parameters = [*trunk.parameters(), *head.parameters()]
    optimizer = gradsurg.wrap(torch.optim.SGD(parameters, lr=0.01), shared=trunk)
    a, b = outputs(trunk(x).tanh())
    losses = {"a": (a - 1).square().mean(), "b": (b + 1).square().mean()}
    wanted = torch.autograd.grad(sum(losses.values()), head.weight, retain_graph=True)[0]
    optimizer.backward(losses)
    optimizer.step()
    torch.testing.assert_close(head.weight.grad, wanted)
