"""Small networks of several tasks, one per way in which parameters and tasks can hang together.

Each is a Case: parameters to train, and a function from a number (the batch) to the task losses. Losses of one batch
conflict often enough (random targets, tiny trunks) that surgery has something to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsurg import MultiTaskOptimizer

TASKS = ("left", "right", "whole")


class Heads(nn.Module):
    """A trunk with one head per task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS, *, bias: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias))
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2, bias=bias) for name in tasks})

    def losses(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        x, targets = data(batch, 16, 5).to(dtype), data(batch + 1000, len(self.heads), 16, 2).to(dtype)
        z = self.trunk(x)
        return {
            name: scale * (head(z) - target).square().mean()
            for (name, head), target, scale in zip(self.heads.items(), targets, (1.0, 5.0, 0.2), strict=False)
        }


MIXED = torch.tensor([[1.0, 0.1, -0.1], [-0.1, 1.0, 0.1], [0.1, -0.1, 1.0]])


class AllShared(nn.Module):
    """No heads: every task reaches every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def losses(self, batch: int) -> dict[str, Tensor]:
        # Each task reads every output: else no two tasks would touch the same number of the last layer.
        columns = (self.body(data(batch, 16, 5)) @ MIXED).unbind(1)
        return {
            name: (z - t).square().mean() for name, z, t in zip(TASKS, columns, data(batch + 1000, 3, 16), strict=True)
        }


class Tied(nn.Module):
    """One embedding used twice: to read, and (transposed) to write."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(data(1, 6, 4) / 2)
        self.mix = nn.Linear(4, 4)

    def losses(self, batch: int) -> dict[str, Tensor]:
        tokens = torch.arange(12) % 6
        z = torch.tanh(self.mix(self.table[tokens]))
        logits = z @ self.table.T
        return {
            "next": nn.functional.cross_entropy(logits, tokens.roll(batch + 1)),
            "size": (z.square().sum(1) - data(batch, 12)).square().mean(),
        }


class Complex(nn.Module):
    """Complex weights, real losses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_complex(data(2, 4, 3, 2)))
        self.bias = nn.Parameter(data(3, 3))

    def losses(self, batch: int) -> dict[str, Tensor]:
        z = torch.view_as_complex(data(batch, 8, 4, 2)) @ self.weight + self.bias
        return {"real": (z.real - 1).square().mean(), "turn": (z.imag + z.real).square().mean(), "size": z.abs().mean()}


class Dtypes(nn.Module):
    """float64, float32 and bfloat16 parameters in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6).double()
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 2).bfloat16()

    def losses(self, batch: int) -> dict[str, Tensor]:
        z = torch.tanh(self.second(self.first(data(batch, 16, 5).double()).float())).bfloat16()
        z = self.third(z).float() @ MIXED[:2, :2]
        target = data(batch + 1000, 2, 16)
        return {"a": (z[:, 0] - target[0]).square().mean(), "b": (z[:, 1] - target[1]).square().mean().double()}


class Sparse(nn.Module):
    """An embedding with sparse gradients, and nothing else (SparseAdam takes nothing else)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 3, sparse=True)

    def losses(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(20, (3, 9), generator=generator)
        tokens[:, 0] = 3  # all tasks meet in at least one row
        target = data(batch, 3, 9, 3)
        return {name: (self.table(t) - y).square().mean() for name, t, y in zip(TASKS, tokens, target, strict=True)}


class Patchy(nn.Module):
    """Frozen and unused parameters beside trained ones, and a convolution in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def losses(self, batch: int) -> dict[str, Tensor]:
        x = data(batch, 4, 2, 5, 5).to(memory_format=torch.channels_last)
        z = self.frozen(torch.tanh(self.conv(x)).mean((2, 3)))
        return {f"task{i}": (head(z) - 1 + i * 3).square().mean() for i, head in enumerate(self.heads)}


class Scalar(nn.Module):
    """Parameters without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-2.0))

    def losses(self, batch: int) -> dict[str, Tensor]:
        return {"a": (self.a * self.b - 1) ** 2, "b": (self.a - self.b - batch) ** 2}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "heads": Heads,
    "all shared": AllShared,
    "tied": Tied,
    "complex": Complex,
    "dtypes": Dtypes,
    "sparse": Sparse,
    "patchy": Patchy,
    "scalar": Scalar,
}


def data(seed: int, *shape: int) -> Tensor:
    """Random numbers that depend on nothing but the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name: str = "heads", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def twins(name: str = "heads", seed: int = 0) -> tuple[nn.Module, nn.Module]:
    model = build(name, seed)
    return model, copy.deepcopy(model)


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def reference_rows(
    losses: dict[str, Tensor], parameters: list[Tensor], scale: Tensor | float = 1.0
) -> dict[str, list[Tensor | None]]:
    """Rows as torch.autograd.grad gives them, the graph kept."""
    return {
        name: list(
            torch.autograd.grad(
                loss, parameters, torch.full_like(loss, float(scale)), retain_graph=True, allow_unused=True
            )
        )
        for name, loss in losses.items()
    }


def rows_of(optimizer: MultiTaskOptimizer) -> dict[str, list[Tensor | None]]:
    """The live rows, as lists in the order of the optimizer's parameters."""
    rows = optimizer._gradsurg.capture.rows
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {name: [rows[name].get(p) for p in parameters] for name in rows}


def run_backward(
    way: str,
    optimizer: MultiTaskOptimizer,
    losses: dict[str, Tensor | None],
    scale: float = 1.0,
    plain: Tensor | None = None,
) -> None:
    """Let the gradients of the losses in, by one of the four ways."""
    if way == "total":
        (optimizer.total(losses, plain=plain) * scale).backward()
    elif way == "backward":
        scaled = {name: None if loss is None else loss * scale for name, loss in losses.items()}
        optimizer.backward(scaled, plain=plain)
    elif way == "task":
        for i, (name, loss) in enumerate(losses.items()):
            with optimizer.task(name):
                (loss * scale).backward(retain_graph=i < len(losses) - 1)
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.set_gradients(reference_rows(losses, parameters, scale))


@dataclass(frozen=True)
class Snapshot:
    """Values of parameters and gradients, to see later whether anything changed."""

    parameters: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        parameters = list(model.parameters())
        return cls(
            [p.detach().clone() for p in parameters], [None if p.grad is None else p.grad.clone() for p in parameters]
        )


def same(a: object, b: object) -> bool:
    """Whether two nested states are equal to the bit: tensors, dicts, lists, numbers; NaN equals NaN."""
    if isinstance(a, Snapshot) and isinstance(b, Snapshot):
        return same(a.parameters, b.parameters) and same(a.gradients, b.gradients)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
            return False
        if a.layout == torch.sparse_coo:
            a, b = a.coalesce(), b.coalesce()
            return torch.equal(a.indices(), b.indices()) and torch.equal(a.values(), b.values())
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return same([p.detach() for p in one.parameters()], [p.detach() for p in other.parameters()])
