"""FSDP2 and tensor parallel: the backward pass itself averages and shards gradients; each number is counted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradsurg.distributed.collectives import Group, RanksError, checksum, fingerprint, listening, of_backend
from gradsurg.distributed.layout import NONE, Delivery, Layout, generator_of
from gradsurg.distributed.modules import modules_of
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.dtensor import local_of
from gradsurg.gradients.rows import Row
from gradsurg.linalg.measure import Measure

__all__ = ["ShardedLayout", "local", "shard_of"]


class ShardedLayout(Layout):
    """Every rank holds its local shards; if other ranks hold the same numbers, each counts its part of them.

    The Gramians of the local parts are added up over ranks: m x m numbers. No gradient is gathered.

    At least one parameter is a DTensor. FSDP2 modules are looked for in `model`, or in the whole process. `options` are
    those of wrap() that have to be the same on all ranks, as text.
    """

    several = True
    whole_rows = False
    group: Group

    def __init__(self, parameters: Sequence[Tensor], model: nn.Module | None, options: Mapping[str, str]) -> None:
        # check_sync imports this file under every torch; before 2.6 it has no FSDPModule.
        from torch.distributed.fsdp import FSDPModule

        self.parameters, self.options = list(parameters), options
        self.signature = fingerprint(list(options.items()))
        self.group = _group_of(parameters)
        self._cuts = {id(p): cut for p, cut in zip(parameters, _cuts(parameters, self.group), strict=True)}
        self._position = {id(p): k for k, p in enumerate(parameters)}
        self._modules = modules_of(FSDPModule, parameters, model)
        # Nobody averages the gradients of these. Ranks have to compute equal ones, which is checked in every step.
        self.plain = [p for p in parameters if not isinstance(p, DTensor)]

    def begin(self) -> None:
        """Switch gradient sync on: without it FSDP2 adds the gradients of all tasks to the next task that syncs."""
        for module in self._modules:
            state = module._get_fsdp_state()
            if state._state_ctx.post_backward_final_callback_queued:
                raise MultiTaskError(
                    "total(losses) runs inside the backward pass of an FSDP2 module: it was called in the module's "
                    "forward(), or added to a loss that goes through the module. Call total() on what forward() "
                    "returned, and pass other losses as total(losses, plain=other)."
                )
            module.set_requires_gradient_sync(True)
            # The user's own accumulation may have left this one off, too.
            module.set_is_last_backward(True)

    def sends(self, waiting: bool) -> bool:
        """Always: the backward pass itself has reduced the gradients."""
        return True

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let the model's own reduction run; if another rank does not answer it, say so."""
        try:
            yield
        except RuntimeError as error:
            if not of_backend(error):
                raise
            with listening("reducing the gradients of a task, inside its backward pass"):
                raise

    def exchange(  # noqa: D102
        self, names: Sequence[str], measured: Sequence[str] = (), preferences: Mapping[str, float] = NONE
    ) -> ShardExchange:
        return ShardExchange(self, names, preferences)

    def averaging(self) -> ShardExchange | None:
        """Compare what is in p.grad of parameters that are not sharded; the others are averaged already."""
        return ShardExchange(self, []) if self.plain else None

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return [local(t, p) for p, t in zip(parameters, tensors, strict=True)]

    def measure(self, parameters: Sequence[Tensor]) -> Measure:  # noqa: D102
        return Measure([self._cuts[id(p)] for p in parameters], self.group.total, self.group.gather)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one per parameter and shard: ranks that hold the same numbers draw the same."""
        which = [(self._position[id(p)], shard_of(p)) for p in parameters]
        return [generator_of(generator, *each) for each in which]

    def anywhere(self, flags: Tensor) -> Tensor:
        """Return which flags are set on any rank: one shard may be zero while others are not."""
        return self.raised(flags)

    def agreed(self, names: Sequence[str]) -> list[str]:
        """Return the names themselves: the exchange has made sure that they are equal on all ranks."""
        return list(names)

    def of_features(self) -> Layout:  # noqa: D102
        raise MultiTaskError(
            "features= does not go with sharded parameters: the heads' backward passes run up to the features alone, "
            "where FSDP2 and tensor parallel reduce nothing. Use refresh_every=, which costs as little between its "
            "refreshes."
        )

    def whole(self, result: Row) -> Row:
        """Return DTensors placed like the parameters; nothing is sent."""
        return Row((p, _placed_like(p, u)) for p, u in result.items())


class ShardExchange:
    """Checks that all ranks have the same tasks, and takes the local shards of rows; no row is sent."""

    def __init__(self, shards: ShardedLayout, names: Sequence[str], preferences: Mapping[str, float] = NONE) -> None:
        self._shards = shards
        self.names = list(names)
        self._rows: dict[str, Row] = {}
        own = sorted(preferences.items())
        heard = shards.group.gather(torch.tensor(fingerprint([*names, shards.signature, own])))
        if bool((heard != heard[0]).any()):
            shards.group.refuse_other_options(shards.options, own)
            found = shards.group.objects(self.names)
            raise MultiTaskError(
                "the ranks have different tasks in this step: "
                + "; ".join(f"rank {rank} {each}" for rank, each in enumerate(found))
                + ". Backward passes of sharded models are collective, so every rank needs every task, in one order: "
                "if a rank has no data of a task, give it 0 * output.sum()."
            )

    def offer(self, name: str, *parts: Row) -> None:
        """Keep the local shards of a row."""
        for part in parts:
            self._rows[name] = Row((p, local(g, p)) for p, g in part.items())

    def finish(self, foreign: Row, losses: Mapping[str, Tensor], untouched: Sequence[Tensor] = ()) -> Delivery:
        """Average the losses, and compare the gradients of parameters that are not sharded."""
        group = self._shards.group
        if self._shards.plain:
            self._compare_plain([*self._rows.values(), foreign])
        means = group.mean({name: losses[name] for name in self.names if name in losses})
        # All ranks have the same ones: see `ShardedLayout.anywhere`.
        return Delivery(self._rows, foreign, means, Row((p, torch.zeros_like(local_of(p))) for p in untouched))

    def fail(self) -> None:
        """Do nothing: backward passes of sharded models are collective, so the process group tells the others."""

    def _compare_plain(self, rows: Sequence[Row]) -> None:
        # In every step: a task may begin later, and a first gradient may be zero on all ranks.
        plain, group, count = self._shards.plain, self._shards.group, len(self._shards.parameters)
        pairs = [(p, row.get(p)) for row in rows for p in plain]
        sums = [torch.zeros(2, dtype=torch.int64) if g is None else checksum(g) for _, g in pairs]
        heard = group.gather(torch.stack([each.to(group.device) for each in sums]))
        differing = (heard != heard[0]).any(0).any(-1)
        if bool(differing.any()):
            shape = tuple(pairs[int(differing.nonzero()[0])][0].shape)
            raise RanksError(
                f"{len(plain)} of the optimizer's {count} parameters are not sharded, and the ranks computed different "
                f"gradients for them (first for one of shape {shape}), which nobody averages: apply fully_shard to the "
                "whole model, or leave those parameters to another optimizer. Parameters, p.grad and optimizer state "
                "are as before."
            )


def local(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of a tensor shaped and placed like the parameter; a view if possible."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(parameter, DTensor) and tensor.placements != parameter.placements:
        tensor = tensor.redistribute(placements=parameter.placements)  # Partial, of sequence-parallel norms
    # The backward pass may still be sending it; numbers are read only after that.
    shard = tensor.to_local()
    wait = getattr(shard, "wait", None)
    return shard if wait is None else wait()


def shard_of(parameter: Tensor) -> tuple[Any, ...] | None:
    """Return a name for the part of a parameter that this rank holds; equal on ranks that hold the same numbers."""
    if not isinstance(parameter, DTensor):
        return None
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        None if placement.is_replicate() else (repr(placement), coordinate[d])
        for d, placement in enumerate(parameter.placements)
    )


def _placed_like(parameter: Tensor, shard: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    mesh, placements, whole = parameter.device_mesh, parameter.placements, parameter.detach()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _group_of(parameters: Sequence[Tensor]) -> Group:
    meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)]
    # Smaller meshes are taken to be parts of the largest one.
    mesh = max(meshes, key=lambda mesh: mesh.size())
    group: Any = None
    if mesh.size() < dist.get_world_size():
        group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    return Group(group, torch.device(mesh.device_type))


def _cuts(parameters: Sequence[Tensor], group: Group) -> list[slice | None]:
    """Return which part of its flat local shard this rank counts; None is all of it.

    Ranks hold equal numbers along the Replicate dimensions of a parameter's mesh. They also do if the parameter is on
    several meshes (FSDP2 beside tensor parallel), or on none.
    """
    mine = [tuple(p.device_mesh.mesh.flatten().tolist()) if isinstance(p, DTensor) else () for p in parameters]
    of_ranks = group.objects(mine)
    cuts: list[slice | None] = []
    for k, p in enumerate(parameters):
        if isinstance(p, DTensor):
            # Ranks with this parameter on other meshes hold the same numbers as well.
            twins = sorted({each[k] for each in of_ranks})
            copies, which = len(twins), twins.index(mine[k])
            coordinate = p.device_mesh.get_coordinate()
            assert coordinate is not None
            for d, placement in enumerate(p.placements):
                if placement.is_replicate():
                    size = p.device_mesh.size(d)
                    copies, which = copies * size, which * size + coordinate[d]
        else:
            copies, which = group.size, group.rank
        size = -(-local(p, p).numel() // copies)
        cuts.append(None if copies == 1 else slice(which * size, (which + 1) * size))
    return cuts
