"""A wrapped optimizer stays an optimizer: schedulers, weight averaging, groups, closures."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradsurg
from tests.networks import build, data, equal_weights, same, twins
from tests.optimizer.every_optimizer import one_task, several, states, train

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("when", ["before", "after", "before, unwrapped"])
def test_schedulers_built_before_and_after(scheduler, when):
    model, plain_model = twins()
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if when == "after":
        gradsurg.wrap(optimizer)
    schedule, plain_schedule = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
    if when != "after":
        gradsurg.wrap(optimizer)
    if "unwrapped" in when:
        gradsurg.unwrap(optimizer)
    lrs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", "step() has been overridden"
        for batch in range(6):
            for s, o, m in [(schedule, optimizer, model), (plain_schedule, plain, plain_model)]:
                train(o, m, one_task, [batch])
                s.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            lrs.append((optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"]))
    assert all(a == b for a, b in lrs)
    assert len({a for a, _ in lrs}) > 1
    assert equal_weights(model, plain_model)
    if "unwrapped" not in when:
        train(optimizer, model, several, [0])
        assert optimizer.report.movement is not None, "the scheduler's patch went past our step"


def test_a_scheduler_still_warns_of_the_wrong_order():
    optimizer = gradsurg.wrap(torch.optim.SGD(build().parameters(), lr=0.1))
    schedule = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        schedule.step()


def test_average_of_weights_and_swa():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    for batch in range(3):
        train(optimizer, model, several, [batch])
        averaged.update_parameters(model)
        schedule.step()
    assert not equal_weights(model, averaged.module)


def test_add_param_group():
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.trunk.parameters(), lr=0.1))
    plain = torch.optim.SGD(plain_model.trunk.parameters(), lr=0.1)
    for o, m in [(optimizer, model), (plain, plain_model)]:
        o.add_param_group({"params": m.heads.parameters(), "lr": 0.3})
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)


def test_parameters_replaced_inside_the_groups():
    # Trainers do it (fully_shard); nothing of ours may hold on to the old ones.
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    train(optimizer, model, several, [0])
    for layer in model.trunk:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = model.trunk[0].weight.detach().clone()
    train(optimizer, model, several, [1])
    assert not torch.equal(before, model.trunk[0].weight)
    assert optimizer.report.movement is not None


def test_step_without_any_gradient_is_a_step_of_the_plain_optimizer():
    # Distributed checkpoints call step() on zero gradients, with a learning rate of 0, to make the state.
    model, plain_model = twins()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.0) for m in (model, plain_model))
    gradsurg.wrap(optimizer)
    for o in (optimizer, plain):
        o.step()
        for group in o.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        assert o.step(closure=None) is None
    assert equal_weights(model, plain_model)
    assert same(states(optimizer), states(plain))


def test_step_returns_what_the_closure_returns():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        total = optimizer.total(model.losses(0))
        total.backward()
        return total

    want = sum(model.losses(0).values()).item()
    assert optimizer.step(closure).item() == pytest.approx(want, rel=1e-6)


def test_agreeing_tasks_of_equal_norm_get_the_gradient_of_the_sum():
    # A regression whose tasks are turned copies of each other: equal norms, positive inner products.
    w = nn.Parameter(data(0, 6).double())
    gradients = torch.eye(6, dtype=torch.float64)[:3] + 0.2
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    optimizer.total([g @ w for g in gradients]).backward()
    torch.testing.assert_close(w.grad, gradients.sum(0), rtol=1e-12, atol=0)  # float64; scaled by norms and back
