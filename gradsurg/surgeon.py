"""The state of one wrapped optimizer (or several that share their rows), and the flow of a step through it.

Everything mutable lives in one Surgeon that is mutated and never rebound: Lightning copies an optimizer's __dict__, and
both copies must go on seeing the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.capture import Capture
from gradsurg.errors import MultiTaskError, unknown_name
from gradsurg.gramian import combine, gramian
from gradsurg.guarantee import Movement, guard
from gradsurg.pipeline import (
    CANCELLATION_GRAMIAN,
    CANCELLATION_SUM,
    ROUNDING_EXACT,
    ROUNDING_QUICK,
    Direction,
    Pipeline,
)
from gradsurg.priority import check_names
from gradsurg.problem import Problem
from gradsurg.report import Report

__all__ = ["Settings", "Surgeon"]

MEMORY = "gradsurg"  # the key in param_groups[0] under which what must be saved lives


@dataclass(frozen=True)
class Settings:
    """The options of wrap(), checked."""

    pipeline: Pipeline
    guarantee: str = "update"
    preferences: Mapping[str, float] = field(default_factory=dict)
    granularity: str = "model"
    tasks: tuple[str, ...] | None = None
    shared: tuple[Tensor, ...] | None = None
    row_dtype: torch.dtype | None = None
    nonfinite: str = "propagate"
    seed: int = 0


@dataclass
class Judgement:
    """The rows that the next update is judged by: one entry per block of shared parameters."""

    blocks: list[list[Tensor]]
    gramians: Tensor
    allowed: Tensor | None


class Surgeon:
    """Takes rows, writes p.grad, guards the update."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.optimizers: list[Optimizer] = []
        self.capture = Capture(self.parameters, settings.row_dtype)
        self.report: Report | None = None
        self.deferring = 0  # depth of accumulate()
        self.in_task = False
        self.pending = False  # rows that no surgery has seen yet
        self.entered: set[str] = set()  # of the declared tasks, those that left task() since the last surgery
        self.unrun = 0  # totals built since the last step whose backward never came
        self.seen: set[str] = set(settings.tasks or ())
        self.losses: dict[str, Tensor] = {}
        self.judgement: Judgement | None = None
        self.stepped: set[int] = set()
        self._next_state: Mapping[str, Any] | None = None

    # -- what the optimizers hold -------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Return what the optimizers train; never cached, because trainers replace it inside param_groups."""
        return [p for optimizer in self.optimizers for p in _trained(optimizer)]

    @property
    def memory(self) -> dict[str, Any]:
        """What must survive a checkpoint; a missing or foreign entry (a bare checkpoint) starts afresh."""
        group = self.optimizers[0].param_groups[0]
        if not isinstance(group.get(MEMORY), dict):
            group[MEMORY] = {"version": 1, "step": 0, "state": {}, "skipped": {}}
        return group[MEMORY]  # type: ignore[no-any-return]

    # -- gradients come in --------------------------------------------------------------------------------------

    def run(
        self,
        losses: Mapping[str, Tensor | None],
        plain: Tensor | None = None,
        gradient: Tensor | None = None,
        retain_graph: bool = False,
        finish: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Run the tasks' backward passes into fresh rows, then surgery; on any error p.grad is as before."""
        self._refuse_nesting()
        self._refuse_silent_ranks()
        self.introduce(losses)
        present = {name: loss for name, loss in losses.items() if loss is not None and loss.requires_grad}
        passes: list[tuple[str | None, Tensor]] = [*present.items()]
        if plain is not None and plain.requires_grad:
            passes.append((None, plain))
        self.capture.open()
        try:
            for i, (name, loss) in enumerate(passes):
                keep = retain_graph or i < len(passes) - 1
                torch.autograd.backward(loss, _like(gradient, loss), retain_graph=keep)
                if name is None:
                    self.capture.take_plain()
                else:
                    self.capture.take(name)
        except BaseException:
            self.capture.abort()
            raise
        self.losses = {name: loss.detach().reshape(()) for name, loss in losses.items() if loss is not None}
        self.unrun = 0
        (finish or _now)(self.finish)

    def finish(self) -> None:
        """Commit the fresh rows and operate, unless accumulation defers that."""
        self.capture.commit()
        self.settle(defer=self.deferring > 0)

    def settle(self, defer: bool) -> None:
        """Operate on the rows now, or leave them for later."""
        self.pending = True
        if defer:
            self.capture.write_pending()
        else:
            self.operate()

    def introduce(self, names: Mapping[str, Any]) -> None:
        """Check names against what was declared or seen; a typo in `primary` must not pass silently."""
        self.seen |= set(names)
        check_names(self.settings.pipeline.levels, self.seen)
        check_names((tuple(self.settings.preferences),), self.seen, "preferences")

    @contextmanager
    def entering(self, name: str) -> Iterator[None]:
        """Send what happens to p.grad inside this block to one task's row."""
        self._refuse_nesting()
        self._refuse_silent_ranks()
        declared = self.settings.tasks
        if declared is not None and name not in declared:
            raise unknown_name("task()", name, declared)
        self.capture.open()
        self.in_task = True
        try:
            yield
        except BaseException:
            self.capture.abort()
            raise
        finally:
            self.in_task = False
        self.seen.add(name)
        self.capture.take(name)
        self.capture.commit()
        self.entered.add(name)
        waiting = declared is not None and not self.entered.issuperset(declared)
        self.settle(defer=waiting or self.deferring > 0)

    def receive(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Take rows that were computed elsewhere."""
        self._refuse_nesting()
        parameters = self.parameters() if self.settings.shared is None else list(self.settings.shared)
        if not isinstance(gradients, Mapping) or not gradients:
            raise ValueError("gradients must be a dict from task name to a list of tensors, with at least one task")
        rows = {name: _checked_row(name, tensors, parameters) for name, tensors in gradients.items()}
        if self.settings.tasks is not None:
            check_names((tuple(rows),), self.settings.tasks, "gradients")
        self.introduce(rows)
        self.capture.open()
        for name, row in rows.items():
            self.capture.give(name, row)
        self.losses = {}
        self.finish()

    def take_back(self, before: Mapping[Tensor, Tensor]) -> None:
        """Undo what a failed step did to the parameters of which there is a copy; rows stay for another try."""
        with torch.no_grad():
            for p, old in before.items():
                p.copy_(old)
        self._first = None

    # -- surgery ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def operate(self) -> None:
        """Turn the rows into p.grad."""
        rows, parameters = self.capture.rows, self.parameters()
        self._screen()
        shared = self._shared(parameters)
        members = set(shared)
        result = {}
        for p in parameters:
            gradients = rows.of(p)
            if gradients and p not in members:
                result[p] = gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(0)
        self.judgement = None
        if shared and len(rows) == 1:  # nobody to protect it from: bit for bit the plain optimizer
            (name,) = rows
            preference = self.settings.preferences.get(name, 1.0)
            result |= {p: g if preference == 1 else g * preference for p, g in rows[name].items()}
            self.report = self._unmeasured()
        elif shared:
            result |= self._shared_result(shared)
        else:
            self.report = self._unmeasured()
        self.capture.write(result)
        self.pending = False
        self.entered.clear()

    def _shared_result(self, shared: list[Tensor]) -> dict[Tensor, Tensor]:
        blocks = self._blocks(shared)
        tables = [self.capture.rows.table(block) for block in blocks]
        G = torch.stack([gramian(table) for table in tables])
        problem = self._problem(G)
        finite = bool(torch.isfinite(G).all())
        if finite:
            direction = self._direction(problem, tables)
            weights, problem = direction.weights, replace(problem, gramian=self._gramians)
        else:
            # The plain sum is as non-finite as its terms: GradScaler sees it and skips the step.
            weights = problem.preferences.expand(G.shape[:-1])
            direction = Direction(
                weights, torch.ones_like(weights), torch.zeros(1, dtype=torch.bool), torch.ones(1), {}
            )
        exact = (direction.cancellation > CANCELLATION_SUM).tolist()
        result = {}
        for block, table, w, precise in zip(blocks, tables, weights.tolist(), exact, strict=True):
            result.update(zip(block, combine(table, w, block, exact=precise), strict=True))
        if finite:
            self.judgement = Judgement(blocks, problem.gramian, self.settings.pipeline.protected(problem))
            self._next_state = direction.state
        self.report = self._report(problem, direction)
        return result

    def _direction(self, problem: Problem, tables: list[list[list[Tensor | None]]]) -> Direction:
        """Solve on the quick Gramian; where its rounding could reach the promise, solve again on the exact one."""
        pipeline, state = self.settings.pipeline, self.memory["state"]
        self._gramians = problem.gramian
        direction = pipeline.direction(problem, state, rounding=ROUNDING_QUICK)
        delicate = direction.stationary | ~(direction.cancellation <= CANCELLATION_GRAMIAN)
        if pipeline.conflict_free and bool(delicate.any()):
            self._gramians = torch.stack([gramian(table, exact=True) for table in tables])
            problem = replace(self._problem(self._gramians), losses=problem.losses)
            direction = pipeline.direction(problem, state, rounding=ROUNDING_EXACT)
        return direction

    def _problem(self, G: Tensor) -> Problem:
        tasks = tuple(self.capture.rows)
        preferences = self.settings.preferences
        # Drawn from (seed, step): the same on every rank, and the same when accumulation redoes the step's surgery.
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + self.memory["step"]) % 2**63)
        losses = None
        if all(name in self.losses for name in tasks):
            losses = torch.stack([self.losses[name].double().cpu() for name in tasks])
        return Problem(
            gramian=G,
            preferences=torch.tensor([preferences.get(name, 1.0) for name in tasks], dtype=torch.float64),
            tasks=tasks,
            losses=losses,
            generator=generator,
        )

    def _shared(self, parameters: list[Tensor]) -> list[Tensor]:
        rows, declared = self.capture.rows, self.settings.shared
        if declared is not None:
            members = set(declared)
            return [p for p in parameters if p in members and rows.of(p)]
        if len(rows) == 1:
            return [p for p in parameters if rows.of(p)]
        return rows.shared(parameters)

    def _blocks(self, shared: list[Tensor]) -> list[list[Tensor]]:
        if self.settings.granularity == "model" and len(self.optimizers) == 1:
            return [shared]
        if self.settings.granularity == "tensor":
            return [[p] for p in shared]
        members = set(shared)
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        if self.settings.granularity == "model":
            groups = [[p for p in self.parameters() if p in members]]
        return [block for block in ([p for p in group if p in members] for group in groups) if block]

    def _screen(self) -> None:
        """Apply the `nonfinite` policy to rows with NaN or infinity before anything is computed from them."""
        policy = self.settings.nonfinite
        if policy == "propagate":
            return
        rows = self.capture.rows
        bad = [name for name in rows if not all(bool(torch.isfinite(_values(g)).all()) for g in rows[name].values())]
        if bad and policy == "raise":
            self.capture.clear()
            self.capture.write({})
            raise MultiTaskError(
                f"the gradients of {', '.join(map(repr, bad))} are not finite. Parameters and optimizer state are "
                "untouched and the rows were dropped. nonfinite='skip_task' leaves such a task out of the step."
            )
        for name in bad:
            rows.drop(name)
            self.memory["skipped"][name] = self.memory["skipped"].get(name, 0) + 1
        self._bad = tuple(bad)

    _bad: tuple[str, ...] = ()
    _gramians: Tensor

    # -- the step -----------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, closure: bool) -> dict[Tensor, Tensor]:
        """Finish what is pending and return copies of the parameters that the guarantee will need."""
        if self.in_task:
            raise MultiTaskError("step() was called inside `with optimizer.task(...)`: leave the block first")
        if self.capture.is_open:
            self.capture.abort()
        if self.pending and self.capture.is_live(self.parameters()):
            for p in self.parameters():
                p.grad = None
            self.operate()
        if self.unrun and not closure and not any(p.grad is not None for p in self.parameters()):
            warnings.warn(
                "total(losses) was built but its backward() never ran, or ran with inputs=, which leaves it out: "
                "this step has no gradient. Call optimizer.total(losses).backward().",
                UserWarning,
                stacklevel=4,
            )
        self.unrun = 0
        if self.settings.guarantee != "update":
            return {}
        if closure:  # which parameters are shared is known only once the closure has run
            return {p: p.detach().clone() for p in _trained(optimizer)}
        if self.judgement is None or not any(map(self.capture.still_ours, self._judged(optimizer))):
            return {}
        return {p: p.detach().clone() for p in self._judged(optimizer)}

    def watch(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that keeps the rows of its first evaluation, by which the whole step is judged."""
        first: list[tuple[Judgement | None, Any]] = []

        def watched() -> Any:
            if len(first) == 1:
                # An optimizer that evaluates again: this evaluation gets rows of its own.
                self.capture.rows = type(self.capture.rows)(self.settings.row_dtype)
            value = closure()
            if self.pending and self.capture.is_live(self.parameters()):
                for p in self.parameters():
                    p.grad = None
                self.operate()
            if not first:
                first.append((self.judgement, self.capture.rows))
            return value

        self._first = first
        return watched

    _first: list[tuple[Judgement | None, Any]] | None = None

    def after_step(self, optimizer: Optimizer, before: Mapping[Tensor, Tensor]) -> None:
        """Project the movement, then let the rows go."""
        if self._first:
            ((self.judgement, self.capture.rows),) = self._first
        if before and self.judgement is not None:
            movement = self._guard(optimizer, before, self.judgement)
            if self.report is not None and movement is not None:
                self.report = replace(self.report, movement=movement)
        self.stepped.add(id(optimizer))
        if all(id(other) in self.stepped for other in self.optimizers):
            self._end_of_step()

    def _end_of_step(self) -> None:
        if self._next_state is not None:
            self.memory["state"] = dict(self._next_state)
        self.memory["step"] += 1
        self.stepped.clear()
        self.forget()

    def forget(self) -> None:
        """Drop rows and everything that belongs to them; the last report stays."""
        self.capture.clear()
        self.judgement, self._next_state, self._first = None, None, None
        self.pending = False
        self.entered.clear()
        self.losses = {}

    def _judged(self, optimizer: Optimizer) -> list[Tensor]:
        if self.judgement is None:
            return []
        mine = set(_trained(optimizer))
        return [p for block in self.judgement.blocks for p in block if p in mine]

    def _guard(
        self, optimizer: Optimizer, before: Mapping[Tensor, Tensor], judgement: Judgement
    ) -> Movement | None:
        sign = {p: -1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups for p in group["params"]}
        movements = []
        for block, G in zip(judgement.blocks, judgement.gramians, strict=True):
            mine = [p for p in block if p in sign and p in before]
            if not mine:
                continue
            table = self.capture.rows.table(mine)
            if len(mine) < len(block):  # several optimizers share the rows: each is judged by its own part
                G = gramian(table, exact=True)
            movements.append(
                guard(
                    table,
                    G,
                    [before[p] for p in mine],
                    [p.detach() for p in mine],
                    [sign[p] for p in mine],
                    judgement.allowed,
                )
            )
        if not movements:
            return None
        return Movement(
            inner=torch.stack([movement.inner for movement in movements]).sum(0),
            square=sum(movement.square for movement in movements),
            corrected=any(movement.corrected for movement in movements),
            held=any(movement.held for movement in movements),
        )

    # -- reports and refusals -----------------------------------------------------------------------------------

    def _report(self, problem: Problem, direction: Direction) -> Report:
        G, w = problem.gramian, direction.weights
        products = (G @ w.unsqueeze(-1)).squeeze(-1)
        bad = ~torch.isfinite(G.diagonal(dim1=-2, dim2=-1)).all(0)
        return Report(
            step=self.memory["step"],
            tasks=problem.tasks,
            losses=self.losses,
            gramian=G.sum(0),
            scales=direction.scales,
            weights=w,
            products=products.sum(0),
            square=(products * w).sum(),
            stationary=bool(direction.stationary.all()),
            nonfinite=self._bad + tuple(name for name, is_bad in zip(problem.tasks, bad.tolist(), strict=True) if is_bad),
        )

    def _unmeasured(self) -> Report:
        """Return the report of a step in which no two tasks share a parameter: there is nothing to compare."""
        m = len(self.capture.rows)
        unknown = torch.full((m,), float("nan"), dtype=torch.float64)
        return Report(
            step=self.memory["step"],
            tasks=tuple(self.capture.rows),
            losses=self.losses,
            gramian=torch.diag_embed(unknown),
            scales=torch.ones(1, m, dtype=torch.float64),
            weights=torch.ones(1, m, dtype=torch.float64),
            products=unknown,
            square=torch.tensor(float("nan"), dtype=torch.float64),
            nonfinite=self._bad,
        )

    def _refuse_nesting(self) -> None:
        if self.in_task:
            raise MultiTaskError(
                "total() or backward() was called inside `with optimizer.task(...)`: use loss.backward() there"
            )

    def _refuse_silent_ranks(self) -> None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise MultiTaskError(
                "several ranks are initialised, and this version of gradsurg reduces no gradients over them: every "
                "rank would train alone. Run one process, or wait for a version whose changelog names DDP and FSDP2."
            )


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _checked_row(name: str, tensors: Sequence[Tensor | None], parameters: list[Tensor]) -> dict[Tensor, Tensor]:
    if isinstance(tensors, Tensor) or len(tensors) != len(parameters):
        raise ValueError(
            f"gradients[{name!r}] has {len(tensors)} entries for {len(parameters)} shared parameters: pass one tensor, "
            "or None, per parameter (those of shared=, else all that the optimizer trains)"
        )
    row = {}
    for i, (g, p) in enumerate(zip(tensors, parameters, strict=True)):
        if g is None:
            continue
        if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise ValueError(
                f"gradients[{name!r}][{i}] is {tuple(g.shape)} {g.dtype} on {g.device}, its parameter {tuple(p.shape)} "
                f"{p.dtype} on {p.device}: they must agree"
            )
        row[p] = g.detach().clone()
    return row


def _like(gradient: Tensor | None, loss: Tensor) -> Tensor | None:
    if gradient is None:
        return torch.ones_like(loss)
    return gradient.to(device=loss.device, dtype=loss.dtype).reshape(loss.shape)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _now(callback: Callable[[], None]) -> None:
    callback()

