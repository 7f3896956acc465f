"""Every optimizer that torch ships: the guarantee holds, and one task is the plain optimizer to the bit."""

import inspect

import pytest
import torch

import gradsurg
from tests.networks import equal_weights, same, trained, twins
from tests.optimizer.every_optimizer import DENSE, ROWS, SPECIAL, make, models, one_task, several, states, train


def test_every_optimizer_of_torch_has_a_row():
    shipped = {name for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and name != "Optimizer"}
    assert shipped == {row[0] for row in [*DENSE, *SPECIAL]} & set(dir(torch.optim))


# -- item 1: one line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
def test_snippet_runs_and_no_update_hurts_a_task(name, options, kind):
    model, _ = models(kind)
    optimizer = gradsurg.wrap(make(name, options, model))
    shared = list(model.trunk.parameters()) if kind != "sparse" else trained(model)
    up = -1.0 if options.get("maximize") else 1.0
    for batch in range(4):
        gradients = [
            [g.to_dense() for g in torch.autograd.grad(loss, shared, retain_graph=True)]
            for loss in model.losses(batch).values()
        ]
        before = [p.detach().clone() for p in shared]
        train(optimizer, model, several, [batch])
        moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, shared, strict=True)]).double() * up
        assert moved.isfinite().all()
        assert moved.any(), "a step that does not move anything would pass every check below"
        for row in gradients if name != "LBFGS" else ():  # its step belongs to many gradients; wrap() warns
            g = torch.cat([g.flatten() for g in row]).double()
            # float32 parameters: a step of 1e-3 of their size is stored to 1e-4 of itself.
            assert torch.dot(moved, g) >= -1e-4 * moved.norm() * g.norm()
    assert optimizer.report.tasks == tuple(model.losses(0))


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
@pytest.mark.parametrize("guarantee", ["update", "none"])
def test_one_task_is_the_plain_optimizer_to_the_bit(name, options, kind, guarantee):
    model, plain_model = models(kind)
    optimizer = gradsurg.wrap(make(name, options, model), guarantee=guarantee)
    plain = make(name, options, plain_model)
    for batch in range(5):
        train(optimizer, model, one_task, [batch], clip=None if kind == "sparse" else 0.5)
        train(plain, plain_model, one_task, [batch], clip=None if kind == "sparse" else 0.5)
        assert equal_weights(model, plain_model)
        assert same([p.grad for p in trained(model)], [p.grad for p in trained(plain_model)])
    assert same(states(optimizer), states(plain))


@pytest.mark.parametrize("guarantee", ["update", "gradient", "none"])
@pytest.mark.parametrize("kind", ["heads", "tied", "complex", "dtypes", "patchy", "scalar"])
def test_one_task_to_the_bit_in_every_kind_of_model(kind, guarantee):
    model, plain_model = twins(kind)
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), guarantee=guarantee)
    plain = torch.optim.Adam(trained(plain_model), lr=0.01)
    train(optimizer, model, one_task, range(4))
    train(plain, plain_model, one_task, range(4))
    assert equal_weights(model, plain_model)
    assert same(states(optimizer), states(plain))


@pytest.mark.parametrize("zero", ["optimizer none", "optimizer zeros", "model none", "model zeros", "by hand"])
def test_one_task_to_the_bit_however_gradients_are_cleared(zero):
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    for batch in range(4):
        for m, o in [(model, optimizer), (plain_model, plain)]:
            if zero == "by hand":
                for p in m.parameters():
                    p.grad = None
            else:
                (o if "optimizer" in zero else m).zero_grad(set_to_none="none" in zero)
            loss = one_task(m, batch)
            (o.total(loss) if o is optimizer else loss["all"]).backward()
            o.step()
    assert equal_weights(model, plain_model)


def test_without_zero_grad_gradients_pile_up_as_they_do_in_torch():
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.01)
    for batch in range(4):
        optimizer.total(one_task(model, batch)).backward()
        one_task(plain_model, batch)["all"].backward()
        optimizer.step()
        plain.step()
    assert equal_weights(model, plain_model)
