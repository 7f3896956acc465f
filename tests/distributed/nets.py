"""Networks, batches and the comparison with one process that sees the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradsurg

BATCH = 8  # of all ranks together
STEPS = 4


class Net(nn.Module):
    """A trunk, one head a task, and a layer that nobody uses; forward returns the task losses."""

    def __init__(self, tasks: int = 3, width: int = 7) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(tasks))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x))
        return {f"task{i}": (1 + 3 * i) * (head(z) - y[:, i]).square().mean() for i, head in enumerate(self.heads)}


class Shared(nn.Module):
    """Every task reaches every parameter: where DDP left alone is silently wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.body(x)
        return {f"task{i}": (z[:, i] - y[:, i, 0]).square().mean() for i in range(3)}


def batch(step: int, size: int = BATCH, tasks: int = 3) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of all ranks in a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator), 3 * torch.randn(size, tasks, 2, generator=generator)


def mine(tensors: Sequence[Tensor], rank: int | None = None, ranks: int | None = None) -> list[Tensor]:
    """Return this rank's part of a batch."""
    rank = dist.get_rank() if rank is None else rank
    ranks = dist.get_world_size() if ranks is None else ranks
    return [t.chunk(ranks)[rank] for t in tensors]


def build(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    """Return the same network on every rank."""
    torch.manual_seed(7)
    return kind()


def optimizer_of(net: nn.Module, name: str = "AdamW", **options: Any) -> gradsurg.MultiTaskOptimizer:
    """Return a wrapped optimizer; SGD has momentum."""
    arguments: dict[str, Any] = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.02}}[name]
    parameters = [p for p in net.parameters() if p.requires_grad]
    return gradsurg.wrap(getattr(torch.optim, name)(parameters, **arguments), **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole parameters and buffers, without the prefixes that wrappers put before their names."""
    from torch.distributed.tensor import DTensor

    state = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        full = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        state[name.replace("module.", "").replace("_orig_mod.", "")] = full.clone()
    return state


def alone(steps: int) -> dict[str, Tensor]:
    """Return the parameters after so many steps of one process over whole batches."""
    model = build()
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.total(model(*batch(step))).backward()
        optimizer.step()
    return state_of(model)


def assert_close(ours: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Compare every number with its tensor's scale."""
    assert list(ours) == list(alone)
    for name, t in ours.items():
        scale = max(1.0, float(alone[name].abs().max())) if t.is_floating_point() else 1.0
        wide = torch.complex128 if t.is_complex() else torch.float64
        difference = float((t.to(wide) - alone[name].to(wide)).abs().max())
        assert difference <= tolerance * scale, f"{name} differs by {difference:.1e}"


def equal_everywhere(results: Sequence[dict[str, Tensor]]) -> None:
    """Compare what the ranks returned, bit by bit."""
    for other in results[1:]:
        assert list(other) == list(results[0])
        for name, t in other.items():
            assert torch.equal(t, results[0][name]), f"{name} differs between ranks"


def sent(record: Sequence[tuple[str, int]], ranks: int) -> float:
    """Return the bytes that each rank sends for these collectives, by the algorithms that send least."""
    twice = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    return sum(twice[name] * size for name, size in record) * (ranks - 1) / ranks


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """Record (collective, bytes of the whole message) of everything sent inside this block, FSDP2's own included."""
    record: list[tuple[str, int]] = []
    names = [name for name in ("all_reduce", "reduce_scatter_single", "all_gather_single") if hasattr(dist, name)]
    names += [name for name in ("reduce_scatter_tensor", "all_gather_into_tensor") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)]
            kind = {"reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}
            size = max(t.numel() * t.element_size() for t in tensors)  # the larger of input and output
            record.append((kind.get(name, name.replace("_single", "").replace("_into_tensor", "")), size))
            return originals[name](*arguments, **keywords)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield record
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
