"""Runs a random program and judges every step of it, by torch.autograd.grad and by the bare optimizer."""

from __future__ import annotations

import copy
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurg
from tests.behaviour.failures import Mine
from tests.behaviour.fragile import WATCHERS
from tests.behaviour.programs import Program, Spec, build, wrapped
from tests.behaviour.users import User, added, reference, rounding, values, wide
from tests.networks import same

OURS = os.path.dirname(gradsurg.__file__) + os.sep
HERE = os.path.dirname(__file__) + os.sep
Rows = dict[str, list[Tensor | None]]


def run(program: Program, kind: type[Judge] | None = None) -> None:
    """Run a program; an AssertionError says what is wrong with a step."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            judge = (kind or Judge)(program)
        except ValueError as error:
            check_helpful(error)
            return
        for action, spec in program.actions:
            getattr(judge, action)(dict(spec))
    for warning in said:
        text = f"{warning.filename}: {warning.message}"
        assert warning.filename.startswith(HERE), f"a warning that is not at the user's line: {text}"
        assert warning.category is UserWarning, text


class Judge(User):
    """A user whose every call and step is checked, and beside whom a twin may do the next step.

    `rows` are the gradients that came in since p.grad was last cleared, by task, or None where the user did something
    after which it is not defined which of them count. `seen` is p.grad at the optimizer's own step, None without one.
    """

    # Whether no other rank takes part.
    alone = True

    def __init__(self, program: Program) -> None:
        super().__init__(*build(program))
        self.program, self.reuses, self.way, self.added = program, "refresh_every" in program.options, "", False
        self.rows: Rows | None = {}
        self.seen: list[Tensor | None] | None = None
        self.twin: User | None = None

    # -- what a program does ------------------------------------------------------------------------------------------

    def train(self, step: Spec) -> None:
        """Do a step; what raises leaves everything as it was, and the next step is a fresh twin's."""
        if step.get("clear") == "no":
            self.twin = None
        if self.twin is not None:
            step = {**step, "clear": "to none"}
        before, twin, self.twin = self.copied(), self.twin, None
        try:
            self.judged(step, before)
        except (Mine, ValueError, TypeError, gradsurg.MultiTaskError) as error:
            if not isinstance(error, Mine):
                check_helpful(error)
            if not isinstance(error, Mine) or "change" in step or step.get("scale", 1.0) > 1:
                self.rows = None
            self.take_as_twin(before)
            return
        if twin is not None:
            twin.turn(step)
            check_same([*self.net.parameters()], [*twin.net.parameters()], "parameters are not the twin's")
            check_same(self.standing()[2], twin.standing()[2], "the optimizer's state is not the twin's")

    def fail(self, step: Spec) -> None:
        """Do a step in which something of the user's raises."""
        where = step["where"]
        if where == "argument":
            self.wrong_arguments()
        hook = None
        if where == "hook" and self.net.mix.weight.requires_grad:
            hook = self.net.mix.weight.register_hook(fail_in_hook)
        if where == "pre hook":
            hook = self.optimizer.register_step_pre_hook(fail_in_hook)
        self.train(step)
        if hook is not None:
            hook.remove()

    def nan(self, step: Spec) -> None:
        """Do a step with a loss that is not finite."""
        if step.get("gather") == "all":  # a scaler would not see it
            step.pop("gather")
        self.train({**step, "nan": True, "way": not_closure(step)})

    def skip(self, step: Spec) -> None:
        """Bring gradients in and do not step."""
        before = self.copied()
        try:
            self.turn({**step, "way": not_closure(step)}, stepping=False)
        except (ValueError, TypeError, gradsurg.MultiTaskError) as error:
            check_helpful(error)
            self.rows = None
        # What features= and reused weights bring has no rows.
        if "change" in step or step.get("scale", 1.0) > 1 or step.get("way") == "features" or self.reuses:
            self.rows = None
        self.take_as_twin(before)

    def take_as_twin(self, before: User) -> None:
        """Let a copy from before do the next step too; the names of tasks are learnt by what fails, too."""
        before.optimizer._gradsurg.checkpoint.learn(self.optimizer._gradsurg.checkpoint.tasks)
        self.twin = before

    def freeze(self, spec: Spec) -> None:
        """Freeze a parameter, or have it trained again."""
        for user in filter(None, (self, self.twin)):
            p = user.parameters[spec["number"] % len(user.parameters)]
            p.requires_grad_(not p.requires_grad)
            if spec.get("clear"):
                p.grad = None
        self.rows = None

    def rate(self, spec: Spec) -> None:
        """Change a learning rate, as a scheduler does."""
        for user in filter(None, (self, self.twin)):
            user.optimizer.param_groups[0]["lr"] *= spec.get("factor", 1.0)

    def reload(self, spec: Spec) -> None:
        """Go on with a copy, made in one of several ways; the next step of the old one is the same."""
        old = User(self.net, self.optimizer)
        if spec.get("how") == "deepcopy":
            self.net, self.optimizer = copy.deepcopy((self.net, self.optimizer))
        else:
            state = copy.deepcopy(self.optimizer.state_dict())
            self.net, self.optimizer = build(self.program, seed=1)
            self.net.load_state_dict(old.net.state_dict())
            for p, q in zip(old.net.parameters(), self.net.parameters(), strict=True):
                q.requires_grad_(p.requires_grad)
            if spec.get("how") == "bare":
                bare = gradsurg.unwrap(self.optimizer)
                bare.load_state_dict(state)
                self.optimizer = wrapped(self.net, bare, self.program.options)
                state = copy.deepcopy(self.optimizer.state_dict())
            self.optimizer.load_state_dict(state)
        # What waits is not part of a state dict, and before a closure is called, it is finished or refused.
        self.rows, self.twin = {}, None if old.optimizer._gradsurg.step.pending else old

    def wrong_arguments(self) -> None:
        """Call the library in ways that it has to refuse."""
        o, z = self.optimizer, self.net.features(0)
        loss = self.net.loss("a", z, 0)
        calls: list[Callable[[], Any]] = [
            lambda: o.total({}),
            lambda: o.total({"a": 1.0}),
            lambda: o.total({"a": z}),
            lambda: o.total({"a": loss}, preferences={"nobody": 1.0}),
            lambda: o.total({"a": loss}, features=z.detach()),
            lambda: o.backward({"a": None}),
            lambda: o.set_gradients({"a": [torch.zeros(1)] * 99}),
        ]
        for call in calls:
            with pytest.raises((ValueError, TypeError, gradsurg.MultiTaskError)) as raised:
                self.call(call)
            check_helpful(raised.value)

    # -- watching -----------------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], Any], *, steps: bool = False, closure: bool = False) -> Any:
        """Call the library, and check that nothing changes that may not."""
        before, failed = self.standing(), True
        # A step begins with the surgery that waits, and so does a total with features=.
        surgery = closure or (self.optimizer._gradsurg.step.pending and (steps or self.way == "features"))
        try:
            value = function()
            failed = False
        finally:
            after = self.standing()
            if failed or not steps:
                what = "a call that failed" if failed else "a call outside of step()"
                check_same(after[0], before[0], f"{what} moved parameters")
                check_same(after[2], before[2], f"{what} changed the optimizer's state")
            # A penalty beside a total that fails may have run backward, as beside any other loss.
            if failed and not surgery and not self.added:
                check_same(after[1], before[1], "a call that failed changed p.grad")
        return value

    def clear(self, step: Spec) -> None:
        """Clear p.grad, and the rows with it."""
        super().clear(step)
        self.way, self.added = step.get("way"), step.get("added", False)
        if step.get("clear") != "no":
            self.rows = {}

    def brought(self, step: Spec, batch: int, last: bool, names: list[str]) -> None:
        """Add the gradients of some tasks to the rows; nonfinite="skip_task" leaves out those that are not finite."""
        losses = self.losses(step, batch, last)[1]
        if step.get("nan") and self.reuses:
            self.rows = None  # of some micro-batches there are rows, and of others a weighted sum
        for name in names if self.rows is not None else ():
            if not losses[name].requires_grad:
                continue
            new = self.mean(reference(losses[name], self.parameters, step.get("scale", 1.0)))
            numbers = [losses[name], *(values(g) for g in new if g is not None)]
            finite = all(bool(torch.isfinite(each).all()) for each in numbers)
            if finite or self.program.options.get("nonfinite") != "skip_task":
                old = self.rows.get(name, [None] * len(new))
                self.rows[name] = [
                    a if b is None else b if a is None else added(a, b) for a, b in zip(old, new, strict=True)
                ]

    def mean(self, row: list[Tensor | None]) -> list[Tensor | None]:
        """Return the mean of a row over all ranks."""
        return row

    def ready(self, step: Spec) -> None:
        """Compare p.grad with that of a plain backward pass: where it is, its shape, strides and dtype, and heads'."""
        pending = self.optimizer._gradsurg.step.pending
        if step.get("clear") in ("no", "zeros") or step.get("nan") or pending or not self.rows:
            return
        plain = self.copied()
        plain.optimizer.zero_grad()
        for k in range(step.get("micro", 1)):
            losses = plain.losses(step, step["batch"] + k, False)[1]
            total = sum(losses.values()) * step.get("scale", 1.0)
            if step.get("plain") and step.get("way") in ("total", "backward", "features"):
                total = total + plain.penalty() * step.get("scale", 1.0)
            if step.get("added") and step.get("way", "total") in ("total", "features", "two totals"):
                total = total + plain.penalty() * step.get("scale", 1.0)
            if total.requires_grad:
                total.backward()
        options = self.program.options
        all_there = len(self.rows) == len(losses) and "rotate" not in options
        all_there = all_there and not ("shared" in options and step.get("way") == "set_gradients")
        reached = self.holders(self.rows)
        for i, (p, q) in enumerate(zip(self.parameters, plain.parameters, strict=True)):
            if p.grad is None or q.grad is None:
                assert (p.grad is None) == (q.grad is None) or not all_there, f"p.grad of parameter {i} comes or goes"
                continue
            for what in ("shape", "dtype", "layout"):
                mine, its = getattr(p.grad, what), getattr(q.grad, what)
                assert mine == its, f"the {what} of p.grad of parameter {i} is {mine} and not {its}"
            if p.grad.is_sparse:
                continue
            mine, its = p.grad.stride(), q.grad.stride()
            assert mine == its, f"the strides of p.grad of parameter {i} are {mine} and not {its}"
            if self.alone and all_there and "shared" not in options and reached[i] == 1 < len(self.rows):
                near = torch.allclose(wide(p.grad), wide(q.grad), rtol=rounding([p]), atol=rounding([p]) * 10)
                assert near, f"a head's p.grad (parameter {i}) is not the plain gradient"

    # -- judging ------------------------------------------------------------------------------------------------------

    def judged(self, step: Spec, before: User) -> None:
        """Do a step and judge the movement; `before` becomes the bare optimizer, which does the same step."""
        old = [p.detach().clone() for p in self.parameters]
        self.seen = None
        WATCHERS.append(self.see)
        try:
            self.turn(step)
        finally:
            WATCHERS.remove(self.see)
        rows, self.rows = self.rows, {}
        if self.seen is None:  # a gradient scaler left the step out
            return
        bare = gradsurg.unwrap(before.optimizer)
        for p, g in zip(before.parameters, self.seen, strict=True):
            p.grad = g
        bare.step()
        its = User(before.net, before.optimizer).standing()[2]
        check_same(self.standing()[2], its, "the optimizer's state is not that of the bare optimizer")
        averages = "rotate" in self.program.options and self.optimizer.report is not None
        if rows is None or (averages and {*rows} != {*self.optimizer.report.tasks}):
            return  # moving averages may stand for a task whose gradient is not finite
        new, plain = [p.detach() for p in self.parameters], [p.detach() for p in before.parameters]
        constrained = self.constrained(rows, step)
        for i in set(range(len(new))) - {i for partition in constrained for i in partition}:
            check_same(new[i], plain[i], f"parameter {i}, which is not shared, is not where the bare optimizer puts it")
        if step.get("change") == "masked copy":
            return
        for partition in constrained:
            self.judge_partition(partition, rows, old, new, plain)
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        for i, (p, g) in enumerate(zip(self.parameters, self.seen, strict=True)):
            if g is not None and not g.is_sparse:
                left = (plain[i] == old[i]) & ((g == 0) | (rates[id(p)] == 0))
                assert torch.equal(new[i][left], old[i][left]), (
                    f"numbers of parameter {i} that were left in place moved"
                )

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradients that the inner optimizer steps with."""
        self.seen = self.gradients_now()

    def holders(self, rows: Rows) -> list[int]:
        """Return how many tasks reached each parameter."""
        return [sum(row[i] is not None for row in rows.values()) for i in range(len(self.parameters))]

    def constrained(self, rows: Rows, step: Spec) -> list[list[int]]:
        """Return the parameters whose movement the guarantee covers, in partitions."""
        options, report = self.program.options, self.optimizer.report
        by_rows = report is not None and report.level in ("gradients", "moving averages")
        if options.get("guarantee", "update") != "update" or not by_rows or len(rows) < 2:
            return []
        trunk = set(map(id, self.net.trunk())) if "shared" in options else None
        shared = [
            i
            for i, (p, count) in enumerate(zip(self.parameters, self.holders(rows), strict=True))
            if p.requires_grad and (count > 1 if trunk is None else count and id(p) in trunk)
        ]
        if options.get("granularity") == "tensor":
            return [[i] for i in shared]
        if options.get("granularity") == "group":
            groups = [set(map(id, group["params"])) for group in self.optimizer.param_groups]
            return [[i for i in shared if id(self.parameters[i]) in group] for group in groups]
        return [shared]

    def judge_partition(
        self, partition: list[int], rows: Rows, old: list[Tensor], new: list[Tensor], plain: list[Tensor]
    ) -> None:
        """Check that the movement conflicts with no protected task, and is the bare optimizer's if that does not."""
        if not all(bool(torch.isfinite(plain[i]).all()) for i in partition):
            return  # as Adam's in float16, where eps is 0
        options = self.program.options
        protected = [*rows]
        if "rotate" in options:
            fresh = self.optimizer.report.fresh
            protected = [name for name in rows if fresh is None or name in fresh]
        if options.get("auxiliary") == "help" and "primary" in options:
            levels = [["a"], ["b"], ["c", "d"]] if options["primary"] != "a" else [["a"], ["b", "c", "d"]]
            present = [[name for name in level if name in rows] for level in levels]
            protected = [name for name in protected if name in next(filter(None, present))]
        sixteen = any(old[i].element_size() <= 2 for i in partition) or "row_dtype" in options
        moved, meant = (self.cosines(partition, rows, protected, old, at) for at in (new, plain))
        for name, cosine in moved.items():
            assert cosine >= (-1e-2 if sixteen else -1e-4), f"the update hurts {name!r}: cosine {cosine:.2g}"
        if all(cosine > 1e-2 for cosine in meant.values()) and "margin" not in options and len(protected) == len(rows):
            for i in partition:
                check_same(new[i], plain[i], "a step that conflicts with no task is not the bare optimizer's")

    def cosines(
        self, partition: list[int], rows: Rows, protected: list[str], old: list[Tensor], new: list[Tensor]
    ) -> dict[str, float]:
        """Return the cosine between the movement and each task's gradient; 0 where either is 0."""
        signs = {id(p): -1.0 if g.get("maximize") else 1.0 for g in self.optimizer.param_groups for p in g["params"]}
        d = torch.cat([signs[id(self.parameters[i])] * (wide(old[i]) - wide(new[i])) for i in partition or [0]])
        found = {}
        for name in protected if partition else ():
            row = [rows[name][i] for i in partition]
            g = torch.cat(
                [torch.zeros_like(wide(old[i])) if x is None else wide(x) for i, x in zip(partition, row, strict=True)]
            )
            length = float(d.norm() * g.norm())
            found[name] = float(d @ g) / length if length > 0 else 0.0
        return found


def check_same(mine: object, its: object, what: str) -> None:
    """Raise an AssertionError that says what is not equal to the bit."""
    assert same(detached(mine), detached(its)), what


def detached(found: Any) -> Any:
    return (
        [t.detach() for t in found] if isinstance(found, list) and all(isinstance(t, Tensor) for t in found) else found
    )


def check_helpful(error: Exception) -> None:
    """Check that an error was raised by a line of the library, and says something."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(OURS), f"{type(error).__name__} from {last.filename}:{last.lineno}: {error}"
    assert len(str(error)) > 30, f"an error of few words: {error}"


def fail_in_hook(*_: object) -> None:
    raise Mine("in a hook")


def not_closure(step: Spec) -> str:
    way = step.get("way", "total")
    return "total" if way == "closure" else way
