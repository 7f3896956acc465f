"""check_sync and check_sync_every= compare the parameters of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradsurg.distributed.detect import several_ranks

if TYPE_CHECKING:
    from gradsurg.distributed.collectives import Group

__all__ = ["check_sync", "compare"]


def check_sync(model: nn.Module) -> None:
    """Compare a model's parameters over ranks, bit by bit, and name the first that differs.

    Every rank has to call it. The ranks compare two 8-byte numbers per parameter: sums of the bits of its numbers
    modulo 2⁶⁴, each weighted by its position. For a DTensor, ranks that hold the same shard are compared. Buffers are
    not compared: under DDP, BatchNorm's differ between ranks until the next forward pass.

    Args:
        model: The model, wrapped by DDP or sharded or not.

    Raises:
        MultiTaskError: Some parameter differs; the message names the first, and the ranks that disagree with the first
            rank that holds it.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.check_sync(torch.nn.Linear(2, 2))  # one process agrees with itself
    """
    named = list(model.named_parameters())
    if several_ranks() and named:
        from gradsurg.distributed.collectives import Group

        compare(Group(None, named[0][1].device), named, "check_sync")


def compare(group: Group, named: Sequence[tuple[str, Tensor]], who: str) -> None:
    """Compare the parameters of all ranks of a group; `who` asks, for the error."""
    from gradsurg.distributed.collectives import RanksError, checksum, fingerprint
    from gradsurg.distributed.fsdp import local, shard_of

    names, shards = [name for name, _ in named], [shard_of(p) for _, p in named]
    # First the names: checksums of different models would be of different shapes, and hang.
    heard = group.gather(torch.tensor([fingerprint(names), any(shards)]))
    if bool((heard[:, 0] != heard[0, 0]).any()):
        raise RanksError(f"{who}: the ranks have models with different parameters; build the same on every rank")
    # Only of sharded models: to send names of shards takes pickling.
    held: list[list[Any]] = group.objects(shards) if bool(heard[:, 1].any()) else [shards] * group.size
    heard = group.gather(torch.stack([checksum(local(p, p)).to(group.device) for _, p in named]))
    for k, name in enumerate(names):
        first: dict[Any, int] = {}  # which shard -> the first rank that holds it
        differing = []
        for rank in range(group.size):
            holder = first.setdefault(held[rank][k], rank)
            if bool((heard[rank, k] != heard[holder, k]).any()):
                differing.append((rank, holder))
        if differing:
            ranks = ", ".join(f"rank {rank} from rank {holder}" for rank, holder in differing)
            raise RanksError(
                f"{who}: the parameter {name!r} differs between ranks ({ranks}), so they train different models. The "
                "cause is gradients that were never averaged, or a parameter that was changed on some ranks only."
            )
