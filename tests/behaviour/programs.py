"""Random training programs, each drawn from a seed: a model, an optimizer, options of wrap(), and what a user does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import gradsurg
from tests.behaviour.fragile import Fragile

TASKS = ("a", "b", "c", "d")
SIZES = (1.0, 5.0, 0.2, 1.0)  # losses of different sizes, so that normalisation has something to do
Spec = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """What a user does, as data: its repr can be pasted into a test.

    Attributes:
        model: Arguments of Net.
        optimizer: A name in torch.optim, its arguments, and "rates", the factor on lr of each parameter group.
        options: Those of wrap(); shared="trunk" stands for the parameters before the heads.
        actions: The name of a method of Runner, and its arguments.
    """

    model: Spec = field(default_factory=dict)
    optimizer: Spec = field(default_factory=lambda: {"name": "SGD", "lr": 0.1})
    options: Spec = field(default_factory=dict)
    actions: tuple[tuple[str, Spec], ...] = ()

    @classmethod
    def draw(cls, seed: int) -> Program:
        """Return the program of a seed."""
        rng = random.Random(seed)
        model = draw_model(rng)
        options = draw_options(rng, TASKS[: model["tasks"]])
        actions = [draw_action(rng, model, options) for _ in range(rng.randint(2, 5))]
        return cls(model, draw_optimizer(rng, model), options, (*actions, ("train", draw_step(rng, model, options))))

    def smaller(self) -> Iterator[Program]:
        """Yield programs that lack one thing of this one."""
        for k in range(len(self.actions)):
            yield replace(self, actions=self.actions[:k] + self.actions[k + 1 :])
        for part in ("model", "optimizer", "options"):
            spec = getattr(self, part)
            for name in [name for name in spec if name not in ("name", "lr")]:
                yield replace(self, **{part: {key: value for key, value in spec.items() if key != name}})
        for k, (action, spec) in enumerate(self.actions):
            for name in [name for name in spec if name != "where"]:
                less = {key: value for key, value in spec.items() if key != name}
                yield replace(self, actions=(*self.actions[:k], (action, less), *self.actions[k + 1 :]))


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Return a program that still fails, and no longer does if any one thing is left out."""
    while smaller := next(filter(fails, program.smaller()), None):
        program = smaller
    return program


def coin(rng: random.Random, spec: Spec, chance: float, name: str, *values: Any) -> None:
    """Give a spec one of some values, with some chance."""
    value = rng.choice(values)
    if rng.random() < chance:
        spec[name] = value


# -- the model -----------------------------------------------------------------------------------------------------

FRONTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "conv": lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
    "sparse": lambda: nn.Embedding(7, 4, sparse=True),
    "tied": lambda: nn.Embedding(7, 4),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex64),
}
EXTRAS = ("frozen", "empty", "scalar", "unused", "apart", "pair")


class Net(nn.Module):
    """A trunk of two small layers and one head a task.

    Args:
        front: The first layer, one of FRONTS.
        dtype: That of all parameters; "mixed" is float64 in front, and bfloat16 heads.
        heads: Whether each task has a linear head, or reads a column of the trunk's output.
        extras: "frozen": a layer that is not trained; "empty": a parameter without numbers; "scalar": one without
            dimensions; "unused": one that no task reaches; "apart": the last task has a parameter of its own and
            nothing else; "pair": a layer that the first two tasks share.
        tasks: Their number.
    """

    def __init__(
        self,
        front: str = "linear",
        dtype: str = "float32",
        heads: bool = False,
        extras: tuple[str, ...] = (),
        tasks: int = 2,
    ) -> None:
        super().__init__()
        self.kind, self.extras, self.names = front, extras, TASKS[:tasks]
        self.front, self.mix = FRONTS[front](), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False) if "frozen" in extras else None
        self.pair = nn.Linear(4, 4) if "pair" in extras else None
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in self.names if heads)
        for name, shape in (("empty", (0, 3)), ("scalar", ()), ("unused", (2,)), ("apart", (3,))):
            setattr(self, name, nn.Parameter(torch.ones(shape)) if name in extras else None)
        if dtype == "mixed":
            self.front.double()
            self.heads.bfloat16()
        elif front != "complex":
            self.to(getattr(torch, dtype))

    def trunk(self) -> list[nn.Parameter]:
        """Return the trained parameters before the heads."""
        return [p for p in (*self.front.parameters(), *self.mix.parameters()) if p.requires_grad]

    def features(self, batch: int) -> Tensor:
        """Return what the heads read."""
        generator = torch.Generator().manual_seed(batch)
        dtype = next(self.front.parameters()).dtype
        if self.kind in ("sparse", "tied"):
            z = self.front(torch.randint(7, (5,), generator=generator))
        elif self.kind == "conv":
            x = torch.randn(5, 3, 3, 3, generator=generator).to(dtype)
            z = self.front(x.to(memory_format=torch.channels_last)).mean((2, 3))
        else:
            z = self.front(torch.randn(5, 3, generator=generator).to(dtype))
        z = torch.cat((z.real, z.imag), 1) if z.is_complex() else z
        z = torch.tanh(z).to(self.mix.weight.dtype)
        z = z if self.frozen is None else self.frozen(z)
        return torch.tanh(self.mix(z))

    def loss(self, name: str, z: Tensor, batch: int) -> Tensor:
        """Return the loss of a task, which pulls the other way than that of the task before."""
        number = self.names.index(name)
        if self.apart is not None and number == len(self.names) - 1:
            return (self.apart - batch).square().sum()
        z = self.pair(z) if self.pair is not None and number < 2 else z
        if self.heads:
            out = self.heads[number](z.to(self.heads[number].weight.dtype))[:, 0]
        else:
            out = (z @ self.front.weight.T.to(z.dtype) if self.kind == "tied" else z)[:, number % 2]
        out = out if self.scalar is None else out * self.scalar
        out = out if self.empty is None else out + self.empty.sum()
        out = out.float() if out.element_size() < 4 else out
        target = torch.randn(5, generator=torch.Generator().manual_seed(batch + 1000)) + number % 2 * 2 - 1
        return SIZES[number] * (out - target).square().mean()

    def forward(self, batch: int, names: tuple[str, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the heads read, and the losses of some tasks, else of all."""
        z = self.features(batch)
        return z, {name: self.loss(name, z, batch) for name in names or self.names}


def draw_model(rng: random.Random) -> Spec:
    model: Spec = {"tasks": rng.choice((1, 2, 2, 3, 3, 4)), "heads": rng.random() < 0.6}
    coin(rng, model, 0.6, "front", *FRONTS)
    if model.get("front") != "complex":
        coin(rng, model, 0.4, "dtype", "float64", "bfloat16", "float16", "mixed")
    if model.get("front") == "sparse" and model.get("dtype") == "float16":  # torch adds no two such gradients
        del model["dtype"]
    model["extras"] = tuple(extra for extra in EXTRAS if rng.random() < 0.15)
    return model


# -- the optimizer -------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {"momentum": (0.9,), "nesterov": (True,), "dampening": (0.5,), "maximize": (True,)},
    "Adam": {"betas": ((0.5, 0.9),), "amsgrad": (True,), "maximize": (True,)},
    "AdamW": {"betas": ((0.5, 0.9),), "amsgrad": (True,), "eps": (1e-3,)},
    "RMSprop": {"momentum": (0.9,), "centered": (True,), "alpha": (0.5,)},
    "Adagrad": {"lr_decay": (0.1,), "initial_accumulator_value": (0.1,)},
}
CLASSES = {name: type(f"Fragile{name}", (Fragile, getattr(torch.optim, name)), {}) for name in OPTIMIZERS}


def build(program: Program, seed: int = 0) -> tuple[Net, gradsurg.MultiTaskOptimizer]:
    """Return a model and its wrapped optimizer; the ValueError of wrap() if options do not go together."""
    torch.manual_seed(seed)
    net = Net(**program.model)
    arguments = {**program.optimizer}
    make, rates = CLASSES[arguments.pop("name")], arguments.pop("rates", (1.0,))
    parameters = [p for p in net.parameters() if p.requires_grad]
    cuts = [len(parameters) * k // len(rates) for k in range(len(rates) + 1)]
    groups = [
        {"params": parameters[cuts[k] : cuts[k + 1]], "lr": arguments["lr"] * rate} for k, rate in enumerate(rates)
    ]
    optimizer = make([group for group in groups if group["params"]], **arguments)
    return net, wrapped(net, optimizer, program.options)


def wrapped(net: Net, optimizer: torch.optim.Optimizer, options: Spec) -> gradsurg.MultiTaskOptimizer:
    """Wrap an optimizer with the options of a program."""
    given = dict(options)
    if given.get("shared") == "trunk":
        given["shared"] = net.trunk()
    return gradsurg.wrap(optimizer, **given)


def draw_optimizer(rng: random.Random, model: Spec) -> Spec:
    sparse = model.get("front") == "sparse"
    name = rng.choice(("SGD", "Adagrad") if sparse else tuple(OPTIMIZERS))
    optimizer: Spec = {"name": name, "lr": rng.choice((0.01, 0.1))}
    for option, values in OPTIMIZERS[name].items():
        coin(rng, optimizer, 0.3, option, *values)
    if optimizer.get("nesterov"):  # SGD takes it with momentum alone
        optimizer["momentum"] = 0.9
        optimizer.pop("dampening", None)
    if not sparse:
        coin(rng, optimizer, 0.3, "weight_decay", 0.1)
        # torch's fused SGD raises if a parameter gets its first momentum later than others.
        fused = model.get("front") != "complex" and name != "RMSprop" and "momentum" not in optimizer
        ways = ("foreach", "fused") if fused else ("foreach",)
        coin(rng, optimizer, 0.4, rng.choice(ways), True)
    coin(rng, optimizer, 0.5, "rates", (1.0, 1.0), (1.0, 0.1), (1.0, 0.3, 0.1), (0.0, 1.0), (1.0, 0.0))
    return optimizer


# -- the options of wrap() -----------------------------------------------------------------------------------------


def draw_options(rng: random.Random, tasks: tuple[str, ...]) -> Spec:
    options: Spec = {}
    methods = gradsurg.methods()
    coin(rng, options, 0.4, "surgery", *(m.name for m in methods if m.kind == "surgery"))
    coin(rng, options, 0.4, "normalize", *(m.name for m in methods if m.kind == "normalizer"))
    coin(rng, options, 0.1, "guarantee", "gradient", "none", "update")
    coin(rng, options, 0.15, "preferences", {"a": 0.3})
    coin(rng, options, 0.15, "primary", "a", [["a"], ["b"]])
    coin(rng, options, 0.4 if "primary" in options else 0, "auxiliary", "help")
    coin(rng, options, 0.1, "margin", 0.2, {"a": 0.5})
    coin(rng, options, 0.2, "granularity", "group", "tensor")
    coin(rng, options, 0.15, "tasks", list(tasks))
    coin(rng, options, 0.15, "shared", "trunk")
    coin(rng, options, 0.1, "row_dtype", torch.bfloat16)
    coin(rng, options, 0.4, "nonfinite", "skip_task", "raise")
    coin(rng, options, 0.3, "atomic", True)
    coin(rng, options, 0.2, "batched", True)
    coin(rng, options, 0.3, *rng.choice((("rotate", 1, 2), ("refresh_every", 2, 3))))
    return options


# -- what the user does --------------------------------------------------------------------------------------------

WAYS = ("total", "total", "backward", "functions", "task", "set_gradients", "closure", "features", "two totals")
FAILURES = ("broken", "function", "block", "hook", "pre hook", "step", "half way", "closure", "argument")


def draw_step(rng: random.Random, model: Spec, options: Spec) -> Spec:
    """Return how gradients come in and what is done to them; see Side.bring and Side.change."""
    names = TASKS[: model["tasks"]]
    cheap = "rotate" in options or "refresh_every" in options
    # What the options refuse is drawn too, but seldom.
    ways = ("total", "backward", "closure") if cheap and rng.random() < 0.9 else WAYS
    step: Spec = {"way": rng.choice(ways), "batch": rng.randrange(1000)}
    coin(rng, step, 0.3, "tasks", tuple(name for name in names if rng.random() < 0.6) or names[-1:])
    coin(rng, step, 0.3, "absent", True)
    coin(rng, step, 0.3, "micro", 2, 3)
    coin(rng, step, 0.5 if "micro" in step else 0, "gather", "but last", "all")
    coin(rng, step, 0.2, "scale", 0.5, 1024.0)
    coin(rng, step, 0.2, "plain", True)
    coin(rng, step, 0.6, "clear", "zeros", "model", "by hand", "no")
    coin(rng, step, 0.5, "change", "clip", "half", "mask", "rows", "masked copy", "none of one")
    coin(rng, step, 0.1, "preferences", {"a": 2.0}, {"a": 0.0})
    coin(rng, step, 0.2, "added", True)
    return step


def draw_action(rng: random.Random, model: Spec, options: Spec) -> tuple[str, Spec]:
    """Return one thing that a user does between, or instead of, the steps of a training."""
    step = draw_step(rng, model, options)
    kind = rng.choice(("train", "train", "train", "skip", "fail", "fail", "reload", "freeze", "rate", "nan"))
    if kind == "fail":
        return kind, {"where": rng.choice(FAILURES), **step}
    if kind == "reload":
        return kind, {"how": rng.choice(("state_dict", "deepcopy", "bare"))}
    if kind == "freeze":
        return kind, {"number": rng.randrange(12), "clear": rng.random() < 0.5}
    if kind == "rate":
        return kind, {"factor": rng.choice((0.0, 0.5, 2.0))}
    return kind, step
