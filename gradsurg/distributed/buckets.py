"""Many gradients in few messages: which rank owns which numbers, and how they are packed.

Rank r owns the r-th ⌈n / ranks⌉ numbers of a parameter, whatever task or bucket they travel in; zeros fill up the
pieces of the last ranks. So rows of different tasks, and of different micro-batches, can be multiplied piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.gradients.rows import Row
from gradsurg.linalg.blocks import real_of

__all__ = ["Bucket", "cut", "flat_reals", "pack", "plan", "share", "unpack"]

# Numbers in a bucket, all ranks together. 2^25 of float32 are 128 MiB: large enough that a link of 50 GB/s is busy for
# 2.5 ms per message, small enough that the copies in flight stay well below the size of a model.
CAPACITY = 2**25


@dataclass
class Bucket:
    """Gradients that travel together, by the positions of their parameters.

    Each begins at an offset in a rank's part of the message, which has `width` numbers of a real dtype.
    """

    members: list[int]
    offsets: list[int]
    width: int
    dtype: torch.dtype
    device: torch.device


def share(parameter: Tensor, ranks: int) -> int:
    """Return how many real numbers of a parameter each rank owns."""
    return -(-parameter.numel() // ranks) * (2 if parameter.is_complex() else 1)


def plan(parameters: Sequence[Tensor], members: Sequence[int], ranks: int) -> list[Bucket]:
    """Return buckets for these members, each of one dtype and device; only a single large member exceeds CAPACITY."""
    buckets: list[Bucket] = []
    latest: dict[tuple[torch.dtype, torch.device], Bucket] = {}
    for k in members:
        p = parameters[k]
        # Complex numbers travel by themselves: a pair of reals is seen as one only if it lies at an even offset.
        key = (p.dtype, p.device)
        size = share(p, ranks)
        # Messages of a few numbers cost as much as those of some thousand, so small gradients share one.
        if key not in latest or (latest[key].width + size) * ranks > CAPACITY:
            latest[key] = Bucket([], [], 0, p.dtype.to_real(), p.device)
            buckets.append(latest[key])
        latest[key].members.append(k)
        latest[key].offsets.append(latest[key].width)
        latest[key].width += size
    return buckets


def pack(bucket: Bucket, parameters: Sequence[Tensor], parts: Sequence[Row], ranks: int) -> Tensor:
    """Return the sum of the parts, in the order (owner, member, number)."""
    message = torch.zeros(ranks, bucket.width, dtype=bucket.dtype, device=bucket.device)
    for k, offset in zip(bucket.members, bucket.offsets, strict=True):
        size = share(parameters[k], ranks)
        for gradient in (part.get(parameters[k]) for part in parts):
            if gradient is None or size == 0:
                continue
            flat = flat_reals(gradient)
            full = flat.numel() // size
            message[:full, offset : offset + size] += flat[: full * size].view(full, size)
            rest = flat.numel() - full * size
            if rest:
                message[full, offset : offset + rest] += flat[full * size :]
    return message


def unpack(bucket: Bucket, part: Tensor, parameters: Sequence[Tensor], ranks: int) -> Row:
    """Return this rank's piece of each member, views of its part of the message."""
    pieces = Row()
    for k, offset in zip(bucket.members, bucket.offsets, strict=True):
        piece = part[offset : offset + share(parameters[k], ranks)]
        pieces[parameters[k]] = torch.view_as_complex(piece.view(-1, 2)) if parameters[k].is_complex() else piece
    return pieces


def cut(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """Return the piece of a whole tensor that a rank owns, flat, filled up with zeros."""
    size = -(-tensor.numel() // ranks)
    # The last ranks may own fewer numbers, or none, and messages have equal parts.
    piece = tensor.detach().reshape(-1)[rank * size : (rank + 1) * size]
    if piece.numel() < size:
        piece = torch.cat([piece, piece.new_zeros(size - piece.numel())])
    return piece


def flat_reals(tensor: Tensor) -> Tensor:
    """Return a tensor's real numbers in their logical order, flat."""
    return real_of(tensor.detach()).reshape(-1)
