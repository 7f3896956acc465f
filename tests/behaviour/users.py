"""What the user of a random program does in one step, by any of the ways in which gradients come in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradsurg
from tests.behaviour.failures import Broken, Mine
from tests.behaviour.fragile import FAILING
from tests.behaviour.programs import Net, Spec


@dataclass(eq=False)
class User:
    """A model and its wrapped optimizer, and the one who trains them."""

    net: Net
    optimizer: gradsurg.MultiTaskOptimizer

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer trains, in the order of its groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def copied(self) -> User:
        """Return a copy of model, optimizer and p.grad; it knows no rows."""
        twin = User(*copy.deepcopy((self.net, self.optimizer)))
        for p, q in zip(self.parameters, twin.parameters, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        return twin

    def standing(self) -> tuple[list[Tensor], list[Tensor | None], Any]:
        """Return copies of the parameters, of p.grad, and of the optimizer's state."""
        state = [copy.copy(self.optimizer.state.get(p, {})) for p in self.parameters]
        for entry in state:
            entry.update((name, value.clone()) for name, value in entry.items() if isinstance(value, Tensor))
        return [p.detach().clone() for p in self.net.parameters()], self.gradients_now(), state

    def gradients_now(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]

    # -- what a watcher overrides -----------------------------------------------------------------------------------

    def forward(self, batch: int, names: tuple[str, ...] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model."""
        return self.net(batch, names)

    def call(self, function: Callable[[], Any], *, steps: bool = False, closure: bool = False) -> Any:
        """Call the library: its step, with a closure, or something else."""
        return function()

    def brought(self, step: Spec, batch: int, last: bool, names: list[str]) -> None:
        """Take note of the tasks of a micro-batch whose gradients came in."""

    def ready(self, step: Spec) -> None:
        """Look at p.grad before the user changes it."""

    # -- one step -----------------------------------------------------------------------------------------------------

    def turn(self, step: Spec, stepping: bool = True) -> None:
        """Clear, bring gradients in, change them, and step."""
        if step.get("way") == "closure":
            self.call(lambda: self.optimizer.step(lambda: self.closure(step)), steps=True, closure=True)
            return
        self.clear(step)
        self.bring(step)
        if self.overflown():  # as a gradient scaler does
            self.optimizer.zero_grad()
            return
        self.ready(step)
        self.change(step)
        if stepping:
            self.step(step)

    def closure(self, step: Spec) -> float:
        self.clear(step)
        self.bring({**step, "way": "total"})
        self.change(step)
        if step.get("where") == "closure":
            raise Mine("in a closure")
        return 0.0

    def clear(self, step: Spec) -> None:
        """Clear p.grad in one of the usual ways."""
        how = step.get("clear")
        if how == "by hand":
            for p in self.parameters:
                p.grad = None
        elif how == "model":
            self.net.zero_grad()
        elif how != "no":
            self.optimizer.zero_grad(set_to_none=how != "zeros")

    def bring(self, step: Spec) -> None:
        """Let the gradients of all micro-batches in."""
        count, gather = step.get("micro", 1), step.get("gather")
        for k in range(count):
            waits = gather == "all" or (gather == "but last" and k < count - 1)
            with self.optimizer.accumulate() if waits else nullcontext():
                self.bring_one(step, step["batch"] + k, k == count - 1)

    def losses(self, step: Spec, batch: int, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features and losses of one micro-batch; the last loss of the last one may be broken."""
        z, losses = self.forward(batch, step.get("tasks"))
        name = next(reversed(losses))
        if last and step.get("where") == "broken":
            losses[name] = Broken.apply(losses[name])
        if last and step.get("nan"):
            losses[name] = losses[name] * float("nan")
        return z, losses

    def bring_one(self, step: Spec, batch: int, last: bool) -> None:
        """Let the gradients of one micro-batch in."""
        z, losses = self.losses(step, batch, last)
        optimizer, scale, way = self.optimizer, step.get("scale", 1.0), step.get("way", "total")
        given: dict[str, Any] = dict(losses)
        if step.get("absent"):
            given |= {name: None for name in self.net.names if name not in losses}
        more: Spec = {name: step[name] for name in ("preferences",) if name in step}
        if step.get("plain") and way in ("total", "backward", "features"):
            more["plain"] = self.penalty() * (scale if way == "backward" else 1.0)
        if not any(loss.requires_grad for loss in losses.values()):
            return
        if way == "task":
            for i, (name, loss) in enumerate(losses.items()):
                self.call(lambda n=name, x=loss, i=i: self.block(n, x * scale, i < len(losses) - 1, step))
                self.brought(step, batch, last, [name])
            return
        if way == "functions":
            self.call(lambda: optimizer.backward(self.functions(step, batch, last, list(losses)), **more))
        elif way == "set_gradients":
            rows = {name: self.gradients(loss, scale) for name, loss in losses.items()}
            self.call(lambda: optimizer.set_gradients(rows, **more))
        elif way == "backward":
            scaled = {name: None if loss is None else loss * scale for name, loss in given.items()}
            self.call(lambda: optimizer.backward(scaled, **more))
        elif way == "two totals" and len(losses) > 1:
            first = {name: losses[name] for name in list(losses)[:1]}
            others = {name: losses[name] for name in list(losses)[1:]}
            both = lambda: optimizer.total(first) + optimizer.total(others)  # noqa: E731
            self.call(lambda: (self.with_penalty(both(), step) * scale).backward())
        else:
            if way == "features":
                more["features"] = z
            self.call(lambda: (self.with_penalty(optimizer.total(given, **more), step) * scale).backward())
        self.brought(step, batch, last, [*losses])

    def with_penalty(self, total: Tensor, step: Spec) -> Tensor:
        """Add a penalty to a total; its gradient may reach p.grad before the tasks' do."""
        return total + self.penalty() if step.get("added") else total

    def penalty(self) -> Tensor:
        """Return a loss on weights that all tasks share."""
        return sum((p.abs().square().sum() for p in self.net.mix.parameters()), torch.zeros(()))

    def block(self, name: str, loss: Tensor, keep: bool, step: Spec) -> None:
        with self.optimizer.task(name):
            if loss.requires_grad:
                loss.backward(retain_graph=keep)
            if step.get("where") == "block" and not keep:
                raise Mine("in a block")

    def functions(self, step: Spec, batch: int, last: bool, names: list[str]) -> dict[str, Callable[[], Tensor]]:
        def compute(name: str) -> Tensor:
            if step.get("where") == "function" and name == names[-1]:
                raise Mine("in a function")
            return self.losses(step, batch, last)[1][name] * step.get("scale", 1.0)

        return {name: lambda name=name: compute(name) for name in names}

    def gradients(self, loss: Tensor, scale: float) -> list[Tensor | None]:
        """Return a row as set_gradients() takes it."""
        declared = self.optimizer._gradsurg.options.shared
        wanted = [p for p in self.parameters if p.requires_grad] if declared is None else list(declared)
        return reference(loss, wanted, scale)

    def overflown(self) -> bool:
        """Whether a gradient is not finite."""
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in self.parameters if p.grad is not None
        ]
        return not all(bool(torch.isfinite(g).all()) for g in gradients)

    def change(self, step: Spec) -> None:
        """Change p.grad as users do between backward and step."""
        how = step.get("change")
        present = [p for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
        if step.get("scale", 1.0) > 1:  # as a gradient scaler does
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(1 / step["scale"])
        if how == "clip":
            torch.nn.utils.clip_grad_norm_(present, 0.1, foreach=False)
        elif how == "none of one" and present:
            present[step["batch"] % len(present)].grad = None
        for p in present if how in ("half", "mask", "rows", "masked copy") else ():
            mask = torch.arange(p.numel()).reshape(p.shape) % 3 != step["batch"] % 3
            if how == "half":
                p.grad.mul_(0.5)
            elif how == "rows" and p.dim() > 0:
                p.grad[: (len(p) + 1) // 2] = 0
            elif how == "mask":
                p.grad.mul_(mask)
            elif how == "masked copy":
                p.grad = p.grad * mask

    def step(self, step: Spec) -> None:
        """Call step(), which is to fail in some programs."""
        where = step.get("where")
        if where in ("step", "half way"):
            atomic = self.optimizer._gradsurg.options.atomic
            FAILING.append("half way" if where == "half way" and atomic else "at once")
        try:
            self.call(self.optimizer.step, steps=True)
        finally:
            FAILING.clear()


def reference(loss: Tensor, parameters: list[Tensor], scale: float = 1.0) -> list[Tensor | None]:
    """Return a loss's gradients by torch.autograd.grad, the graph kept; None for parameters that it does not reach."""
    wanted = [p for p in parameters if p.requires_grad]
    if not loss.requires_grad or not wanted:
        return [None] * len(parameters)
    found = torch.autograd.grad(loss, wanted, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    by_id = dict(zip(map(id, wanted), found, strict=True))
    return [by_id.get(id(p)) for p in parameters]


def values(g: Tensor) -> Tensor:
    return g.coalesce().values() if g.is_sparse else g


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; torch adds no sparse float16 tensors."""
    if a is None or b is None:
        return b if a is None else a
    return (a.float() + b.float()).half() if a.is_sparse and a.dtype is torch.float16 else a + b


def wide(tensor: Tensor) -> Tensor:
    """Return all numbers in float64, complex ones as pairs."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).double().reshape(-1)


def rounding(parameters: Sequence[Tensor]) -> float:
    """Return what rounding may do to a gradient."""
    return 3e-2 if any(p.element_size() <= 2 for p in parameters) else 1e-4
