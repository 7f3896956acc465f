"""A failure behind the optimizer's own step: an update that was not projected is never left."""

import copy

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg.guarantee import constraint, metric, update

PLACES = {
    "before the projection": (constraint, "project_update", False),
    "behind the projection": (constraint, "project_update", True),
    "in the solver": (update, "nonnegative", False),
    "before the correction": (update, "correct_", False),
    "behind the correction": (update, "correct_", True),
    "in the metric of the step": (metric, "correct_", True),
    "at the end": (constraint, "joined", True),
}


def problem(rates, **options):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(6)) for _ in rates]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)]
    return parameters, gradsurg.wrap(torch.optim.Adam(groups), **options)


def backward(optimizer, parameters):
    a, b = torch.randn(2, sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(1))
    w = torch.cat(parameters)
    optimizer.zero_grad()
    optimizer.total({"a": (w - a).square().sum(), "b": 3 * (w + a - 0.1 * b).square().sum()}).backward()


def conflicting_step(rates, **options):
    """Train until a step is corrected; return a problem whose next step is that one."""
    for count in range(100):
        parameters, optimizer = problem(rates, **options)
        for _ in range(count):
            backward(optimizer, parameters)
            optimizer.step()
        backward(optimizer, parameters)
        optimizer.step()
        if optimizer.report.movement.corrected:
            break
    parameters, optimizer = problem(rates, **options)
    for _ in range(count):
        backward(optimizer, parameters)
        optimizer.step()
    backward(optimizer, parameters)
    return parameters, optimizer


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_all_of_the_update_is_put_back(place, error, atomic, monkeypatch):
    rates = (0.1, 0.03) if place == "in the metric of the step" else (0.1,)
    parameters, optimizer = conflicting_step(rates, atomic=atomic)
    module, name, behind = PLACES[place]
    real = getattr(module, name)

    def dying(*arguments, **options):
        if behind:
            real(*arguments, **options)
        raise error("lost")

    was = [p.detach().clone() for p in parameters]
    state = copy.deepcopy([optimizer.state[p] for p in parameters])
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(error, match="lost") as caught:
            optimizer.step()
    assert all(map(torch.equal, parameters, was))
    if hasattr(caught.value, "__notes__"):
        note = "all parameters and the optimizer's state are as before" if atomic else "the parameters are as before"
        assert note in caught.value.__notes__[0]
    if atomic:
        now = [optimizer.state[p] for p in parameters]
        assert all(torch.equal(a[key], b[key]) for a, b in zip(state, now, strict=True) for key in a)
    # The same step can be tried again, and keeps the promise.
    gradients = [p.grad.clone() for p in parameters]
    optimizer.step()
    assert all(map(torch.equal, gradients, [p.grad for p in parameters]))
    assert (optimizer.report.update_cosines >= -1e-4).all()
    assert not all(map(torch.equal, parameters, was))
