"""What the ranks do under DDP; each job has a twin that sees the whole batch in one process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import nets

NETS = {"net": nets.Net, "shared": nets.Shared}


def ddp_of(model: nn.Module, **options: Any) -> nn.Module:
    options = {"find_unused_parameters": False, **options}
    return DistributedDataParallel(model, **options)


def one_backward(optimizer: Any, form: str, model: nn.Module, data: Any) -> None:
    if form == "total":
        optimizer.total(model(*data)).backward()
    elif form == "backward":
        optimizer.backward(model(*data))
    else:
        for name in list(model(*data)):
            with optimizer.task(name):
                model(*data)[name].backward()


def train(model: nn.Module, optimizer: Any, form: str, part: Any, steps: int = nets.STEPS) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        one_backward(optimizer, form, model, part(nets.batch(step)))
        optimizer.step()


def steps(net: str, form: str, ddp: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = ddp_of(nets.build(NETS[net]), **ddp)
    optimizer = nets.optimizer_of(model, **options)
    train(model, optimizer, form, nets.mine)
    return nets.state_of(model), optimizer.report


def steps_alone(net: str, form: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = nets.build(NETS[net])
    optimizer = nets.optimizer_of(model, **options)
    train(model, optimizer, form, lambda data: data)
    return nets.state_of(model), optimizer.report


# -- who has which task -------------------------------------------------------------------------------------------

PRESENCE = [  # of every step and rank (modulo 2): the tasks that it has
    [("task0", "task1", "task2"), ("task0", "task1", "task2")],
    [("task0", "task1"), ("task1", "task2")],
    [("task2",), ("task1", "task0")],  # in another order, and none in common
    [("task2", "task0"), ("task0", "task2", "task1")],
    [(), ("task1", "task0")],  # a rank without any
    [("task1",), ()],
    [("task0", "task1", "task2"), ("task0", "task1", "task2")],
]


def uneven(form: str) -> tuple[dict[str, Tensor], Any, Any]:
    """Every rank has some of the tasks, in some order."""
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model)
    for step, presence in enumerate(PRESENCE):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        present = {name: losses[name] for name in presence[dist.get_rank() % 2]}
        getattr(optimizer, form)(present) if form == "backward" else optimizer.total(present).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report, optimizer.state_dict()["param_groups"][0]["gradsurg"]


def skipping(options: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Rank 0 lacks the second task, which is infinite in the first micro-batch of rank 1."""
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model, nonfinite="skip_task", **options)
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(2):
            with optimizer.accumulate() if micro == 0 else nullcontext():
                losses = model(*nets.mine(nets.batch(10 * step + micro)))
                if dist.get_rank() == 0:
                    losses.pop("task1")
                elif micro == 0:
                    losses["task1"] = losses["task1"] * float("inf")
                optimizer.total(losses).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report.tasks, optimizer.report.nonfinite


def without_any(form: str) -> tuple[list[str], dict[str, Tensor]]:
    """Return what every rank raises where none has a task, and the state after two micro-batches of rank 0 alone."""
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model)
    nobody = [{}, {"task0": None}, {"task0": torch.zeros(())}]
    messages = [_message(optimizer, form, losses) for losses in nobody]
    for micro in range(2):
        with optimizer.accumulate():
            losses = model(*nets.mine(nets.batch(micro))) if dist.get_rank() == 0 else {}
            optimizer.backward(losses) if form == "backward" else optimizer.total(losses).backward()
    optimizer.step()  # does the surgery that accumulate() put off
    return messages, nets.state_of(model)


def _message(optimizer: Any, form: str, losses: dict[str, Any]) -> str:
    try:
        optimizer.backward(losses) if form == "backward" else optimizer.total(losses).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def without_any_alone(ranks: int) -> dict[str, Tensor]:
    model = nets.build()
    optimizer = nets.optimizer_of(model)
    for micro in range(2):
        with optimizer.accumulate():
            losses = model(*nets.mine(nets.batch(micro), 0, ranks))
            optimizer.backward({name: loss / ranks for name, loss in losses.items()})
    optimizer.step()
    return nets.state_of(model)


def named_later(options: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The first batch of rank 0 lacks two tasks, the first of rank 1 another, though options name them."""
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model, **options)
    for step, presence in enumerate(PRESENCE[2:4]):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        optimizer.total({name: losses[name] for name in presence[dist.get_rank()]}).backward()
        try:
            optimizer.step()
        except UserWarning as warning:  # the workers make errors of them
            return nets.state_of(model), str(warning)
    return nets.state_of(model), ""


def uneven_alone(ranks: int, first: int = 0, last: int = 7, **options: Any) -> dict[str, Tensor]:
    """A rank without the task counts as a loss of 0 in the mean."""
    model = nets.build()
    optimizer = nets.optimizer_of(model, **options)
    for step, presence in enumerate(PRESENCE[first:last]):
        optimizer.zero_grad()
        parts = [model(*nets.mine(nets.batch(step), rank, ranks)) for rank in range(ranks)]
        names = dict.fromkeys(name for rank in range(ranks) for name in presence[rank % 2])
        losses = {
            name: sum(parts[rank][name] for rank in range(ranks) if name in presence[rank % 2]) / ranks
            for name in names
        }
        optimizer.backward(losses)
        optimizer.step()
    return nets.state_of(model)


# -- gradients that take no part in surgery -----------------------------------------------------------------------


def plain(model: nn.Module, optimizer: Any, how: str, part: Any) -> None:
    outside = None
    if how == "outside":  # the heads are DDP's, but another optimizer's
        heads = [p for name, p in model.named_parameters() if "heads" in name]
        outside = torch.optim.SGD(heads, lr=0.05)
    for step in range(3):
        model.zero_grad()
        data = part(nets.batch(step))
        losses = model(*data)
        penalty = (data[0].mean() + 1) * sum(p.square().sum() for p in model.parameters() if p.ndim > 1)
        if how == "argument":
            optimizer.total(losses, plain=penalty).backward()
        elif how == "added":
            (optimizer.total(losses) + penalty).backward()
        elif how == "added first":  # built before total(), so that its backward pass runs after the tasks'
            (penalty + optimizer.total(losses)).backward()
        elif how == "built later":
            total = optimizer.total(losses)
            (total + (data[0].mean() + 1) * sum(p.square().sum() for p in model.parameters())).backward()
        elif how == "outside":
            optimizer.total(losses).backward()
        elif how == "mixed" and step == 1:
            sum(losses.values()).backward()  # a plain step of DDP's own, between two of ours
        else:
            optimizer.total(losses).backward()
        optimizer.step()
        if outside is not None:
            outside.step()


def plain_of(model: nn.Module, how: str) -> Any:
    if how == "outside":
        trunk = [p for name, p in model.named_parameters() if "trunk" in name]
        import gradsurg

        return gradsurg.wrap(torch.optim.AdamW(trunk, lr=0.02))
    return nets.optimizer_of(model)


def with_plain(how: str, flags: dict[str, Any]) -> dict[str, Tensor]:
    model = ddp_of(nets.build(nets.Shared if how == "mixed" else nets.Net), **flags)
    plain(model, plain_of(model, how), how, nets.mine)
    return nets.state_of(model)


def with_plain_alone(how: str) -> dict[str, Tensor]:
    model = nets.build(nets.Shared if how == "mixed" else nets.Net)
    plain(model, plain_of(model, how), how, lambda data: data)
    return nets.state_of(model)


def turns(plan: str, model: nn.Module, optimizer: Any, part: Any) -> None:
    """One step per letter: T a total of all tasks, t of the first two, P and p a plain sum of them."""
    for step, turn in enumerate(plan):
        optimizer.zero_grad()
        losses = model(*part(nets.batch(step)))
        losses = losses if turn in "TP" else dict(list(losses.items())[:2])
        total = getattr(optimizer, "total", None)
        (total(losses) if total is not None and turn in "Tt" else sum(losses.values())).backward()
        optimizer.step()


def in_turns(plan: str, flags: dict[str, Any]) -> dict[str, Tensor]:
    model = ddp_of(nets.build(), **flags)
    turns(plan, model, nets.optimizer_of(model, "SGD", surgery="sum", normalize="none", guarantee="none"), nets.mine)
    return nets.state_of(model)


def in_turns_alone(plan: str) -> dict[str, Tensor]:
    """Plain torch: the surgery is that of a plain sum."""
    model = nets.build()
    turns(plan, model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), lambda data: data)
    return nets.state_of(model)


# -- what surrounds a model ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    """BatchNorm has buffers, and dropout random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.norm(self.first(x)))
        return {f"task{i}": (head(z) - y[:, i]).square().mean() for i, head in enumerate(self.heads)}


def buffers() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what plain DDP does with the sum of the losses, and what we do where surgery changes nothing."""
    states = []
    for ours in (False, True):
        model = ddp_of(nets.build(Normed))
        if ours:
            optimizer = nets.optimizer_of(model, surgery="sum", normalize="none", guarantee="none")
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for step in range(4):
            optimizer.zero_grad()
            losses = model(*nets.mine(nets.batch(step)))
            (optimizer.total(losses) if ours else sum(losses.values())).backward()
            optimizer.step()
        states.append(nets.state_of(model))
    return states[0], states[1]


def scaled(overflow: bool) -> tuple[dict[str, Tensor], float]:
    """GradScaler; in the second step one rank's gradient overflows."""
    model = ddp_of(nets.build())
    optimizer = nets.optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        if overflow and step == 1 and dist.get_rank() == 1:
            losses["task1"] = losses["task1"] * float("inf")
        scaler.scale(optimizer.total(losses)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return nets.state_of(model), scaler.get_scale()


def scaled_alone(overflow: bool) -> dict[str, Tensor]:
    model = nets.build()
    optimizer = nets.optimizer_of(model)
    for step in range(3):
        if overflow and step == 1:
            continue
        optimizer.zero_grad()
        optimizer.total(model(*nets.batch(step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return nets.state_of(model)


class Checkpointed(nets.Net):
    reentrant = True

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        from torch.utils.checkpoint import checkpoint

        z = torch.tanh(checkpoint(self.trunk, x.requires_grad_(), use_reentrant=self.reentrant))
        return {f"task{i}": (head(z) - y[:, i]).square().mean() for i, head in enumerate(self.heads)}


class CheckpointedAnew(Checkpointed):
    reentrant = False


class Complex(nets.Net):
    """A complex layer beside real ones, with odd numbers of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64) / 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = x.to(torch.complex64) @ self.layer
        return super().forward(z.real + z.imag, y)


class Compiled(nets.Net):
    def __init__(self) -> None:
        super().__init__()
        self.trunk.compile(backend="aot_eager")


class Adapter(nets.Net):
    """An adapter as of LoRA: the gradient of its first half begins with zero, and weight decay shrinks it even then."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.zeros(2, 5))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return super().forward(x + x @ self.down @ self.up, y)


KINDS = {
    "reentrant": Checkpointed,
    "non-reentrant": CheckpointedAnew,
    "compiled": Compiled,
    "compiled whole": nets.Net,
    "compiled adapter": Adapter,
    "complex": Complex,
}


def special(kind: str) -> dict[str, Tensor]:
    model = ddp_of(nets.build(KINDS[kind]))
    if kind in ("compiled whole", "compiled adapter"):
        model = torch.compile(model, backend="aot_eager")
    train(model, nets.optimizer_of(model), "total", nets.mine)
    return nets.state_of(model)


def special_alone(kind: str) -> dict[str, Tensor]:
    model = nets.build(KINDS[kind])
    train(model, nets.optimizer_of(model), "total", lambda data: data)
    return nets.state_of(model)
