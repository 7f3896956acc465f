"""What others put into p.grad is never lost: plain backward passes, clipping, zeroing by any route."""

import pytest
import torch
from torch import nn

from tests.gradients.ways import WAYS, clear, gradients, wrapped
from tests.networks import build, equal_weights, rows_of, run_backward, same, twins

ZEROS = ["optimizer none", "optimizer zeros", "model none", "model zeros", "by hand none", "by hand zeros", "replaced"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", ZEROS)
def test_zeroing_by_any_route_starts_afresh(way, route):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    clear(route, model, optimizer)
    run_backward(way, optimizer, model.losses(1))
    run_backward(way, reference, other.losses(1))
    assert same(rows_of(optimizer), rows_of(reference))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(other), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_backward_before_is_kept_and_added(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    penalty = sum(p.square().sum() for p in model.parameters())
    penalty.backward()
    foreign = [g.clone() for g in gradients(model)]
    run_backward(way, optimizer, model.losses(0))
    run_backward(way, reference, other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    assert same(gradients(model), [u + f for u, f in zip(gradients(other), foreign, strict=True)])
    run_backward(way, optimizer, model.losses(1))  # and is counted once, however often surgery is redone
    run_backward(way, reference, other.losses(1))
    assert same(gradients(model), [u + f for u, f in zip(gradients(other), foreign, strict=True)])


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_backward_after_is_added(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    run_backward(way, reference, other.losses(0))
    sum(p.square().sum() for p in model.parameters()).backward()
    assert same(gradients(model), [u + 2 * p for u, p in zip(gradients(other), other.parameters(), strict=True)])
    optimizer.step()
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("way", WAYS)
def test_clipping_between_micro_batches_counts(way):
    # As in torch: what was clipped is added to, not undone.
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    clipped = [g.clone() for g in gradients(model)]
    run_backward(way, optimizer, model.losses(1))
    run_backward(way, reference, other.losses(1))
    assert same(gradients(model), [u + c for u, c in zip(gradients(other), clipped, strict=True)])


def test_clipping_before_the_step_keeps_the_guarantee():
    model = build("all shared")
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    corrected = 0
    for batch in range(10):
        optimizer.zero_grad()
        run_backward("total", optimizer, model.losses(batch))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients
        corrected += optimizer.report.movement.corrected
    assert corrected


def test_a_plain_step_between_is_not_judged_by_old_rows():
    model, plain_model = twins()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.05)
    run_backward("total", optimizer, model.losses(0))  # a step that something else called off
    for m in (model, plain_model):
        m.zero_grad()
        sum(m.losses(1).values()).backward()
    plain.step()
    with pytest.warns(UserWarning, match=r"p\.grad was replaced .* optimizer\.zero_grad\(\)") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert equal_weights(model, plain_model)
    run_backward("total", optimizer, model.losses(2))
    optimizer.zero_grad()  # the optimizer's own says that the losses are dropped
    sum(model.losses(3).values()).backward()
    optimizer.step()


def test_gradients_that_are_replaced_are_said_to_go_unjudged():
    model = build()
    optimizer = wrapped(model, lr=0.05)
    run_backward("total", optimizer, model.losses(0))
    for p in model.parameters():
        p.grad = -p.grad
    with pytest.warns(UserWarning, match="replaced"):
        optimizer.step()
    assert optimizer.report.movement is None
    run_backward("total", optimizer, model.losses(1))
    for p in model.parameters():
        p.grad.mul_(0.5)
    optimizer.step()
    assert optimizer.report.movement is not None


def test_a_wrapped_optimizer_that_is_given_no_losses_says_so_once():
    model, plain_model = twins()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.05)

    def train():
        for batch in range(3):
            for m, o in [(model, optimizer), (plain_model, plain)]:
                o.zero_grad()
                sum(m.losses(batch).values()).backward()
                o.step()

    with pytest.warns(UserWarning, match=r"no task's loss yet.*optimizer\.total\(losses\)") as caught:
        train()
    assert [each.filename for each in caught] == [__file__]
    assert equal_weights(model, plain_model)
    for batch in range(2):  # a plain step between is nobody's mistake once there are tasks
        optimizer.zero_grad()
        sum(model.losses(batch).values()).backward() if batch else run_backward("total", optimizer, model.losses(batch))
        optimizer.step()
