"""Micro-batches under DDP: in accumulate(), in no_sync(), in both or in neither."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradsurg
from gradsurg.gradients.dtensor import local_of
from tests.distributed import nets
from tests.distributed.jobs_ddp import ddp_of
from tests.distributed.jobs_promises import spread


def accumulate(model: nn.Module, optimizer: Any, how: str, part: Any) -> None:
    """Two micro-batches a step, the first in accumulate(), in no_sync(), in both or in neither."""
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            with ExitStack() as stack:
                if micro == 0 and how in ("accumulate", "both"):
                    stack.enter_context(optimizer.accumulate())
                if micro == 0 and how in ("no_sync", "both") and hasattr(model, "no_sync"):
                    stack.enter_context(model.no_sync())
                losses = model(*part(nets.batch(10 * step + micro)))
                if step == 1 and micro == 0:
                    losses = {"task1": losses["task1"]}  # the others come in the second micro-batch only
                (optimizer.total(losses) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def accumulated(how: str) -> tuple[dict[str, Tensor], int]:
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model)
    with nets.counting() as record:
        accumulate(model, optimizer, how, nets.mine)
    return nets.state_of(model), sum(name == "reduce_scatter" for name, _ in record)


def accumulated_alone(how: str) -> dict[str, Tensor]:
    model = nets.build()
    accumulate(model, nets.optimizer_of(model), how, lambda data: data)
    return nets.state_of(model)


def kept_back(model: nn.Module, optimizer: Any, part: Any, inside: bool = False) -> None:
    """All micro-batches of every step in no_sync(); inside: the step too."""
    for step in range(3):
        optimizer.zero_grad()
        with nullcontext() if part is not nets.mine else model.no_sync():
            for micro in range(2):
                (optimizer.total(model(*part(nets.batch(10 * step + micro)))) / 2).backward()
            if inside:
                optimizer.step()
        if not inside:
            optimizer.step()


def all_in_no_sync(options: dict[str, Any], inside: bool) -> dict[str, Tensor]:
    model = ddp_of(nets.build(nets.Shared))
    kept_back(model, nets.optimizer_of(model, "SGD", **options), nets.mine, inside)
    return nets.state_of(model)


def all_in_no_sync_alone(options: dict[str, Any]) -> dict[str, Tensor]:
    model = nets.build(nets.Shared)
    kept_back(model, nets.optimizer_of(model, "SGD", **options), lambda data: data)
    return nets.state_of(model)


# A plain sum, so that torch's own accumulation says what p.grad has to be.
PLAIN: dict[str, Any] = {"surgery": "sum", "normalize": "none", "guarantee": "none"}


def set_to_zero(g: Tensor) -> None:
    g.data.zero_()


def halve(g: Tensor) -> None:
    g.data.mul_(0.5)


def leave(g: Tensor) -> None:
    pass


def changed_between(kind: str, change: Any, ranks: list[int]) -> dict[str, Tensor]:
    """Return p.grad after three micro-batches; between them, some ranks change theirs in a way that torch can't see."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, **PLAIN)
    for micro in range(3):
        optimizer.total(model(*nets.mine(nets.batch(micro)))).backward()
        for p in model.parameters():
            if micro < 2 and p.grad is not None and dist.get_rank() in ranks:
                change(local_of(p.grad))
    return gradients_of(model)


def penalised(kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """A penalty is added to each total, and runs backward before it; return p.grad and the tasks with rows."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, **PLAIN)
    for micro in range(3):
        losses = model(*nets.mine(nets.batch(micro)))
        if micro == 2:
            losses = {"task1": losses["task1"]}
        total = optimizer.total(losses)
        (total + sum(whole(p.square().sum()) for p in trained(model))).backward()
    return gradients_of(model), list(optimizer._gradsurg.capture.rows)


def trained(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "unused" not in name]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = [(name.replace("module.", ""), p.grad) for name, p in model.named_parameters()]
    return {name: whole(g) for name, g in named if g is not None}


def masked(kind: str) -> list[str]:
    """Return the errors of a step, and of a total, after one p.grad was masked while surgery waits."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model)
    messages = []
    for again in (False, True):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.total(model(*nets.mine(nets.batch(0)))).backward()
        local_of(next(p.grad for p in model.parameters() if p.grad is not None))[:1] = 0
        try:
            if again:
                optimizer.total(model(*nets.mine(nets.batch(1)))).backward()
            else:
                optimizer.step()
            messages.append("")
        except gradsurg.MultiTaskError as error:
            messages.append(str(error))
    optimizer.zero_grad()
    optimizer.total(model(*nets.mine(nets.batch(1)))).backward()
    optimizer.step()
    return messages
