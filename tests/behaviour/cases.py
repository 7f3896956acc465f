"""The training runs whose results are recorded: ways to hand over gradients, optimizers, and a table of the runs.

Only the public interface of gradsurg is used, so that any version of the library can do these runs. A run must not be
changed once it is recorded; new ones may be added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, SparseAdam

import gradsurg
from tests.behaviour.nets import TASKS, Model, Point, Turns, Words, crowd, large, perceptron, picture_reader

# -- ways in which the gradients of one step come in ----------------------------------------------------------------

Way = Callable[[Any, Any, int], None]


def total(optimizer: Any, model: Any, batch: int) -> None:
    optimizer.total(model.losses(batch)).backward()


def backward(optimizer: Any, model: Any, batch: int) -> None:
    optimizer.backward(model.losses(batch))


def functions(optimizer: Any, model: Model, batch: int) -> None:
    optimizer.backward({name: functools.partial(_alone, model, name, batch) for name in model.heads})


def _alone(model: Model, name: str, batch: int) -> Tensor:
    return model.loss(name, model.features(batch), batch)


def task(optimizer: Any, model: Model, batch: int) -> None:
    for name in model.heads:
        with optimizer.task(name):
            _alone(model, name, batch).backward()


def set_gradients(optimizer: Any, model: Any, batch: int) -> None:
    parameters = list(model.parameters())
    optimizer.set_gradients(
        {
            name: torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            for name, loss in model.losses(batch).items()
        }
    )


def accumulation(optimizer: Any, model: Any, batch: int) -> None:
    for part in range(3):
        (optimizer.total(model.losses(3 * batch + part)) / 3).backward()


def late_accumulation(optimizer: Any, model: Any, batch: int) -> None:
    with optimizer.accumulate():
        (optimizer.total(model.losses(2 * batch)) / 2).backward()
    (optimizer.total(model.losses(2 * batch + 1)) / 2).backward()


def features(optimizer: Any, model: Model, batch: int) -> None:
    z = model.features(batch)
    optimizer.total({name: model.loss(name, z, batch) for name in model.heads}, features=z).backward()


def penalised_and_clipped(optimizer: Any, model: Any, batch: int) -> None:
    penalty = 0.01 * sum(p.square().sum() for p in model.parameters())
    optimizer.total(model.losses(batch), plain=penalty).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def some_absent(optimizer: Any, model: Any, batch: int) -> None:
    """Leave out one task in steps 1, 4, … and two tasks in steps 2, 5, …."""
    present = TASKS[: 3 - batch % 3]
    optimizer.total({n: loss if n in present else None for n, loss in model.losses(batch).items()}).backward()


def one_infinite(optimizer: Any, model: Any, batch: int) -> None:
    losses = model.losses(batch)
    optimizer.total({**losses, "left": losses["left"] * (float("inf") if batch == 2 else 1.0)}).backward()


def opposed(optimizer: Any, model: Any, batch: int) -> None:
    """From step 2 on, let two tasks want opposite things: the direction is zero, and momentum alone moves."""
    losses = model.losses(batch)
    optimizer.total(losses if batch < 2 else {"left": losses["left"], "right": -losses["left"]}).backward()


# -- optimizers ----------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, lr: float = 0.05, **options: Any) -> Optimizer:
    return SGD(model.parameters(), lr=lr, momentum=0.9, **options)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=0.02)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def rmsprop(model: nn.Module) -> Optimizer:
    return RMSprop(model.parameters(), lr=0.01, momentum=0.9)


def sparse_adam(model: nn.Module) -> Optimizer:
    return SparseAdam(list(model.parameters()), lr=0.02)


def grouped_adam(model: Model) -> Optimizer:
    first, second = model.shared[0], model.shared[2]  # type: ignore[index]
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.05}]
    return Adam([*groups, {"params": model.heads.parameters()}], lr=0.02)


def two(model: Model) -> list[Optimizer]:
    return [SGD(model.shared.parameters(), lr=0.05, momentum=0.9), Adam(model.heads.parameters(), lr=0.02)]


# -- the runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        options: What wrap() is given beside the optimizer.
        optimizer: Model -> optimizer, or a list of them that are wrapped together.
        model: Builds the model.
        way: How the gradients of a step come in.
        steps: The number of steps.
        dtype: The dtype of the model.
        brief: Of gradients and parameters, record a hash and a sample instead of every number.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], Any] = adam
    model: Callable[[], nn.Module] = perceptron
    way: Way = total
    steps: int = 6
    dtype: torch.dtype = torch.float32
    brief: bool = False

    def start(self) -> tuple[nn.Module, list[Any]]:
        """Return a new model and its wrapped optimizers."""
        torch.manual_seed(0)
        model = self.model()
        if self.dtype != torch.float32:
            model = model.to(self.dtype)
        made = self.optimizer(model)
        wrapped = gradsurg.wrap(made, **self.options)
        return model, wrapped if isinstance(wrapped, list) else [wrapped]


MANY = functools.partial(crowd, 17)  # tasks; surgeries compute otherwise with more than 16

# In the order of gradsurg.methods(); cone and norm are the defaults.
SURGERIES = (
    *("sum", "mean", "upgrad", "mgda", "pcgrad", "gradvac", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl"),
    *("config", "sdmgrad", "modo", "cr_mogm", "excess_mtl", "pcd", "krum", "trimmed_mean", "graddrop", "random"),
)
OF_MANY = ("cone", "upgrad", "mgda", "cagrad", "imtl_g", "nash_mtl", "aligned_mtl", "config")
NORMALIZERS = (
    *("none", "loss", "initial_loss", "generalized_mean", "dwa", "uncertainty", "gradnorm", "famo", "random"),
    *("imtl_l", "tchebycheff", "stch"),
)

RUNS: dict[str, Run] = {
    "default, SGD with momentum": Run(optimizer=sgd),
    "default, Adam": Run(),
    "default, AdamW": Run(optimizer=adamw),
    "default, RMSprop": Run(optimizer=rmsprop),
    "float64": Run(dtype=torch.float64),
    "complex": Run(model=Turns),
    "convolutions": Run(model=picture_reader, optimizer=adamw, brief=True),
    "large": Run(model=large, optimizer=adamw, steps=3, brief=True),
    "large, SGD": Run(model=large, optimizer=sgd, steps=3, brief=True),
    "26 tasks": Run(model=functools.partial(crowd, 26), optimizer=adamw, steps=3, brief=True),
    "sparse embedding, SparseAdam": Run(model=functools.partial(Words, False), optimizer=sparse_adam),
    "sparse embedding, SGD": Run(model=functools.partial(Words, True), optimizer=sgd),
    "backward": Run(way=backward),
    "functions": Run(way=functions),
    "task blocks": Run({"tasks": TASKS}, way=task),
    "task blocks, undeclared": Run(way=task),
    "set_gradients": Run(way=set_gradients),
    "accumulation": Run(way=accumulation),
    "accumulate()": Run(way=late_accumulation),
    "features": Run(way=features),
    "penalty and clipping": Run(way=penalised_and_clipped),
    "absent tasks": Run(way=some_absent),
    "skip_task": Run({"nonfinite": "skip_task"}, way=one_infinite),
    "opposed tasks": Run(optimizer=sgd, way=opposed),
    "no way out": Run(optimizer=sgd, model=Point),
    "tiny steps": Run(optimizer=functools.partial(sgd, lr=1e-6)),
    "protect": Run({"primary": "right"}),
    "help": Run({"primary": "right", "auxiliary": "help"}),
    "levels": Run({"primary": [["whole"], ["left"]], "auxiliary": "help"}),
    "preferences": Run({"preferences": {"left": 0.3, "whole": 2.0}}),
    "margin": Run({"margin": {"left": 0.2, "right": 0.05}}),
    "by tensor": Run({"granularity": "tensor"}),
    "by group": Run({"granularity": "group"}, optimizer=grouped_adam),
    "rotate": Run({"rotate": 1}, optimizer=adamw, steps=8),
    "refresh_every": Run({"refresh_every": 3}, optimizer=adamw, steps=8),
    "batched": Run({"batched": True}),
    "guarantee of the gradient": Run({"guarantee": "gradient"}, optimizer=sgd),
    "no guarantee": Run({"guarantee": "none", "surgery": "pcgrad", "seed": 7}),
    "atomic": Run({"atomic": True}),
    "two optimizers": Run(optimizer=two),
    "maximize": Run(optimizer=functools.partial(sgd, maximize=True)),
    "rows in bfloat16": Run({"row_dtype": torch.bfloat16}),
    "dwa and sdmgrad": Run({"normalize": "dwa", "surgery": "sdmgrad"}, optimizer=adamw, steps=8),
    **{f"surgery {name}": Run({"surgery": name, "seed": 3}, brief=True) for name in SURGERIES},
    **{f"{name} of many": Run({"surgery": name, "seed": 3}, model=MANY, steps=2, brief=True) for name in OF_MANY},
    **{f"normalize {name}": Run({"normalize": name}, sgd, brief=True) for name in NORMALIZERS},
}

# The runs of which a checkpoint is kept, and the number of steps that were done by then.
CHECKPOINTS: dict[str, int] = {
    "default, AdamW": 3,
    "rotate": 4,
    "refresh_every": 4,  # one step after new weights were found, two before the next ones are
    "dwa and sdmgrad": 4,
    "two optimizers": 3,
    "surgery excess_mtl": 3,
    "normalize famo": 3,
}
