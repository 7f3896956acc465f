"""The models of the runs that are recorded, each with several losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TASKS = ("left", "right", "whole")
WEIGHTS = (1.0, 5.0, 0.2)  # losses of different sizes, so that normalisation has something to do


def data(seed: int, *shape: int) -> Tensor:
    """Return random numbers that depend on nothing but the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A shared part and one linear head a task, trained on random targets: its tasks are often in conflict."""

    def __init__(self, shared: nn.Module, shape: tuple[int, ...], width: int, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.shared, self.shape = shared, shape
        self.heads = nn.ModuleDict({name: nn.Linear(width, 2) for name in tasks})

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def features(self, batch: int) -> Tensor:
        result: Tensor = self.shared(data(batch, 12, *self.shape).to(self.dtype))
        return result

    def loss(self, name: str, z: Tensor, batch: int) -> Tensor:
        number = list(self.heads).index(name)
        target = data(1000 + 100 * number + batch, 12, 2).to(self.dtype)
        loss: Tensor = WEIGHTS[number % 3] * (self.heads[name](z) - target).square().mean()
        return loss

    def losses(self, batch: int) -> dict[str, Tensor]:
        z = self.features(batch)
        return {name: self.loss(name, z, batch) for name in self.heads}


class Words(nn.Module):
    """An embedding with sparse gradients that all tasks read, each at other places; a dense layer if asked for."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 4, sparse=True)
        self.mix = nn.Linear(4, 4) if dense else nn.Identity()

    def losses(self, batch: int) -> dict[str, Tensor]:
        tokens = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(batch))
        tokens[:, :3] = torch.tensor([3, 5, 7])  # in every task, so that something is shared
        target = data(1000 + batch, 3, 9, 4)
        outputs = [self.mix(self.table(each)) for each in tokens]
        return {name: (z - y).square().mean() for name, z, y in zip(TASKS, outputs, target, strict=True)}


class Turns(nn.Module):
    """Complex weights, which every task reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_complex(data(2, 4, 3, 2)))

    def losses(self, batch: int) -> dict[str, Tensor]:
        z = torch.view_as_complex(data(batch, 8, 4, 2)) @ self.weight
        return {"real": (z.real - 1).square().mean(), "turn": (z.imag + z.real).square().mean(), "size": z.abs().mean()}


class Point(nn.Module):
    """Two numbers and three tasks, which from step 2 on leave no direction that hurts nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([1.0, 2.0]))

    def losses(self, batch: int) -> dict[str, Tensor]:
        x, y = self.place
        return {"left": x, "right": y - x, "whole": y if batch < 2 else -y}


def perceptron() -> Model:
    shared = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return Model(shared, (6,), 4)


def picture_reader() -> Model:
    # No bias before the normalisation, which would take it out again: its gradient would be rounding alone.
    shared = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten()
    )
    return Model(shared, (2, 8, 8), 8 * 4 * 4)


def large() -> Model:
    """Return a model with tensors on both sides of the sizes at which the library changes how it computes."""
    shared = nn.Sequential(nn.Linear(600, 300), nn.Tanh(), nn.Linear(300, 120), nn.Tanh(), nn.Linear(120, 20))
    return Model(shared, (600,), 20)


def crowd(tasks: int) -> Model:
    return Model(nn.Sequential(nn.Linear(6, 10), nn.Tanh()), (6,), 10, tuple(f"task {i}" for i in range(tasks)))
