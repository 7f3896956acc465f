"""What is given as losses: lists, names, one tensor twice, and tasks that come and go."""

import pytest
import torch
from torch import nn

import gradsurg
from tests.gradients.ways import gradients, wrapped
from tests.networks import TASKS, build, rows_of, run_backward, same, trained, twins


def test_losses_as_a_list_get_numbers_or_the_declared_names():
    model = build()
    optimizer = wrapped(model)
    optimizer.total(list(model.losses(0).values())).backward()
    assert optimizer.report.tasks == ("0", "1", "2")
    declared = wrapped(build(), tasks=["x", "y", "z"])
    losses = tuple(model.losses(0).values())
    declared.total(losses).backward()
    assert declared.report.tasks == ("x", "y", "z")


def test_losses_of_shape_one_are_scalars():
    model, other = twins()
    wrapped(model).total({k: v.reshape(1) for k, v in model.losses(0).items()}).backward()
    wrapped(other).total(other.losses(0)).backward()
    assert same(gradients(model), gradients(other))


def test_one_tensor_as_two_tasks():
    model = build("all shared")
    optimizer = wrapped(model)
    loss = model.losses(0)["left"]
    optimizer.total({"a": loss, "b": loss}).backward()
    rows = rows_of(optimizer)
    assert same(rows["a"], rows["b"])


# -- absent tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["None", "missing", "no grad_fn", "unconnected"])
@pytest.mark.parametrize("way", ["total", "backward"])
def test_an_absent_task_takes_no_part(absent, way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses, want = model.losses(0), other.losses(0)
    if absent == "None":
        losses["right"] = None
    elif absent == "missing":
        del losses["right"]
    elif absent == "no grad_fn":
        losses["right"] = losses["right"].detach()
    else:  # a loss of something else: a task whose row is empty
        losses["right"] = nn.Parameter(torch.ones(())).square()
    del want["right"]
    run_backward(way, optimizer, losses)
    run_backward(way, reference, want)
    assert same(gradients(model), gradients(other))
    assert all(p.grad is None for p in model.heads["right"].parameters())
    optimizer.step()


def test_tasks_come_and_go():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    present = [{"left"}, {"left", "right"}, {"right"}, {"left", "right", "whole"}, {"whole", "left"}]
    for batch, names in enumerate(present):
        optimizer.zero_grad()
        losses = {name: loss for name, loss in model.losses(batch).items() if name in names}
        heads = {n: [p.detach().clone() for p in model.heads[n].parameters()] for n in model.heads}
        optimizer.total(losses).backward()
        optimizer.step()
        assert set(optimizer.report.tasks) == names
        for name in model.heads:
            assert same(heads[name], [p.detach() for p in model.heads[name].parameters()]) == (name not in names)
        if len(names) > 1:
            assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients


def test_tasks_of_micro_batches_may_differ():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for batch, name in enumerate(["left", "right", "left", "whole"]):
        optimizer.total({name: model.losses(batch)[name]}).backward()
    reference.backward(
        {
            "left": other.losses(0)["left"] + other.losses(2)["left"],
            "right": other.losses(1)["right"],
            "whole": other.losses(3)["whole"],
        }
    )
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("kind", ["list", "values", "generator", "stacked"])
@pytest.mark.parametrize("way", ["total", "backward"])
def test_losses_without_names(kind, way):
    """Heads get their own plain gradient also if one tensor holds all losses."""
    model, other = twins()
    losses = model.losses(0)
    given = {
        "list": lambda: list(losses.values()),
        "values": losses.values,
        "generator": lambda: (loss for loss in losses.values()),
        "stacked": lambda: torch.stack(list(losses.values())),
    }[kind]()
    a, b = (gradsurg.wrap(torch.optim.SGD(trained(m), lr=0.1)) for m in (model, other))
    if way == "total":
        a.total(given).backward()
    else:
        a.backward(given)
    b.backward(other.losses(0))
    for p, q in zip(trained(model), trained(other), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    for name, loss in other.losses(0).items():
        (plain,) = torch.autograd.grad(loss, other.heads[name].bias)
        assert torch.equal(model.heads[name].bias.grad, plain)


def rows(tensor):
    return dict(zip(TASKS, tensor, strict=True))


STACKS = {
    "iterated": lambda losses: rows(torch.stack(losses)),
    "by number": lambda losses: {name: torch.stack(losses)[i] for i, name in enumerate(TASKS)},
    "weighted": lambda losses: rows(torch.tensor([1.0, 2.0, 3.0]) * torch.stack(losses)),
    "weighted in place": lambda losses: rows(torch.stack(losses).mul_(torch.tensor([1.0, 2.0, 3.0]))),
    "cat": lambda losses: rows(torch.cat([loss[None] for loss in losses])),
    "split": lambda losses: rows(torch.stack(losses).split(1)),
    "scaled later": lambda losses: {name: 2 * loss for name, loss in rows(torch.stack(losses)).items()},
}


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("way", ["total", "backward"])
def test_parts_of_a_stack_are_the_losses_that_it_was_made_of(kind, way):
    """Autograd gives each task zeros for the heads of all others: they are not shared for that."""
    model, other = twins()
    optimizer, apart = (gradsurg.wrap(torch.optim.Adam(trained(m), lr=0.01)) for m in (model, other))
    weights = {"weighted": (1, 2, 3), "weighted in place": (1, 2, 3), "scaled later": (2, 2, 2)}.get(kind, (1, 1, 1))
    for batch in range(4):
        given = STACKS[kind](list(model.losses(batch).values()))
        expected = {name: w * loss for w, (name, loss) in zip(weights, other.losses(batch).items(), strict=True)}
        plain = {n: torch.autograd.grad(expected[n], other.heads[n].bias, retain_graph=True)[0] for n in TASKS}
        for o, losses in ((optimizer, given), (apart, expected)):
            o.zero_grad()
            o.total(losses).backward() if way == "total" else o.backward(losses)
        for name in TASKS:
            torch.testing.assert_close(model.heads[name].bias.grad, plain[name])
        for p, q in zip(trained(model), trained(other), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for o in (optimizer, apart):
            o.step()


def test_a_stack_inside_the_model_makes_no_parts():
    model = build("all shared")
    (x, y), w = torch.randn(2, 6, 5), torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([*trained(model), w], lr=0.1), batched=True)
    errors = torch.stack([model.body(x)[:, k] - w[k] * y[:, k] for k in range(3)]).square().mean(1)
    optimizer.total(list(errors.unbind())).backward()  # with batched=, parts of a stack would be refused


@pytest.mark.parametrize("options", [{"refresh_every": 2}, {"batched": True}])
@pytest.mark.parametrize("given", [torch.stack, lambda losses: rows(torch.stack(losses))], ids=["tensor", "parts"])
def test_one_tensor_of_losses_where_heads_cannot_be_told_apart(given, options):
    model = twins()[0]
    optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.1), **options)
    with pytest.raises(ValueError, match="cannot tell whose head is whose"):
        optimizer.total(given(list(model.losses(0).values())))
