"""Promises over ranks: bytes on the wire, the guarantee, methods, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradsurg
from tests.distributed import nets


def spread(model: nn.Module, kind: str) -> nn.Module:
    """Return the model under DDP, or sharded by FSDP2; of one process, as it is."""
    from torch.distributed.fsdp import fully_shard

    if kind == "fsdp2":
        for child in model.children():
            if not isinstance(child, nn.ModuleList):
                fully_shard(child)
        return fully_shard(model)
    return DistributedDataParallel(model) if dist.is_initialized() and dist.get_world_size() > 1 else model


def reached(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers all tasks share, and how many only one of them has."""
    parts = {"trunk": 0, "heads": 0}
    for name, p in model.named_parameters():
        for part in parts:
            parts[part] += p.numel() if f"{part}." in name else 0
    return parts["trunk"], parts["heads"]


class Wide(nets.Net):
    def __init__(self) -> None:
        super().__init__(tasks=3, width=200)


def wire(guarantee: str) -> dict[str, Any]:
    """Return what one step sends, once the ranks know what each task reaches."""
    model = DistributedDataParallel(nets.build(Wide))
    optimizer = nets.optimizer_of(model, guarantee=guarantee)
    for step in range(3):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        with nets.counting() as record:
            optimizer.total(losses).backward()
            optimizer.step()
    movement = optimizer.report.movement
    return {
        "record": record,
        "numbers": reached(model),
        "corrected": movement is not None and movement.corrected,
    }


def flight() -> list[str]:
    """Return in which order backward passes and collectives begin, and when the first is waited for."""
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model, guarantee="gradient")
    events: list[str] = []
    scatter = dist.reduce_scatter_single

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self, *arguments: Any) -> Any:
            events.append("wait")
            return self.work.wait(*arguments)

    def watched(*arguments: Any, **keywords: Any) -> Any:
        assert keywords["async_op"]
        events.append("send")
        return Work(scatter(*arguments, **keywords))

    for step in range(2):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        for name, loss in losses.items():
            loss.register_hook(lambda _, name=name: events.append(name))
        dist.reduce_scatter_single = watched
        try:
            events.clear()
            optimizer.total(losses).backward()
        finally:
            dist.reduce_scatter_single = scatter
    return events


def movement(surgery: str, kind: str) -> float:
    """Return the smallest cosine between the real movement and a task's gradient over the whole batch."""
    model = spread(nets.build(nets.Shared), kind)
    optimizer = nets.optimizer_of(model, surgery=surgery)
    worst = 1.0
    for step in range(5):
        old = nets.state_of(model)
        twin = nets.build(nets.Shared)
        twin.load_state_dict(old)
        parameters, losses = list(twin.parameters()), twin(*nets.batch(step)).values()
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        rows = [torch.cat([g.flatten() for g in each]) for each in gradients]
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
        new = nets.state_of(model)
        d = torch.cat([(old[name] - new[name]).flatten() for name in old]).double()
        if d.norm() > 0:
            worst = min(worst, *(float(torch.nn.functional.cosine_similarity(d, row.double(), dim=0)) for row in rows))
    return worst


def method(options: dict[str, Any], kind: str = "ddp") -> tuple[dict[str, Tensor], Any, Any]:
    """Return the parameters, the report and, of the state dict, what a sharded rank has of it too."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, "SGD", **options)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
    state = optimizer.state_dict()
    return nets.state_of(model), optimizer.report, state if kind == "ddp" else state["param_groups"]


def method_alone(options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = nets.build()
    optimizer = nets.optimizer_of(model, "SGD", **options)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.total(model(*nets.batch(step))).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report


def two_optimizers(kind: str) -> dict[str, Tensor]:
    """Return what two optimizers, of trunk and heads, make that share their rows."""
    model = spread(nets.build(), kind)
    optimizers = pair_of(model)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[0].total(model(*nets.mine(nets.batch(step)))).backward()
        for optimizer in optimizers:
            optimizer.step()
    return nets.state_of(model)


def two_optimizers_alone() -> dict[str, Tensor]:
    model = nets.build()
    optimizers = pair_of(model)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[0].total(model(*nets.batch(step))).backward()
        for optimizer in optimizers:
            optimizer.step()
    return nets.state_of(model)


def pair_of(model: nn.Module) -> Any:
    """Return two wrapped optimizers: of the first layer, and of the others."""
    named = list(model.named_parameters())
    first = [p for name, p in named if "trunk.0" in name]
    others = [p for name, p in named if "trunk.0" not in name]
    return gradsurg.wrap([torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(others, lr=0.02)])


# -- checkpoints --------------------------------------------------------------------------------------------------


def checkpointed(
    kind: str, folder: str, first: int, last: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """Train steps first … last of a run, from the checkpoint of an earlier part and into one, through DCP."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = spread(nets.build(nets.Shared), kind)
    optimizer = nets.optimizer_of(model, **options)
    if first:
        parts = get_state_dict(model, optimizer)
        state = {"model": parts[0], "optimizer": parts[1]}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(first, last):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
    if not first:
        optimizer.zero_grad()
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    return nets.state_of(model), optimizer.param_groups[0]["gradsurg"]


def functions() -> dict[str, Tensor]:
    """Functions instead of losses: the forward passes of DDP run inside of ours."""
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        data = nets.mine(nets.batch(step))
        optimizer.backward({f"task{i}": lambda i=i, data=data: model(*data)[f"task{i}"] for i in range(3)})
        optimizer.step()
    return nets.state_of(model)


def without_reset() -> dict[str, Tensor]:
    """A torch without reducer._reset_state: hooks on the DDP module, registered by wrap()."""
    from gradsurg.distributed import ddp_reducer as reducer

    reducer.RESET, kept = "_no_such_method", reducer.RESET
    try:
        model = DistributedDataParallel(nets.build())
        optimizer = nets.optimizer_of(model, model=model)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
            optimizer.step()
    finally:
        reducer.RESET = kept
    return nets.state_of(model)
