"""Micro-batches under DDP: in accumulate(), in no_sync(), in both or in neither."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed import nets
from tests.distributed.jobs_ddp import ddp_of


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
