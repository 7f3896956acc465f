"""Micro batches, gradient scalers, and surgery that waits for the last micro batch."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from tests.gradients.ways import PASSES, WAYS, clear, gradients, wrapped
from tests.networks import Heads, build, equal_weights, reference_rows, rows_of, run_backward, same, trained, twins


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1 / 3, 1024.0])
def test_scaled_totals_scale_the_rows(way, scale):
    model, other = twins()
    optimizer = wrapped(model)
    run_backward(way, optimizer, model.losses(0), scale)
    assert same(rows_of(optimizer), reference_rows(other.losses(0), trained(other), scale))


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_trains_as_without_it(way, fused, unscale):
    # Powers of two: scaling and unscaling are exact as long as nothing underflows, so equality is to the bit.
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused), surgery="sum")
    plain = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, fused=fused), surgery="sum")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for batch in range(5):
        for o, m in [(optimizer, model), (plain, other)]:
            o.zero_grad()
            if o is plain:
                o.total(m.losses(batch)).backward()
                if unscale:
                    nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                o.step()
                continue
            if way == "total":
                scaler.scale(o.total(m.losses(batch))).backward()
            else:
                run_backward(way, o, {k: scaler.scale(v) for k, v in m.losses(batch).items()})
            if unscale:
                scaler.unscale_(o)
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(o)
            scaler.update()
        assert optimizer.report.movement is not None
        # The weights of the rows are computed from norms that are 1024 times as long: same to float64 rounding.
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 4096.0


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_grad_scaler_skips_an_overflow_and_the_next_step_is_good(way, fused, where):
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused))
    reference = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in range(3):
        optimizer.zero_grad()
        losses = model.losses(batch)
        if batch == 1:
            bad = (model.trunk[0].weight if where == "trunk" else model.heads["right"].weight).sum()
            losses["right"] = losses["right"] + bad * float("inf")
        if way == "total":
            scaler.scale(optimizer.total(losses)).backward()
        else:
            run_backward(way, optimizer, {k: scaler.scale(v) for k, v in losses.items()})
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if batch == 1:
            assert same(before, [p.detach() for p in model.parameters()])
            assert scaler.get_scale() == 512.0
        else:
            reference.zero_grad()
            run_backward("total", reference, other.losses(batch))
            reference.step()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32, scaled norms


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_equals_one_big_batch(way, deferred, k):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for i in range(k):
        if deferred and i < k - 1:
            with optimizer.accumulate():
                run_backward(way, optimizer, model.losses(i), 1 / k)
            assert optimizer._gradsurg.step.pending
        else:
            run_backward(way, optimizer, model.losses(i), 1 / k)
    batches = [other.losses(i) for i in range(k)]
    run_backward("backward", reference, {name: sum(b[name] for b in batches) / k for name in batches[0]})
    for a, b in zip(gradients(model), gradients(other), strict=True):
        # The same sums of k float32 gradients in another order: a few last places of the largest entries.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    optimizer.step()
    assert optimizer.report.movement is not None


def test_accumulation_works_on_the_sum_of_rows_to_the_bit():
    model, other = twins()
    optimizer = wrapped(model)
    want = {}
    for batch in range(3):
        run_backward("total", optimizer, model.losses(batch))
        for name, row in reference_rows(other.losses(batch), trained(other)).items():
            have = want.get(name)
            want[name] = (
                row
                if have is None
                else [a if b is None else b if a is None else a + b for a, b in zip(have, row, strict=True)]
            )
        assert same(rows_of(optimizer), want)


def test_step_ends_the_rows():
    model = build()
    optimizer = wrapped(model)
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()
    assert rows_of(optimizer) == {}


def test_surgery_waits_for_step_if_all_of_it_was_deferred():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
        run_backward("total", optimizer, model.losses(1))
    for batch in range(2):
        run_backward("total", reference, other.losses(batch))
    optimizer.step()
    reference.step()
    assert equal_weights(model, other)
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("zero", ["optimizer none", "optimizer zeros", "model none", "model zeros"])
@pytest.mark.parametrize("before", ["nothing", "zeros", "foreign"])
def test_zeroing_while_surgery_waits_drops_the_rows(zero, before):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    if before != "nothing":
        sum(p.square().sum() for p in model.parameters()).backward()
    if before == "zeros":
        model.zero_grad(set_to_none=False)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    clear(zero, model, optimizer)
    run_backward("total", optimizer, model.losses(1))
    run_backward("total", reference, other.losses(1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(other), strict=True))


def test_a_step_after_zeroing_while_surgery_waits_is_a_step_without_gradient():
    model, plain_model = twins()
    optimizer, plain = wrapped(model, torch.optim.Adam), torch.optim.Adam(plain_model.parameters(), lr=0.1)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    model.zero_grad()
    optimizer.step()
    plain.step()
    assert equal_weights(model, plain_model)


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("which", ["trunk", "head", "all"])
def test_a_plain_backward_while_surgery_waits_loses_nothing(way, which):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)

    def extra(m):
        part = {"trunk": m.trunk, "head": m.heads["whole"], "all": m}[which]
        return sum(p.square().sum() for p in part.parameters())

    with optimizer.accumulate():
        run_backward(way, optimizer, model.losses(0))
    extra(model).backward()
    run_backward(way, optimizer, model.losses(1))
    for batch in range(2):
        run_backward("total", reference, other.losses(batch))
    extra(other).backward()
    assert rows_of(optimizer).keys() == model.losses(0).keys()
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # float32: one addition in another order


def test_parameters_without_elements_are_no_obstacle():
    model = Heads()
    model.empty = nn.Parameter(torch.ones(0))
    optimizer = wrapped(model)
    with optimizer.accumulate():
        optimizer.total({n: loss + model.empty.sum() for n, loss in model.losses(0).items()}).backward()
    optimizer.step()
    assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients


@pytest.mark.parametrize("before", ["nothing", "zeros", "foreign"])
@pytest.mark.parametrize("change", ["clip", "clip with others", "unscale", "fused scaler"])
def test_changing_p_grad_while_surgery_waits_is_refused(change, before):
    # Surgery at step() would overwrite what clipping did; that must not pass silently.
    model = build()
    optimizer = wrapped(model)
    if before != "nothing":
        sum(p.square().sum() for p in model.parameters()).backward()
    if before == "zeros":
        model.zero_grad(set_to_none=False)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    if "clip" in change:
        if "others" in change:
            model.trunk[0].bias.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif change == "unscale":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
    else:  # it unscales nothing: it hands its scale to the optimizer
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(MultiTaskError, match="waiting"):
        optimizer.step()
    assert same(before, [p.detach() for p in model.parameters()])
    vars(optimizer).pop("grad_scale", None)
    vars(optimizer).pop("found_inf", None)
    optimizer.zero_grad()
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()


def test_zeros_and_a_penalty_while_surgery_waits_are_not_taken_for_a_penalty():
    w, v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, v], lr=0.1))

    def backward():
        optimizer.total({"a": w.sum() + v.sum(), "b": w.square().sum() - v.sum()}).backward()

    with optimizer.accumulate():
        backward()
    for p in (w, v):  # as model.zero_grad(set_to_none=False) does
        p.grad.zero_()
    (w.square().sum() + v.square().sum()).backward()
    with pytest.raises(MultiTaskError, match="written to twice"):
        backward()
    optimizer.zero_grad()
    backward()
    optimizer.step()


CHANGES = {
    "none of one": lambda p: setattr(p, "grad", None),
    "zeros in one": lambda p: p.grad.zero_(),
    "a mask": lambda p: p.grad.mul_(torch.arange(p.numel()).reshape(p.shape) % 2),
    "rows": lambda p: p.grad[:1].zero_(),
    "a masked copy": lambda p: setattr(p, "grad", p.grad * (torch.arange(p.numel()).reshape(p.shape) % 2)),
    "a smaller copy": lambda p: setattr(p, "grad", 0.5 * p.grad),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("waits", ["accumulate", "declared"])
@pytest.mark.parametrize("then", ["step", "total", "task"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_change_of_one_p_grad_while_surgery_waits_drops_no_task(change, waits, then, which):
    w, v, big = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(9))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, v, big], lr=0.1), tasks=["a", "b"])

    def loss(sign):
        return (w * torch.tensor([1.0, 2.0, 3.0, sign])).sum() + sign * v.sum() + big.sum()

    if waits == "accumulate":
        with optimizer.accumulate():
            optimizer.total({"a": loss(1.0), "b": loss(-1.0)}).backward()
    else:
        with optimizer.task("a"):
            loss(1.0).backward()
    CHANGES[change]((w, v)[which])

    def go_on():
        if then == "step":
            optimizer.step()
        elif then == "total":
            optimizer.total({"a": loss(1.0), "b": loss(-1.0)}).backward()
        else:
            with optimizer.task("b"):
                loss(-1.0).backward()

    with pytest.raises(MultiTaskError, match="in part while surgery was waiting"):
        go_on()
    assert w.tolist() == [1.0] * 4
    optimizer.zero_grad()
    optimizer.total({"a": loss(1.0), "b": loss(-1.0)}).backward()
    optimizer.step()
    # Opposed gradients of one length on v, and equal ones on the first numbers of w and on big.
    assert torch.equal(v.detach(), torch.ones(3))
    assert (w[:3] < 1).all()
    assert (big < 1).all()


def test_a_declared_task_that_never_came_is_named_when_clipping_met_waiting_surgery():
    model = build()
    optimizer = wrapped(model, tasks=["left", "right", "whole"])
    losses = model.losses(0)
    for name in ("left", "right"):
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(MultiTaskError, match="whole"):
        optimizer.step()
