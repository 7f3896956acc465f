"""Models to time: a shared trunk and one head a task, and losses on random targets.

Batches are drawn beforehand and change from step to step: on one and the same, training ends at a Pareto stationary
point, and a benchmark would measure that special case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "mlp", "transformer"]


BATCHES = 16


class Residual(nn.Module):
    """x + W relu(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.linear(nn.functional.relu(x))
        return x + change


class Block(nn.Module):
    """One layer of a transformer, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.mix(self.before(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        down: Tensor = self.down(nn.functional.gelu(self.up(self.between(x))))
        return x + down


@dataclass
class Workload:
    """A model with its data.

    Attributes:
        trunk: What the tasks share.
        heads: One module a task.
        batches: What the trunk reads and what the heads should say, (tasks, ...), without end.
    """

    trunk: nn.Module
    heads: nn.ModuleList
    batches: Iterator[tuple[Tensor, Tensor]]

    @property
    def model(self) -> nn.Module:
        """Everything trainable as one module."""
        return nn.ModuleList([self.trunk, self.heads])

    def features(self) -> Tensor:
        """Return what the trunk makes of the batch."""
        batch, self.targets = next(self.batches)
        features: Tensor = self.trunk(batch)
        return features

    def losses_from(self, features: Tensor) -> list[Tensor]:
        """Return one mean squared error a task."""
        pairs = zip(self.heads, self.targets, strict=True)
        return [nn.functional.mse_loss(head(features), target) for head, target in pairs]

    def losses(self) -> list[Tensor]:
        """Return one loss a task, by one forward pass."""
        return self.losses_from(self.features())


def transformer(tasks: int, *, width: int = 256, layers: int = 6, sequences: int = 8, length: int = 64) -> Workload:
    """Return a transformer of 12 · layers · width² parameters and a vocabulary of 1 000 (5.0 M by default)."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Embedding(1000, width), *(Block(width, width // 32) for _ in range(layers)))
    heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))
    size = (sequences, length)
    drawn = [(torch.randint(1000, size), torch.randn(tasks, *size, 10)) for _ in range(BATCHES)]
    return Workload(trunk, heads, itertools.cycle(drawn))


def mlp(tasks: int, *, parameters: int = 100_000, tensors: int = 40, batch: int = 32) -> Workload:
    """Return a residual perceptron of about so many parameters in exactly so many tensors, heads included."""
    torch.manual_seed(0)
    layers = tensors // 2 - tasks
    width = max(int((parameters / layers) ** 0.5), 1)
    trunk = nn.Sequential(*(Residual(width) for _ in range(layers)))
    heads = nn.ModuleList(nn.Linear(width, 4) for _ in range(tasks))
    drawn = [(torch.randn(batch, width), torch.randn(tasks, batch, 4)) for _ in range(BATCHES)]
    return Workload(trunk, heads, itertools.cycle(drawn))


WORKLOADS: dict[str, Callable[[int], Workload]] = {"transformer": transformer, "mlp": mlp}
