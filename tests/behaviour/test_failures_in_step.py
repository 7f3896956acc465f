"""An error in the step: everything as it was, and the next step as if nothing had happened."""

import copy

import pytest
import torch

import gradsurg
from tests.behaviour.failures import (
    PASSES,
    Broken,
    Mine,
    assert_next_step_is_that_of_one_that_never_failed,
    copy_rows,
    good_step,
    prepare,
    rows_of,
    wrapped,
)
from tests.networks import Snapshot, build, equal_weights, run_backward, same, trained, twins


class Fragile(torch.optim.SGD):
    """An SGD whose step raises: before anything, or with half of the parameters moved."""

    fail: str | None = None

    def step(self, closure=None):
        if self.fail == "at once":
            raise Mine("in the inner step")
        if self.fail == "half way":
            with torch.no_grad():
                for p in self.param_groups[0]["params"][::2]:
                    p.add_(1.0)
            raise Mine("in the inner step")
        return super().step(closure)


@pytest.mark.parametrize("fail", ["at once", "half way"])
@pytest.mark.parametrize("way", PASSES)
def test_an_exception_inside_the_inner_step(fail, way):
    model, other = twins()
    optimizer, reference = wrapped(model, Fragile), wrapped(other, Fragile)
    for o, m in [(optimizer, model), (reference, other)]:
        for batch in range(2):
            o.zero_grad()
            run_backward(way, o, m.losses(batch))
            o.step()
        o.zero_grad()
        run_backward(way, o, m.losses(2))
    was, rows = Snapshot.of(model), copy_rows(optimizer)
    optimizer.fail = fail
    with pytest.raises(Mine):
        optimizer.step()
    assert same(Snapshot.of(model), was)
    assert same(rows_of(optimizer), rows)
    optimizer.fail = None
    for o in (optimizer, reference):  # trying the same step again works, under the same promise
        o.step()
        assert (o.report.update_cosines >= -1e-4).all()  # float32 gradients
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("guarantee", ["gradient", "none"])
def test_without_the_update_guarantee_a_step_that_fails_at_once_changes_nothing(guarantee):
    model = build()
    optimizer = wrapped(model, Fragile, guarantee=guarantee)
    optimizer.total(model.losses(0)).backward()
    was, rows = Snapshot.of(model), copy_rows(optimizer)
    optimizer.fail = "at once"
    with pytest.raises(Mine):
        optimizer.step()
    assert same(Snapshot.of(model), was)
    assert same(rows_of(optimizer), rows)


class Half(torch.optim.Adam):
    """An Adam that steps its first group, state and all, and then raises."""

    fail = False

    def step(self, closure=None):
        if not self.fail:
            return super().step(closure)
        groups, self.param_groups = self.param_groups, self.param_groups[:1]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        raise Mine("between two groups")


@pytest.mark.parametrize("guarantee", ["update", "gradient", "none"])
@pytest.mark.parametrize("steps", [0, 2], ids=["before there is state", "with state"])
def test_an_atomic_step_that_fails_half_way_leaves_parameters_and_state(guarantee, steps):
    def prepared(model):
        half = len(trained(model)) // 2
        groups = [{"params": part} for part in (trained(model)[:half], trained(model)[half:])]
        optimizer = gradsurg.wrap(Half(groups, lr=0.05), guarantee=guarantee, atomic=True)
        for batch in range(steps):
            good_step(optimizer, model, batch) if guarantee == "update" else plain_step(optimizer, model, batch)
        optimizer.zero_grad()
        optimizer.total(model.losses(2)).backward()
        return optimizer

    model, other = twins()
    optimizer, reference = prepared(model), prepared(other)
    was, rows, state = Snapshot.of(model), copy_rows(optimizer), copy.deepcopy(optimizer.state_dict())
    optimizer.fail = True
    with pytest.raises(Mine):
        optimizer.step()
    assert same(Snapshot.of(model), was)
    assert same(rows_of(optimizer), rows)
    assert same(optimizer.state_dict(), state)
    optimizer.fail = False
    for o in (optimizer, reference):
        o.step()
    assert equal_weights(model, other)
    assert same(optimizer.state_dict(), reference.state_dict())


def plain_step(optimizer, model, batch):
    optimizer.zero_grad()
    optimizer.total(model.losses(batch)).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:a step of LBFGS evaluates")
def test_an_atomic_lbfgs_keeps_its_history():
    model, other = twins()
    optimizers = [gradsurg.wrap(torch.optim.LBFGS(trained(m), lr=0.5, max_iter=3), atomic=True) for m in (model, other)]
    failing = []

    def closure(optimizer, m):
        optimizer.zero_grad()
        total = optimizer.total(m.losses(0))
        total.backward()
        if failing and failing.pop() == "now":
            raise Mine
        return total

    for optimizer, m in zip(optimizers, (model, other), strict=True):
        optimizer.step(lambda o=optimizer, m=m: closure(o, m))
    failing += ["now", "later"]
    with pytest.raises(Mine):
        optimizers[0].step(lambda: closure(optimizers[0], model))
    assert equal_weights(model, other)
    for optimizer, m in zip(optimizers, (model, other), strict=True):
        optimizer.step(lambda o=optimizer, m=m: closure(o, m))
    assert equal_weights(model, other)


def test_the_wrong_optimizer_for_the_gradients():
    # SparseAdam refuses dense gradients in its step.
    model = build("scalar")
    optimizer = gradsurg.wrap(torch.optim.SparseAdam(trained(model), lr=0.1))
    optimizer.total(model.losses(0)).backward()
    was = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="does not support dense"):
        optimizer.step()
    assert same(Snapshot.of(model), was)


@pytest.mark.parametrize("when", ["before", "in backward", "after"])
def test_an_exception_in_a_closure(when):
    model, optimizer, other, reference = prepare()

    def closure():
        optimizer.zero_grad()
        if when == "before":
            raise Mine
        losses = model.losses(3)
        if when == "in backward":
            losses["whole"] = Broken.apply(losses["whole"])
        optimizer.total(losses).backward()
        raise Mine

    with pytest.raises(Mine):
        optimizer.step(closure)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.filterwarnings("ignore:a step of LBFGS evaluates")
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_an_exception_in_an_evaluation_of_lbfgs(evaluation):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.LBFGS(trained(model), lr=0.5, max_iter=5))
    calls = []

    def closure(batch=0):
        optimizer.zero_grad()
        total = optimizer.total(model.losses(batch))
        total.backward()
        calls.append(1)
        if len(calls) == evaluation:
            raise Mine
        return total

    was = Snapshot.of(model).parameters
    with pytest.raises(Mine):
        optimizer.step(closure)
    assert same(Snapshot.of(model).parameters, was)
    optimizer.step(closure)
    assert not same(Snapshot.of(model).parameters, was)
    assert optimizer.report.update_cosines is None  # the guarantee does not cover many evaluations


def test_a_hook_around_the_step_that_raises():
    model, optimizer, other, reference = prepare()
    for o, m in [(optimizer, model), (reference, other)]:
        o.zero_grad()
        o.total(m.losses(2)).backward()

    def raises(*_):
        raise Mine

    handle = optimizer.register_step_pre_hook(raises)
    was = Snapshot.of(model)
    with pytest.raises(Mine):
        optimizer.step()
    handle.remove()
    assert same(Snapshot.of(model), was)
    optimizer.step()
    reference.step()
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


@pytest.mark.parametrize("before", ["nothing", "foreign"])
@pytest.mark.parametrize("way", [*PASSES, "set_gradients"])
def test_a_surgery_that_raises(before, way):
    from gradsurg.surgery import Cone

    class Fails(Cone):
        broken = True

        def weights(self, problem, state):
            if Fails.broken:
                raise Mine("in a surgery of one's own")
            return super().weights(problem, state)

    model, other = twins()
    optimizer, reference = wrapped(model, surgery=Fails()), wrapped(other)
    if before == "foreign":
        sum(p.square().sum() for p in model.parameters()).backward()
    losses = model.losses(0)
    if way == "task":  # alone, the first has nobody to operate on
        run_backward(way, optimizer, {"left": losses.pop("left").clone()})
        losses = model.losses(0)
        del losses["left"]
    was = Snapshot.of(model)
    with pytest.raises(Mine):
        run_backward(way, optimizer, losses)
    if way != "task":  # there the first task's gradient was written, and is what p.grad goes back to
        assert rows_of(optimizer) == {}
    assert same(Snapshot.of(model), was)
    Fails.broken = False
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)
