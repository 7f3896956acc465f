"""Failure is safe: a clear error, everything as it was, and the next step as if nothing had happened."""

import copy
import gc

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from tests.networks import Snapshot, build, equal_weights, run_backward, same, trained, twins

PASSES = ["total", "backward", "task"]


class Mine(Exception):  # noqa: N818
    """What the user's own code raises."""


class Broken(torch.autograd.Function):
    """A node whose backward pass raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Mine("in a backward pass")


def wrapped(model, cls=torch.optim.SGD, **options):
    keywords = {"lr": 0.05} if cls is not torch.optim.SGD else {"lr": 0.05, "momentum": 0.9}
    return gradsurg.wrap(cls(trained(model), **keywords), **options)


def rows_of(optimizer):
    rows = optimizer._gradsurg.capture.rows
    return {name: dict(enumerate(rows[name].values())) for name in rows}


def copy_rows(optimizer):
    return {name: {k: g.clone() for k, g in row.items()} for name, row in rows_of(optimizer).items()}


def good_step(optimizer, model, batch=5):
    optimizer.zero_grad()
    optimizer.total(model.losses(batch)).backward()
    optimizer.step()
    assert optimizer.report.movement is not None


def assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other):
    assert equal_weights(model, other)
    for batch in (5, 6):
        good_step(optimizer, model, batch)
        good_step(reference, other, batch)
        assert equal_weights(model, other)
    assert same(optimizer.state_dict(), reference.state_dict())


def prepare(way="total", steps=2, **options):
    """Two equal runs, some steps in, one about to fail."""
    model, other = twins()
    optimizer, reference = wrapped(model, **options), wrapped(other, **options)
    for batch in range(steps):
        for o, m in [(optimizer, model), (reference, other)]:
            o.zero_grad()
            run_backward(way, o, m.losses(batch))
            o.step()
    return model, optimizer, other, reference


# -- in a backward pass ---------------------------------------------------------------------------------------------


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


# -- in the step ----------------------------------------------------------------------------------------------------


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
    assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients


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


# -- losses that are none -------------------------------------------------------------------------------------------

ONE = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize(
    ("losses", "match"),
    [
        ({}, "no task"),
        ([], "no task"),
        ({"a": None, "b": None}, "no task"),
        ({"a": ONE, "b": torch.ones(3, requires_grad=True)}, r"losses\['b'\] has shape \(3,\)"),
        ({"a": ONE, "b": torch.ones(0, requires_grad=True)}, r"losses\['b'\] has shape \(0,\)"),
        ({"a": ONE, "b": torch.ones((), dtype=torch.complex64, requires_grad=True)}, r"losses\['b'\] is complex"),
        ({"a": ONE, "b": 0.3}, r"losses\['b'\] is a float"),
        ({1: ONE, "1": ONE}, "two tasks named '1'"),
        (ONE, "losses is a Tensor"),
        ((x for x in [ONE]), "losses is a generator"),
        ("ab", "losses is a str"),
        (None, "losses is a NoneType"),
    ],
)
def test_losses_that_are_none(way, losses, match):
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=match):
        getattr(optimizer, way)(losses)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


def test_backward_without_any_loss_that_requires_grad():
    optimizer = wrapped(build())
    with pytest.raises(ValueError, match="requires grad"):
        optimizer.backward({"a": torch.ones(())})


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}])
@pytest.mark.parametrize("how", ["total", "backward", "hidden"])
def test_a_total_is_no_task_of_its_own_optimizer(how, options):
    # It would write its own direction in the middle of the outer one's passes, and the outer tasks would be lost.
    model = build()
    optimizer = wrapped(model, **options)
    good_step(optimizer, model)  # with refresh_every=, the next step runs one backward pass alone
    optimizer.zero_grad()
    inner = optimizer.total(model.losses(0))
    losses = {**model.losses(1), "left": 2 * inner + 1 if how == "hidden" else inner}
    with pytest.raises(MultiTaskError, match="hand over the losses that it was made of"):
        optimizer.backward(losses) if how == "backward" else optimizer.total(losses).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.total(model.losses(1)).backward()
    optimizer.step()
    assert optimizer.report.step == 1
    optimizer.zero_grad()
    good_step(optimizer, model)


# -- wrong names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["total", "backward", "task", "set_gradients"])
def test_undeclared_names_are_refused_with_a_suggestion(way):
    model = build()
    optimizer = wrapped(model, tasks=["left", "right", "whole"])
    losses = model.losses(0)
    losses["lefd"] = losses.pop("left")
    with pytest.raises(ValueError, match=r"'lefd'.*Did you mean 'left'"):
        run_backward(way, optimizer, dict(sorted(losses.items())))
    assert all(p.grad is None for p in model.parameters())
    good_step(optimizer, model)


@pytest.mark.parametrize("way", ["total", "backward", "task", "set_gradients"])
def test_names_are_text_whatever_they_were(way):
    model = build()
    optimizer = wrapped(model)
    run_backward(way, optimizer, dict(enumerate(model.losses(0).values())))
    optimizer.step()
    assert optimizer.report.tasks == ("0", "1", "2")
    assert len(str(optimizer.report).splitlines()) >= 4
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="a task named None: name it by a string"):
        run_backward(way, optimizer, {None: model.losses(0)["left"]})
    assert all(p.grad is None for p in model.parameters())
    good_step(optimizer, model)


@pytest.mark.parametrize("options", [{"primary": "lefd"}, {"preferences": {"lefd": 2.0}}])
@pytest.mark.parametrize("way", ["total", "backward", "set_gradients"])
def test_a_misspelt_option_is_found_at_the_first_losses(options, way):
    model = build()
    optimizer = wrapped(model, **options)
    with pytest.raises(ValueError, match=r"names the task 'lefd'.*Did you mean 'left'"):
        run_backward(way, optimizer, model.losses(0))
    assert all(p.grad is None for p in model.parameters())


def test_a_misspelt_option_warns_with_task_blocks():
    # They name one task at a time, so a name that did not come yet may still come: no error, but not silence.
    model = build()
    optimizer = wrapped(model, primary="lefd")
    for batch in range(2):
        optimizer.zero_grad()
        run_backward("task", optimizer, model.losses(batch))
        if batch == 0:
            with pytest.warns(UserWarning, match="Did you mean 'left'") as caught:
                optimizer.step()
            assert caught[0].filename == __file__
        else:
            optimizer.step()


@pytest.mark.parametrize("inner", ["total", "backward", "task", "set_gradients", "step"])
def test_nothing_else_inside_a_task_block(inner):
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    calls = {
        "total": lambda: optimizer.total(model.losses(3)).backward(),
        "backward": lambda: optimizer.backward(model.losses(3)),
        "task": lambda: optimizer.task("right").__enter__(),
        "set_gradients": lambda: optimizer.set_gradients({"right": [None] * len(trained(model))}),
        "step": optimizer.step,
    }
    with pytest.raises(MultiTaskError, match=r"inside `with optimizer.task"), optimizer.task("left"):
        calls[inner]()
    assert all(p.grad is None for p in model.parameters())
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


# -- NaN and infinity -----------------------------------------------------------------------------------------------

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
