"""nonfinite=: NaN and infinity are passed on, refused, or left out with their task."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from tests.behaviour.failures import (
    PASSES,
    assert_next_step_is_that_of_one_that_never_failed,
    copy_rows,
    good_step,
    prepare,
    rows_of,
    wrapped,
)
from tests.networks import Snapshot, build, equal_weights, run_backward, same, twins

BAD = [float("nan"), float("inf"), float("-inf")]


def spoilt(model, batch, name, value, where="trunk"):
    losses = model.losses(batch)
    weight = model.trunk[0].weight if where == "trunk" else model.heads[name].weight
    losses[name] = losses[name] + weight.sum() * value
    return losses


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("value", BAD)
def test_nonfinite_propagate_writes_it_where_a_scaler_sees_it(way, value):
    model = build()
    optimizer = wrapped(model)
    run_backward(way, optimizer, spoilt(model, 0, "right", value))
    assert not model.trunk[0].weight.grad.isfinite().any()
    assert model.trunk[2].weight.grad.isfinite().all()
    assert optimizer.report.nonfinite == ("right",)


@pytest.mark.parametrize("way", [*PASSES, "set_gradients"])
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("before", ["nothing", "foreign", "rows", "waiting rows"])
@pytest.mark.parametrize("value", BAD[:2])
def test_nonfinite_raise_leaves_everything_as_it_was(way, where, before, value):
    model, optimizer, other, reference = prepare(nonfinite="raise")
    optimizer.zero_grad()
    if before == "foreign":
        sum(p.square().sum() for p in model.parameters()).backward()
    elif before == "rows":
        optimizer.total(model.losses(2)).backward()
    elif before == "waiting rows":
        with optimizer.accumulate():
            optimizer.total(model.losses(2)).backward()
    was, rows = Snapshot.of(model), copy_rows(optimizer)
    losses = spoilt(model, 3, "right", value, where)
    with pytest.raises(MultiTaskError, match=r"'right'.*not finite"):
        # task() settles each block by itself, so only the block that raises is to be undone.
        run_backward(way, optimizer, {"right": losses["right"]} if way == "task" else losses)
    assert same(Snapshot.of(model), was)
    assert same(rows_of(optimizer), rows)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("value", BAD)
def test_nonfinite_skip_task_is_a_step_without_it(way, where, value):
    model, other = twins()
    optimizer, reference = wrapped(model, nonfinite="skip_task"), wrapped(other)
    for batch in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        losses = model.losses(batch) if batch != 1 else spoilt(model, batch, "right", value, where)
        run_backward(way, optimizer, losses)
        want = other.losses(batch)
        if batch == 1:
            del want["right"]
        run_backward(way, reference, want)
        optimizer.step()
        reference.step()
        assert equal_weights(model, other)
        assert optimizer.report.nonfinite == (("right",) if batch == 1 else ())
    memory = optimizer.state_dict()["param_groups"][0]["gradsurg"]
    assert memory["skipped"] == {"right": 1}


def test_nonfinite_skip_task_keeps_its_good_micro_batches():
    model, other = twins()
    optimizer, reference = wrapped(model, nonfinite="skip_task"), wrapped(other)
    optimizer.total(model.losses(0)).backward()
    optimizer.total(spoilt(model, 1, "right", float("nan"))).backward()
    optimizer.total(model.losses(2)).backward()
    reference.total(other.losses(0)).backward()
    want = other.losses(1)
    del want["right"]
    reference.total(want).backward()
    reference.total(other.losses(2)).backward()
    optimizer.step()
    reference.step()
    assert equal_weights(model, other)


def test_nonfinite_skip_task_of_all_of_them_does_nothing():
    model = build()
    optimizer = wrapped(model, nonfinite="skip_task")
    losses = {n: loss + model.trunk[0].weight.sum() * float("nan") for n, loss in model.losses(0).items()}
    was = Snapshot.of(model)
    optimizer.total(losses).backward()
    assert same(Snapshot.of(model), was)
    optimizer.step()
    assert same(Snapshot.of(model), was)
    good_step(optimizer, model)


@pytest.mark.parametrize("policy", ["propagate", "skip_task", "raise"])
@pytest.mark.parametrize("way", PASSES)
def test_policies_do_not_change_finite_steps(policy, way):
    model, other = twins()
    optimizer, reference = wrapped(model, nonfinite=policy), wrapped(other)
    for batch in range(2):
        for o, m in [(optimizer, model), (reference, other)]:
            o.zero_grad()
            run_backward(way, o, m.losses(batch))
            o.step()
    assert equal_weights(model, other)


def test_gradients_that_are_large_but_finite_are_no_failure():
    # Their squares leave float32's range; they do not.
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1e-30), nonfinite="raise")
    a, b = torch.tensor([1e25, 0.0, 1e25]), torch.tensor([-2e25, 1e25, 0.0])
    optimizer.total({"a": (a * w).sum(), "b": (b * w).sum()}).backward()
    assert w.grad.isfinite().all()
    assert torch.dot(w.grad.double(), a.double()) >= -1e-4 * w.grad.double().norm() * a.double().norm()
    assert torch.dot(w.grad.double(), b.double()) >= -1e-4 * w.grad.double().norm() * b.double().norm()
