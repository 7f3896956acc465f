"""One run: train, look at validation and test now and then, count conflicts by gradients of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gradsurg
from benchmarks.quality.methods import METHODS
from benchmarks.quality.problems import Net, Problem, Split, batches, problem
from benchmarks.quality.search import SINGLE
from gradsurg.demo.digits import CONFLICT

__all__ = ["CHECKPOINTS", "build", "one_step", "run"]

CHECKPOINTS = 5  # evenly spaced, the last at the end; the best on validation counts (early stopping)
EVERY = 10  # conflicts are counted in each such step
FLOOR = 0.1  # share of the learning rate that is left at the end of the cosine


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Train once.

    Returns:
        "valid", "test": for each checkpoint, the metrics of the tasks in order, null where not finite; "gradient",
        "update": share of counted steps in which what was handed to the optimizer, and what the shared parameters
        really did, conflicts with some task; "worst": the smallest cosine of either; "cpu_ms": processor time of a
        step, in milliseconds, without counting and looking.
    """
    p = problem(config["problem"], config["seed"])
    tasks = [config["method"].removeprefix(SINGLE)] if config["method"].startswith(SINGLE) else list(p.tasks)
    net, optimizer = build(p, config, tasks)
    source = batches(p, tasks, config["seed"])
    looks = {round(config["steps"] * (k + 1) / CHECKPOINTS) for k in range(CHECKPOINTS)}
    cosines: list[tuple[Tensor, Tensor]] = []
    shared: list[Tensor] = []
    valid, test, spent = [], [], 0.0
    for step in range(1, config["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = config["rate"] * _cosine(step / config["steps"])
        parts = next(source)
        counted = step % EVERY == 0 and len(tasks) > 1
        if counted:
            rows, shared = _rows(p, net, parts, tasks)
            before = _flat(shared)
        began = time.process_time()
        one_step(p, net, optimizer, parts, tasks, config["weights"])
        spent += time.process_time() - began
        if counted:
            direction = _flat([torch.zeros_like(q) if q.grad is None else q.grad for q in shared])
            cosines.append((_cosines(rows, direction), _cosines(rows, before - _flat(shared))))
        if step in looks:
            valid.append(_numbers(p, net, "valid", tasks))
            test.append(_numbers(p, net, "test", tasks))
    gradient, update = (torch.stack(kind) for kind in zip(*cosines, strict=True)) if cosines else (None, None)
    return {
        "valid": valid,
        "test": test,
        "gradient": _share(gradient),
        "update": _share(update),
        "worst": None if gradient is None or update is None else [_least(gradient), _least(update)],
        "cpu_ms": round(1000 * spent / config["steps"], 3),
    }


def build(p: Problem, config: dict[str, Any], tasks: Sequence[str]) -> tuple[Net, torch.optim.Optimizer]:
    """Return the model and its optimizer, wrapped where the method says so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        net = p.net(tasks, config["width"])
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        net.parameters(), lr=config["rate"], weight_decay=config["decay"]
    )
    method = METHODS.get(config["method"])
    if method is not None and method.options is not None:
        optimizer = gradsurg.wrap(optimizer, seed=config["seed"], **method.options(p))
    return net, optimizer


def one_step(
    p: Problem,
    net: Net,
    optimizer: torch.optim.Optimizer,
    parts: dict[str, Split],
    tasks: Sequence[str],
    weights: Sequence[float] | None,
) -> None:
    """Do what a training loop does."""
    losses = p.losses(net, parts, tasks)
    optimizer.zero_grad()
    if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
        optimizer.total(losses).backward()
    else:
        stacked = torch.stack(list(losses.values()))
        (stacked if weights is None else stacked * torch.tensor(weights)).sum().backward()
    optimizer.step()


def _rows(p: Problem, net: Net, parts: dict[str, Split], tasks: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Return each task's gradient of the parameters that at least two tasks reach, (m, P), and those parameters."""
    parameters = list(net.parameters())
    losses = p.losses(net, parts, tasks)
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses.values()]
    reached = [sum(g is not None for g in of_one) >= 2 for of_one in zip(*found, strict=True)]
    shared = [q for q, both in zip(parameters, reached, strict=True) if both]
    rows = []
    for gradients in found:
        kept = [g for g, both in zip(gradients, reached, strict=True) if both]
        rows.append(_flat([torch.zeros_like(q) if g is None else g for q, g in zip(shared, kept, strict=True)]))
    return torch.stack(rows), list(shared)


def _cosine(progress: float) -> float:
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def _numbers(p: Problem, net: Net, split: str, tasks: Sequence[str]) -> list[float | None]:
    flat = [number for task in p.scores(net, split, tasks).values() for number in task]
    return [round(number, 3) if math.isfinite(number) else None for number in flat]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def _cosines(rows: Tensor, direction: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(rows, direction[None], dim=1, eps=1e-30)


def _share(cosines: Tensor | None) -> float | None:
    return None if cosines is None else round((cosines < CONFLICT).any(1).double().mean().item(), 4)


def _least(cosines: Tensor) -> float:
    return float(f"{cosines.min().item():.3g}")
