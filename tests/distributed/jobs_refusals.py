"""Never silent: what is refused over ranks, and ranks that raise, die or leave step."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gradsurg
from gradsurg.gradients.dtensor import local_of
from tests.distributed import nets
from tests.distributed.jobs_promises import spread
from tests.distributed.jobs_sharded import Parallel, sharded, split


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
        elif what == "rotate":
            fully_shard(model)
            optimizer = nets.optimizer_of(model, rotate=1)
            optimizer.total(model(*data))
        elif what == "another order":
            wrapped = DistributedDataParallel(model)
            parameters = list(wrapped.parameters())
            if dist.get_rank() == 1:
                parameters.reverse()
            gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1)).total(wrapped(*data)).backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


def named() -> dict[str, Tensor]:
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
    assert all(torch.equal(x, y) for x, y in zip(other.parameters(), nets.build().parameters(), strict=True))
    return nets.state_of(model)


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


def drifting(kind: str, options: dict[str, Any]) -> tuple[list[str], bool]:
    """One rank changes one number after the second step; return the messages of four steps, and whether none moved."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, check_sync_every=2, **options)
    messages, still = [], True
    for step in range(4):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        parameters = optimizer.param_groups[0]["params"]
        before = [local_of(p.detach()).clone() for p in parameters]
        try:
            optimizer.step()
            messages.append("")
        except gradsurg.MultiTaskError as error:
            messages.append(str(error))
            still = all(local_of(p).equal(old) for p, old in zip(parameters, before, strict=True))
        if step == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                local_of(parameters[1]).view(-1)[0] += 1e-3
    return messages, still


OPTIONS = {
    "preferences of this step": lambda rank: {},
    "preferences": lambda rank: {"preferences": {"task0": 1.0 + rank}},
    "seed": lambda rank: {"surgery": "pcgrad", "guarantee": "none", "seed": rank},
    "surgery": lambda rank: {"surgery": ("upgrad", "mgda")[rank]},
    "guarantee": lambda rank: {"guarantee": ("update", "none")[rank]},
    "rotate": lambda rank: {"rotate": (None, 1)[rank]},
    "refresh_every": lambda rank: {"refresh_every": (2, 1)[rank]},
}


def other_options(kind: str, option: str, options: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Every rank wraps with an option of its own."""
    if kind == "tensor":
        model = nets.build(Parallel)
        split(model.block, init_device_mesh("cpu", (dist.get_world_size(),)), kind)
    elif kind == "replicas of shards":
        model = sharded(nets.build(), kind)
    else:
        model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, **OPTIONS[option](dist.get_rank()), **options)
    own = {"preferences": {"task1": 0.5 * dist.get_rank()}} if option == "preferences of this step" else {}
    try:
        optimizer.total(model(*nets.mine(nets.batch(0))), **own).backward()
    except RuntimeError as error:
        assert all(p.grad is None for p in model.parameters())
        return str(error), nets.state_of(model)
    return "", nets.state_of(model)


def partly_sharded(how: str) -> tuple[list[str], dict[str, Tensor]]:
    """The third head is not sharded, and its gradient is zero or absent on all ranks in the first step."""
    from torch.distributed.fsdp import fully_shard

    model = nets.build()
    for part in (model.trunk, model.heads[0], model.heads[1], model.unused):
        fully_shard(part)
    optimizer = nets.optimizer_of(model, **({"refresh_every": 2} if how == "refresh" else {}))
    messages = []
    for step in range(2):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        late, plain = losses.pop("task2"), None
        if how in ("zero", "refresh"):
            losses["task2"] = late * step
        elif step == 1 and how == "late":
            losses["task2"] = late
        elif step == 1:
            plain = late
        try:
            optimizer.total(losses, plain=plain).backward()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
            continue
        optimizer.step()
    return messages, nets.state_of(model)


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


def dying(kind: str, raises: bool, options: dict[str, Any]) -> str:
    """Rank 1 is gone in the middle of a step: from one moment to the next, or because it raised."""
    model = spread(nets.build(), kind)
    optimizer = nets.optimizer_of(model, **options)
    parameters = optimizer.param_groups[0]["params"]  # of FSDP2, the shards: the model's may be gathered at that moment
    for step in range(2):
        optimizer.zero_grad()
        losses = model(*nets.mine(nets.batch(step)))
        if step == 1:
            before = [p.detach().clone() for p in parameters]
            if dist.get_rank() == 1:
                if not raises:
                    os._exit(1)
                losses["task1"] = Broken.apply(losses["task1"])
        try:
            optimizer.total(losses).backward()
        except (RuntimeError, ValueError) as error:
            if dist.get_rank() == 1:
                os._exit(1)  # as a program does that nobody catches
            for p, old in zip(parameters, before, strict=True):
                assert p.grad is None
                assert local_of(p).equal(local_of(old))
            return str(error)
        optimizer.step()
    return ""


def dying_before_step(kind: str, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Rank 1 is killed between backward and the end of step(); return the error of rank 0, and what was added to it."""
    model = spread(nets.build(nets.Shared), kind)
    optimizer = nets.optimizer_of(model, **options)
    parameters = optimizer.param_groups[0]["params"]
    for step in range(2):
        optimizer.zero_grad()
        optimizer.total(model(*nets.mine(nets.batch(step)))).backward()
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        before = [local_of(t.detach()).clone() for p in parameters for t in (p, p.grad)]
        state = [optimizer.state[p]["exp_avg"].clone() for p in parameters] if step == 1 else []
        try:
            optimizer.step()
        except gradsurg.MultiTaskError as error:
            after = [local_of(t.detach()) for p in parameters for t in (p, p.grad)]
            assert all(map(torch.equal, before, after))
            if options.get("atomic"):
                assert all(
                    local_of(optimizer.state[p]["exp_avg"]).equal(local_of(old))
                    for p, old in zip(parameters, state, strict=True)
                )
            return str(error), getattr(error, "__notes__", [])
    return "", []
