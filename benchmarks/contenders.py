"""One training step of each contender: zero_grad, forward pass, backward passes, surgery, the optimizer's own step.

The peers are used as their own documentation does. TorchJD solves DualProj, which is our cone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradsurg
from benchmarks.workloads import Workload

__all__ = ["ALONE", "CONTENDERS", "NARROW", "OURS", "PEERS", "PLAIN", "SUMMED", "Step", "build"]

Step = Callable[[], None]
PLAIN, SUMMED = "m plain backward passes", "one backward pass of the sum"
ALONE = "m backward passes, gradients kept apart, no surgery"  # less than this no exact method takes
OURS: dict[str, dict[str, Any]] = {
    "gradsurg, guarantee gradient": {"guarantee": "gradient"},
    "gradsurg, guarantee update": {},
    "gradsurg, guarantee gradient, batched": {"guarantee": "gradient", "batched": True},
    "gradsurg, guarantee update, batched": {"batched": True},
}
NARROW: dict[str, dict[str, Any]] = {  # of interest for their memory alone
    "gradsurg, guarantee gradient, rows in bfloat16": {"guarantee": "gradient", "row_dtype": torch.bfloat16},
}


def plain(work: Workload, optimizer: Optimizer) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        losses = work.losses()
        for i, loss in enumerate(losses):
            loss.backward(retain_graph=i < len(losses) - 1)
        optimizer.step()

    return step


def alone(work: Workload, optimizer: Optimizer) -> Step:
    parameters = list(work.model.parameters())

    def step() -> None:
        rows: list[list[Tensor | None]] = []
        losses = work.losses()
        for i, loss in enumerate(losses):
            for p in parameters:
                p.grad = None
            loss.backward(retain_graph=i < len(losses) - 1)
            rows.append([p.grad for p in parameters])
        optimizer.step()

    return step


def summed(work: Workload, optimizer: Optimizer) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        torch.stack(work.losses()).sum().backward()
        optimizer.step()

    return step


def ours(work: Workload, optimizer: Optimizer, **options: Any) -> Step:
    wrapped = gradsurg.wrap(optimizer, **options)

    def step() -> None:
        wrapped.zero_grad()
        wrapped.total(work.losses()).backward()
        wrapped.step()

    return step


def torchjd(work: Workload, optimizer: Optimizer, chunk: int | None, sum_gramians: bool) -> Step:
    from torchjd.aggregation import DualProj
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator, shared = DualProj(), list(work.trunk.parameters())

    def step() -> None:
        optimizer.zero_grad()
        features = work.features()
        mtl_backward(work.losses_from(features), features, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator, optimize_gramian_computation=sum_gramians)
        optimizer.step()

    return step


def torchjd_autogram(work: Workload, optimizer: Optimizer) -> Step:
    from torchjd.aggregation import DualProjWeighting
    from torchjd.autogram import Engine

    engine, weighting = Engine(work.trunk, batch_dim=None), DualProjWeighting()

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(work.losses())
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()

    return step


def pcgrad(work: Workload, optimizer: Optimizer) -> Step:
    from pytorch_optimizer import PCGrad

    peer = PCGrad(optimizer)

    def step() -> None:
        peer.zero_grad()
        peer.pc_backward(work.losses())  # type: ignore[arg-type]  # annotated as modules; takes losses
        peer.step()

    return step


def config(work: Workload, optimizer: Optimizer) -> Step:
    from conflictfree.grad_operator import ConFIG_update
    from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    model = work.model

    def step() -> None:
        gradients: list[Tensor] = []
        losses = work.losses()
        for i, loss in enumerate(losses):
            optimizer.zero_grad()
            loss.backward(retain_graph=i < len(losses) - 1)
            gradients.append(get_gradient_vector(model, none_grad_mode="zero"))
        apply_gradient_vector(model, ConFIG_update(gradients), none_grad_mode="zero")
        optimizer.step()

    return step


PEERS: dict[str, Callable[[Workload, Optimizer], Step]] = {
    "TorchJD, all rows at once": lambda work, optimizer: torchjd(work, optimizer, None, False),
    "TorchJD, all rows at once, Gramian summed": lambda work, optimizer: torchjd(work, optimizer, None, True),
    "TorchJD, row by row": lambda work, optimizer: torchjd(work, optimizer, 1, False),
    "TorchJD, row by row, Gramian summed": lambda work, optimizer: torchjd(work, optimizer, 1, True),
    "TorchJD, autogram": torchjd_autogram,
    "pytorch_optimizer PCGrad": pcgrad,
    "conflictfree ConFIG": config,
}
CONTENDERS = [PLAIN, ALONE, SUMMED, *OURS, *PEERS]


def build(contender: str, work: Workload) -> Step:
    """Return one step of a contender on a model of its own, with plain SGD, the cheapest there is."""
    warnings.simplefilter("ignore")  # of the peers
    # At 1e-2 the perceptron of two tasks diverges within ten steps, and NaN takes shorter ways.
    optimizer = torch.optim.SGD(work.model.parameters(), lr=1e-3)
    if contender in OURS or contender in NARROW:
        return ours(work, optimizer, **(OURS | NARROW)[contender])
    if contender in PEERS:
        return PEERS[contender](work, optimizer)
    return {PLAIN: plain, ALONE: alone, SUMMED: summed}[contender](work, optimizer)
