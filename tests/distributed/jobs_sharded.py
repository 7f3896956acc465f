"""What the ranks do with DTensors: FSDP2, tensor parallel, and both."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.distributed import nets


def sharded(model: nn.Module, kind: str) -> nn.Module:
    """Apply fully_shard to every linear layer and the root, or as the kind says."""
    options: dict[str, Any] = {}
    if kind == "keeps parameters":
        options["reshard_after_forward"] = False
    if kind == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "replicas of shards":
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard"))
    if kind != "root only":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, **options)
    return fully_shard(model, **options)


def one_backward(optimizer: Any, form: str, losses: dict[str, Tensor]) -> None:
    if form == "total":
        optimizer.total(losses).backward()
    elif form == "backward":
        optimizer.backward(losses)
    else:
        for i, (name, loss) in enumerate(losses.items()):
            with optimizer.task(name):
                loss.backward(retain_graph=i < len(losses) - 1)


def train(model: nn.Module, optimizer: Any, form: str, part: Any, steps: int = nets.STEPS) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        one_backward(optimizer, form, model(*part(nets.batch(step))))
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()


class Mixed(nets.Net):
    """Widths that no number of ranks divides: the last ranks hold less, or nothing."""

    def __init__(self) -> None:
        super().__init__(width=9)


def fsdp(kind: str, form: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = sharded(nets.build(Mixed), kind)
    optimizer = nets.optimizer_of(model, **options)
    train(model, optimizer, form, nets.mine)
    return nets.state_of(model), optimizer.report


def fsdp_compiled() -> dict[str, Tensor]:
    """The trunk compiled; a shard of its last layer has no gradient but zeros on one rank."""
    model = sharded(nets.build(HalfBlind), "layers")
    model.trunk.compile(backend="aot_eager")
    optimizer = nets.optimizer_of(model)
    train(model, optimizer, "total", nets.mine)
    return nets.state_of(model)


def fsdp_compiled_alone() -> dict[str, Tensor]:
    model = nets.build(HalfBlind)
    model.trunk.compile(backend="aot_eager")
    train(model, nets.optimizer_of(model), "total", lambda data: data)
    return nets.state_of(model)


class Blocks(Mixed):
    """Two blocks of a class of our own, each compiled as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.trunk = nn.Sequential(self.trunk, *self.blocks)


class Residual(nn.Module):
    """Begins as the identity: at first the gradient of `up` is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def fsdp_compiled_blocks(how: str, reshards: bool) -> dict[str, Tensor]:
    """The usual recipe: every block is compiled and sharded, in one order or the other, then the root is sharded."""
    model = nets.build(Blocks)
    for k in range(2):
        if how == "sharded first":
            fully_shard(model.blocks[k], reshard_after_forward=reshards)
        if how == "torch.compile":
            model.blocks[k] = model.trunk[k + 1] = torch.compile(model.blocks[k], backend="aot_eager")
        else:
            model.blocks[k].compile(backend="aot_eager")
        if how != "sharded first":
            fully_shard(model.blocks[k], reshard_after_forward=reshards)
    fully_shard(model, reshard_after_forward=reshards)
    with warnings.catch_warnings():
        # torch.compile looks at .grad of what the first layers return, and warns of that itself.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        train(model, nets.optimizer_of(model), "total", nets.mine, steps=2)
    return nets.state_of(model)


def fsdp_compiled_blocks_alone() -> dict[str, Tensor]:
    model = nets.build(Blocks)
    train(model, nets.optimizer_of(model), "total", lambda data: data, steps=2)
    return nets.state_of(model)


class HalfBlind(Mixed):
    """Nothing reaches the second half of the last layer of the trunk: its gradient is zero on the last ranks."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x)) * (torch.arange(6) < 3)
        return {f"task{i}": (1 + 3 * i) * (head(z) - y[:, i]).square().mean() for i, head in enumerate(self.heads)}


def alone(kind: str, form: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = nets.build(Mixed)
    optimizer = nets.optimizer_of(model, **options)
    train(model, optimizer, form, lambda data: data)
    return nets.state_of(model), optimizer.report


def bfloat16_rows() -> float:
    """Compare the Gramian with that of one plain FSDP2 backward pass a task, under the same precision policy."""
    model = sharded(nets.build(Mixed), "bfloat16")
    optimizer = nets.optimizer_of(model)
    rows: dict[str, dict[str, Tensor]] = {}
    for name in ("task0", "task1", "task2"):
        model.zero_grad()
        model(*nets.mine(nets.batch(0)))[name].backward()
        rows[name] = {k: p.grad.full_tensor() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer.total(model(*nets.mine(nets.batch(0)))).backward()
    shared = set.intersection(*(set(row) for row in rows.values()))
    flat = torch.stack([torch.cat([row[k].flatten().double() for k in sorted(shared)]) for row in rows.values()])
    expected = flat @ flat.T
    return float(((optimizer.report.gramian - expected).abs() / expected.diagonal().max()).max())


def accumulated(how: str) -> dict[str, Tensor]:
    model = sharded(nets.build(Mixed), "layers")
    accumulate(model, nets.optimizer_of(model), how, nets.mine)
    return nets.state_of(model)


def accumulate(model: nn.Module, optimizer: Any, how: str, part: Any) -> None:
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            with ExitStack() as stack:
                if micro == 0 and how == "accumulate":
                    stack.enter_context(optimizer.accumulate())
                if how == "switched off" and hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(micro == 1)
                (optimizer.total(model(*part(nets.batch(10 * step + micro)))) / 2).backward()
        optimizer.step()


def accumulated_alone(how: str) -> dict[str, Tensor]:
    model = nets.build(Mixed)
    accumulate(model, nets.optimizer_of(model), how, lambda data: data)
    return nets.state_of(model)


class Inside(nn.Module):
    """Calls total() where it must not be called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.optimizer = net, [None]

    def forward(self, x: Tensor, y: Tensor) -> Any:
        losses = self.net(x, y)
        return losses if self.optimizer[0] is None else self.optimizer[0].total(losses)


def total_inside_forward() -> str:
    model = sharded(Inside(nets.build()), "layers")
    model.optimizer[0] = nets.optimizer_of(model)
    before = nets.state_of(model)
    total = model(*nets.mine(nets.batch(0)))
    try:
        total.backward()
    except RuntimeError as error:
        nets.equal_everywhere([nets.state_of(model), before])
        return str(error)
    return ""


def different_tasks(lacks: list[str]) -> str:
    model = sharded(nets.build(), "layers")
    optimizer = nets.optimizer_of(model)
    losses = model(*nets.mine(nets.batch(0)))
    if dist.get_rank() == 1:
        losses = {name: loss for name, loss in losses.items() if name not in lacks}
    try:
        optimizer.total(losses).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def not_all_sharded() -> str:
    model = nets.build()
    fully_shard(model.trunk)
    optimizer = nets.optimizer_of(model)
    try:
        optimizer.total(model(*nets.mine(nets.batch(0)))).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def session(ours: bool) -> list[tuple[str, int]]:
    """Return every collective of one step on DTensors: of a plain step of one loss, or of ours with three."""
    model = sharded(nets.build(Mixed), "layers")
    optimizer = nets.optimizer_of(model) if ours else torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(2):
        losses = model(*nets.mine(nets.batch(step)))
        optimizer.zero_grad()
        with nets.counting() as record:
            (optimizer.total(losses) if ours else losses["task0"]).backward()
            optimizer.step()
    return record


# -- tensor parallel ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return 1 * self.down(torch.tanh(self.up(self.norm(x))))  # FSDP2 warns of views


class Parallel(nn.Module):
    """A block to be split, and heads that stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(5, 6), Block()
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.block(self.embed(x))
        return {f"task{i}": (1 + 3 * i) * (head(z) - y[:, i]).square().mean() for i, head in enumerate(self.heads)}


def plan(kind: str) -> dict[str, Any]:
    if "sequence" in kind:
        return {
            "norm": SequenceParallel(sequence_dim=0),  # the norm's gradients come as Partial
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(),
        }
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def split(block: nn.Module, mesh: Any, kind: str) -> None:
    if "sequence" in kind:
        whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True)
        parallelize_module(block, mesh, whole)
    parallelize_module(block, mesh, plan(kind))


def parallel(kind: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Tensor parallel over all ranks, or FSDP2 over half of them times tensor parallel over two."""
    model = nets.build(Parallel)
    data = lambda whole: whole  # noqa: E731
    if "fsdp" in kind:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
        split(model.block, mesh["model"], kind)
        for layer in (model.block, model.embed, *model.heads, model):
            fully_shard(layer, mesh=mesh["data"])
        data = lambda whole: nets.mine(whole, mesh["data"].get_local_rank(), mesh["data"].size())  # noqa: E731
    else:
        split(model.block, init_device_mesh("cpu", (dist.get_world_size(),)), kind)
    optimizer = nets.optimizer_of(model, **options)
    for step in range(nets.STEPS):
        optimizer.zero_grad()
        losses = model(*data(nets.batch(step)))
        if kind == "tensor, its losses DTensors":
            whole = init_device_mesh("cpu", (dist.get_world_size(),))
            losses = {name: DTensor.from_local(loss, whole, [Replicate()]) for name, loss in losses.items()}
        optimizer.total(losses).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report


def parallel_alone(options: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    model = nets.build(Parallel)
    optimizer = nets.optimizer_of(model, **options)
    for step in range(nets.STEPS):
        optimizer.zero_grad()
        optimizer.total(model(*nets.batch(step))).backward()
        optimizer.step()
    return nets.state_of(model), optimizer.report
