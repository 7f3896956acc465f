"""check_sync compares the parameters of all ranks, for users who suspect that they differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradsurg.distributed.detect import several_ranks
from gradsurg.errors import MultiTaskError

__all__ = ["check_sync"]


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
    if not several_ranks():
        return
    from gradsurg.distributed.collectives import Group, checksum
    from gradsurg.distributed.fsdp import local, shard_of

    named = list(model.named_parameters())
    if not named:
        return
    group = Group(None, named[0][1].device)
    sums = torch.stack([checksum(local(p, p)).to(named[0][1].device) for _, p in named])
    names = [name for name, _ in named]
    held: list[tuple[list[str], list[Any]]] = group.objects((names, [shard_of(p) for _, p in named]))
    if any(each[0] != names for each in held):
        raise MultiTaskError(
            "check_sync: the ranks have models with different parameters; build the same on every rank"
        )
    heard = group.gather(sums)
    for k, name in enumerate(names):
        first: dict[Any, int] = {}  # which shard -> the first rank that holds it
        differing = []
        for rank in range(group.size):
            holder = first.setdefault(held[rank][1][k], rank)
            if bool((heard[rank, k] != heard[holder, k]).any()):
                differing.append((rank, holder))
        if differing:
            ranks = ", ".join(f"rank {rank} from rank {holder}" for rank, holder in differing)
            raise MultiTaskError(
                f"check_sync: the parameter {name!r} differs between ranks ({ranks}): they have left step. The cause "
                "is gradients that were never averaged, or a parameter that was changed on some ranks only."
            )
