"""Promises over ranks: bytes on the wire, the guarantee, methods, checkpoints, refusals and failures."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from distributed import nets
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradsurg


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


def movement(surgery: str) -> float:
    """Return the smallest cosine between the real movement and a task's gradient over the whole batch."""
    model = DistributedDataParallel(nets.build(nets.Shared))
    optimizer = nets.optimizer_of(model, surgery=surgery)
    worst = 1.0
    for step in range(5):
        twin = nets.build(nets.Shared)
        twin.load_state_dict(model.module.state_dict())
        parameters, losses = list(twin.parameters()), twin(*nets.batch(step)).values()
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        rows = [torch.cat([g.flatten() for g in each]) for each in gradients]
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
        d = (before - torch.cat([p.detach().flatten() for p in model.parameters()])).double()
        if d.norm() > 0:
            worst = min(worst, *(float(torch.nn.functional.cosine_similarity(d, row.double(), dim=0)) for row in rows))
    return worst


def method(options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model, "SGD", **options)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report


def method_alone(options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = nets.build()
    optimizer = nets.optimizer_of(model, "SGD", **options)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.total(model(*nets.batch(step))).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report


# -- checkpoints --------------------------------------------------------------------------------------------------


def checkpointed(
    kind: str, folder: str, first: int, last: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """Train steps first … last of a run, from the checkpoint of an earlier part and into one, through DCP."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = nets.build(nets.Shared)
    if kind == "fsdp2":
        fully_shard(model.body)
        fully_shard(model)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
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


# -- refusals -----------------------------------------------------------------------------------------------------


def refused(what: str) -> str:
    """Return the message of the error."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it uses itself
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = nets.build()
    data = nets.mine(nets.batch(0))
    try:
        if what == "plain parameters":
            nets.optimizer_of(model).total(model(*data))
        elif what == "model= of another model":
            other = nets.build()
            nets.optimizer_of(model, model=other).total(model(*data))
        elif what == "fsdp1":
            sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
            optimizer = nets.optimizer_of(sharded)
            optimizer.total(sharded(*data))
        elif what == "fsdp1 as model=":
            nets.optimizer_of(model, model=FullyShardedDataParallel(model, device_id=torch.device("cpu")))
        elif what == "zero":
            gradsurg.wrap(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
        elif what == "sparse":
            table = DistributedDataParallel(nn.Embedding(4, 2, sparse=True))
            optimizer = gradsurg.wrap(torch.optim.SGD(table.parameters(), lr=0.1))
            out = table(torch.arange(4))
            optimizer.total([out.sum(), out.square().sum()]).backward()
        elif what == "ignored":
            model._ddp_params_and_buffers_to_ignore = ["unused.weight"]
            wrapped = DistributedDataParallel(model)
            nets.optimizer_of(wrapped).total(wrapped(*data))
        elif what == "features":
            fully_shard(model)
            optimizer = nets.optimizer_of(model)
            losses = model(*data)
            optimizer.backward(losses, features=[losses["task0"] * 1])
        elif what == "another order":
            wrapped = DistributedDataParallel(model)
            parameters = list(wrapped.parameters())
            if dist.get_rank() == 1:
                parameters.reverse()
            gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1)).total(wrapped(*data)).backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


def named() -> tuple[dict[str, Tensor], bool]:
    """model= is used, and a second module of the same kind is not mistaken for it."""
    other = DistributedDataParallel(nets.build())
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model, model=model)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        optimizer.step()
    gradsurg.check_sync(model)
    gradsurg.check_sync(other)
    return nets.state_of(model), True


def out_of_step(sharded: bool) -> tuple[str, str]:
    """check_sync before and after one rank changes one number of one parameter."""
    from torch.distributed.fsdp import fully_shard

    model = nets.build()
    if sharded:
        fully_shard(model.trunk, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    before = after = ""
    try:
        gradsurg.check_sync(model)
    except RuntimeError as error:
        before = str(error)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.heads[1].bias[0] += 1e-7
    try:
        gradsurg.check_sync(model)
    except RuntimeError as error:
        after = str(error)
    return before, after


# -- failures -----------------------------------------------------------------------------------------------------


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no gradient here")


def raising(form: str) -> tuple[list[str], dict[str, Tensor]]:
    """One rank's second task raises in its backward pass; the next steps are as if that one had not been."""
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model)
    messages = []
    for step in range(4):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        if step in (0, 2) and dist.get_rank() == 1:
            losses["task1"] = Broken.apply(losses["task1"])
        before = nets.state_of(model)
        try:
            optimizer.backward(losses) if form == "backward" else optimizer.total(losses).backward()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
            assert all(p.grad is None for p in model.parameters())
            nets.equal_everywhere([nets.state_of(model), before])
            continue
        optimizer.step()
    return messages, nets.state_of(model)


def raising_alone() -> dict[str, Tensor]:
    model = nets.build()
    optimizer = nets.optimizer_of(model)
    for step in (1, 3):
        optimizer.zero_grad()
        optimizer.backward(model(*nets.batch(step)))
        optimizer.step()
    return nets.state_of(model)


def dying() -> str:
    """Rank 1 is gone in the middle of a step."""
    model = DistributedDataParallel(nets.build())
    optimizer = nets.optimizer_of(model)
    for step in range(2):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        if step == 1:
            before = nets.state_of(model)
            if dist.get_rank() == 1:
                os._exit(1)
        try:
            optimizer.total(losses).backward()
        except RuntimeError as error:
            nets.equal_everywhere([nets.state_of(model), before])
            assert all(p.grad is None for p in model.parameters())
            return str(error)
        optimizer.step()
    return ""


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
    from gradsurg.distributed import reducer

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
