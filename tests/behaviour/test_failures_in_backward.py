"""An error in a backward pass: everything as it was, and the next step as if nothing had happened."""

import gc

import pytest

from tests.behaviour.failures import (
    PASSES,
    Broken,
    Mine,
    assert_next_step_is_that_of_one_that_never_failed,
    copy_rows,
    prepare,
    rows_of,
)
from tests.networks import Snapshot, run_backward, same


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("which", ["left", "right", "whole"])
@pytest.mark.parametrize("before", ["nothing", "foreign", "rows"])
def test_an_exception_inside_a_task(way, which, before):
    model, optimizer, other, reference = prepare(way)
    optimizer.zero_grad()
    if before == "foreign":
        sum(p.square().sum() for p in model.parameters()).backward()
    elif before == "rows":
        optimizer.total(model.losses(2)).backward()
    losses = model.losses(3)
    losses[which] = Broken.apply(losses[which])
    if way == "task":  # the tasks before it are done and stay; only the block that raises is undone
        losses = {which: losses[which]}
    was, rows, held = Snapshot.of(model), copy_rows(optimizer), [p.grad for p in model.parameters()]
    with pytest.raises(Mine):
        run_backward(way, optimizer, losses)
    assert same(Snapshot.of(model), was)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    assert same(rows_of(optimizer), rows)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


def test_accumulation_goes_on_after_a_failed_micro_batch():
    model, optimizer, other, reference = prepare()
    for o, m in [(optimizer, model), (reference, other)]:
        o.zero_grad()
        o.total(m.losses(2)).backward()
        if o is optimizer:
            losses = m.losses(3)
            losses["whole"] = Broken.apply(losses["whole"])
            with pytest.raises(Mine):
                o.total(losses).backward()
        o.total(m.losses(4)).backward()
        o.step()
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("order", ["total first", "penalty first"])
@pytest.mark.parametrize("then", ["nothing", "optimizer.zero_grad", "model.zero_grad"])
def test_an_exception_beside_the_total(order, then):
    # The penalty's backward pass dies after the tasks' rows were taken: autograd never comes back to us.
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    penalty = Broken.apply(model.trunk[0].weight.square().sum())
    total = optimizer.total(model.losses(3))
    with pytest.raises(Mine):
        (total + penalty if order == "total first" else penalty + total).backward()
    assert all(p.grad is None for p in model.parameters())
    assert rows_of(optimizer) == {}
    if then != "nothing":
        (optimizer if "optimizer" in then else model).zero_grad()
    reference.zero_grad()
    # A plain step right after it must not lose its gradient to a late clean-up.
    for o, m in [(optimizer, model), (reference, other)]:
        sum(m.losses(4).values()).backward()
        gc.collect()
        o.step()
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


def test_an_exception_beside_the_total_gives_back_what_was_there():
    model, optimizer, _, _ = prepare()
    optimizer.zero_grad()
    optimizer.total(model.losses(2)).backward()
    was, rows = Snapshot.of(model), copy_rows(optimizer)
    doomed = Broken.apply(model.trunk[0].weight.square().sum())
    with pytest.raises(Mine):
        (doomed + optimizer.total(model.losses(3))).backward()
    assert same(Snapshot.of(model), was)
    assert same(rows_of(optimizer), rows)


@pytest.mark.parametrize("way", ["total", "backward"])
def test_an_exception_in_plain(way):
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    was = Snapshot.of(model)
    broken = Broken.apply(model.trunk[0].weight.square().sum())
    with pytest.raises(Mine):
        run_backward(way, optimizer, model.losses(3), plain=broken)
    assert same(Snapshot.of(model), was)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("way", PASSES)
def test_a_hook_that_raises(way):
    model, optimizer, other, reference = prepare(way)
    optimizer.zero_grad()

    def raises(_):
        raise Mine

    handle = model.trunk[0].weight.register_hook(raises)
    with pytest.raises(Mine):
        run_backward(way, optimizer, model.losses(3))
    handle.remove()
    assert all(p.grad is None for p in model.parameters())
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("error", [Mine, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before backward", "after backward"])
@pytest.mark.parametrize("declared", [None, ["left", "right", "whole"]])
def test_an_exception_in_the_body_of_a_task(error, when, declared):
    model, optimizer, other, reference = prepare("task", tasks=declared)
    optimizer.zero_grad()
    was = Snapshot.of(model)

    def body():
        if when == "after backward":
            model.losses(3)["left"].backward()
        raise error

    with pytest.raises(error), optimizer.task("left"):
        body()
    assert same(Snapshot.of(model), was)
    assert rows_of(optimizer) == {}
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("way", PASSES)
def test_an_exception_while_rows_are_added_up(way, monkeypatch):
    # As when memory runs out.
    model, optimizer, other, reference = prepare(way)
    optimizer.zero_grad()
    optimizer.total(model.losses(2)).backward()
    was = Snapshot.of(model)
    losses = model.losses(3)
    with monkeypatch.context() as broken:
        broken.setattr("gradsurg.gradients.rows.TaskRows.merge", raises)
        with pytest.raises(Mine):
            run_backward(way, optimizer, losses)
    assert same(Snapshot.of(model), was)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


def raises(*_):
    raise Mine
