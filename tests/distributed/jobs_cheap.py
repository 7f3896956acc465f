"""The cheap modes over ranks; each job has a twin that sees the whole batch in one process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import nets
from tests.distributed.jobs_promises import reached
from tests.distributed.jobs_refusals import Broken

STEPS = 5
KINDS = ["ddp", "find unused", "static", "fsdp2"]


class Featured(nets.Net):
    """Keeps the features, for features=; DDP may hand out others behind its own node."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.z = torch.tanh(self.trunk(x))
        heads = enumerate(self.heads)
        return {f"task{i}": (1 + 3 * i) * (head(self.z) - y[:, i]).square().mean() for i, head in heads}


def spread(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp2":
        fully_shard(model.trunk)
        return fully_shard(model)
    flags = {"find unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}
    return DistributedDataParallel(model, **flags.get(kind, {}))


def train(model: nn.Module, optimizer: Any, form: str, part: Any) -> list[str]:
    """Return at which level each step was done."""
    levels = []
    net, scaler = getattr(model, "module", model), torch.amp.GradScaler("cpu", init_scale=8.0)

    def run(data: Any, plain: Tensor | None = None) -> Tensor | None:
        losses = model(*data)
        options = {"features": net.z} if isinstance(net, Featured) else {}
        if form == "backward":
            return optimizer.backward(losses, **options)
        return optimizer.total(losses, plain=plain, **options)

    for step in range(STEPS):
        optimizer.zero_grad()
        data = part(nets.batch(step))
        if form in ("micro-batches", "accumulate"):
            for micro in range(2):
                with waiting(model, optimizer, form) if micro == 0 else nullcontext():
                    (run(part(nets.batch(10 * step + micro))) / 2).backward()
        elif form == "backward":
            run(data)
        elif form == "scaled":
            scaler.scale(run(data)).backward()
            scaler.unscale_(optimizer)
        elif form == "plain":
            run(data, penalty(model, data)).backward()
        elif form == "added":
            total = run(data)
            (total + penalty(model, data)).backward()
        else:
            run(data).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer) if form == "scaled" else optimizer.step()
        if form == "scaled":
            scaler.update()
        levels.append(optimizer.report.level)
    return levels


def penalty(model: nn.Module, data: Any) -> Tensor:
    """Return something of the parameters that differs between ranks, and whose mean is that of the whole batch."""
    return (data[0].mean() + 1) * sum(p.square().sum() for name, p in model.named_parameters() if "unused" not in name)


def waiting(model: nn.Module, optimizer: Any, form: str) -> Any:
    if form == "accumulate":
        return optimizer.accumulate()
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def cheap(
    kind: str, form: str, options: dict[str, Any], features: bool = False
) -> tuple[dict[str, Tensor], list[str], Any, list[Any]]:
    model = spread(nets.build(Featured if features else nets.Net), kind)
    optimizer = nets.optimizer_of(model, **options)
    with nets.counting() as record:
        levels = train(model, optimizer, form, nets.mine)
    report = optimizer.report
    losses = {name: float(loss) for name, loss in report.losses.items()}
    return nets.state_of(model), levels, (losses, report.weights), record


def cheap_alone(form: str, options: dict[str, Any], features: bool = False) -> tuple[dict[str, Tensor], list[str], Any]:
    model = nets.build(Featured if features else nets.Net)
    optimizer = nets.optimizer_of(model, **options)
    levels = train(model, optimizer, form, lambda data: data)
    report = optimizer.report
    return nets.state_of(model), levels, ({name: float(loss) for name, loss in report.losses.items()}, report.weights)


# -- steps that do not go as planned ------------------------------------------------------------------------------


def lacking(options: dict[str, Any]) -> tuple[dict[str, Tensor], list[str], Any]:
    """In the third step, rank 1 has no second task."""
    model = spread(nets.build(), "ddp")
    optimizer = nets.optimizer_of(model, **options)
    levels = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        if step == 2 and dist.get_rank() == 1:
            losses.pop("task1")
        optimizer.total(losses).backward()
        optimizer.step()
        levels.append(optimizer.report.level)
    return nets.state_of(model), levels, gradsurg_entry(optimizer)


def gradsurg_entry(optimizer: Any) -> Any:
    """Return what a state dict says of the surgery."""
    from gradsurg.optimizer.checkpoint import unsealed

    return unsealed(optimizer.state_dict(), "none")[0]["param_groups"][0]["gradsurg"]


def failing(options: dict[str, Any], features: bool) -> tuple[list[str], dict[str, Tensor]]:
    """In the third step, rank 1 raises in its backward pass."""
    model = spread(nets.build(Featured), "ddp")
    optimizer = nets.optimizer_of(model, **options)
    messages = []
    for step in range(4):
        losses = model(*nets.mine(nets.batch(step)))
        more = {"features": model.module.z} if features else {}
        if step == 2 and dist.get_rank() == 1:
            losses["task1"] = Broken.apply(losses["task1"])
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        try:
            optimizer.total(losses, **more).backward()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
            for p, old in zip(model.parameters(), before, strict=True):
                assert (p.grad is None and old is None) or torch.equal(p.grad, old)
            continue
        optimizer.step()
        if step > 1:
            optimizer.zero_grad()  # in the third step, something stands in p.grad that has to stay as it is
    return messages, nets.state_of(model)


def wire(options: dict[str, Any]) -> tuple[list[tuple[str, int]], str, int, int]:
    """Return what the third step sends, at which level it was done, and how many numbers tasks share, and do not."""

    class Wide(Featured):
        def __init__(self) -> None:
            super().__init__(tasks=3, width=200)

    model = DistributedDataParallel(nets.build(Wide))
    optimizer = nets.optimizer_of(model, **options)
    for step in range(3):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        with nets.counting() as record:
            optimizer.total(losses, features=None if options else model.module.z).backward()
            optimizer.step()
    return record, optimizer.report.level, *reached(model)
