"""Small messages between ranks, and what is said when they do not arrive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurg.errors import MultiTaskError

__all__ = [
    "Group",
    "RanksError",
    "fingerprint",
    "listening",
    "of_backend",
    "start_all_gather",
    "start_all_reduce",
    "start_reduce_scatter",
]


class RanksError(MultiTaskError):
    """Something about the other ranks, which they know or can no longer be told."""


@contextmanager
def listening(what: str) -> Iterator[None]:
    """Turn the backend's error about a lost or late rank into one that says what was waited for."""
    try:
        yield
    except MultiTaskError:
        raise
    except RuntimeError as error:  # every error of a backend is one
        raise RanksError(
            f"while {what}, another rank did not answer: it died, raised, or did not call the same method of the "
            "optimizer (every rank has to, in every step). Parameters and p.grad of this rank are as before. The "
            f"process group said: {error}"
        ) from error


def of_backend(error: RuntimeError) -> bool:
    """Whether an error that passed through other code is a backend's: gloo's are plain RuntimeErrors, by their text."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error)


class Group:
    """A process group, and the device on which its messages travel.

    Args:
        group: The process group; None is all ranks.
        device: That of the parameters: NCCL sends nothing from the CPU.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks, equal to the bit on all of them, on the device of `numbers`."""
        there = numbers.to(self.device, copy=True)
        with listening("adding up inner products over the ranks"):
            dist.all_reduce(there, group=self.group)
        return there.to(numbers.device)

    def mean(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over ranks of numbers that all ranks have, by name; they stay on the device."""
        if not named:
            return {}
        numbers = torch.stack([number.double().to(self.device).view(()) for number in named.values()])
        return dict(zip(named, self.total(numbers) / self.size, strict=True))

    def first(self, numbers: Tensor) -> Tensor:
        """Return the first rank's numbers on all ranks."""
        return self.total(numbers if self.rank == 0 else torch.zeros_like(numbers))

    def union(self, names: Sequence[str]) -> list[str]:
        """Return the names of all ranks, in the order of the lowest rank that has them."""
        heard = self.gather(torch.tensor(fingerprint(names)))
        lists = self.objects(list(names)) if bool((heard != heard[0]).any()) else [names]
        return list(dict.fromkeys(name for each in lists for name in each))

    def agree(self, number: int) -> bool:
        """Whether all ranks gave this one number, and it is not 0."""
        heard = self.gather(torch.tensor(number))
        return number != 0 and bool((heard == number).all())

    def start_gather(self, numbers: Tensor) -> tuple[Tensor, Any]:
        """Begin to collect everybody's `numbers` and return where they will be, (ranks, …), and what to wait for."""
        everybody = torch.empty((self.size, *numbers.shape), dtype=numbers.dtype, device=self.device)
        with listening("comparing the tasks of this step"):
            work = start_all_gather(everybody, numbers.to(self.device), self.group)
        return everybody, work

    def gather(self, numbers: Tensor) -> Tensor:
        """Return everybody's `numbers`, (ranks, …), on the CPU."""
        everybody, work = self.start_gather(numbers)
        with listening("comparing numbers over the ranks"):
            work.wait()
        return everybody.cpu()

    def objects(self, mine: object) -> list[Any]:
        """Return everybody's object, by rank: slow, for what happens once or seldom."""
        everybody: list[Any] = [None] * self.size
        with listening("comparing names over the ranks"):
            dist.all_gather_object(everybody, mine, group=self.group)
        return everybody


def start_all_gather(everybody: Tensor, mine: Tensor, group: Any) -> Any:
    """Begin to gather equal parts of all ranks into one tensor, and return what to wait for."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(everybody.view(-1), mine.view(-1), group=group, async_op=True)


def start_all_reduce(message: Tensor, group: Any) -> Any:
    """Begin to add up a tensor over ranks in its own place, and return what to wait for."""
    return dist.all_reduce(message, group=group, async_op=True)


def start_reduce_scatter(mine: Tensor, parts: Tensor, group: Any) -> Any:
    """Begin to add up every rank's (ranks, …) parts, of which each rank gets its own, and return what to wait for."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    return scatter(mine, parts.view(-1), group=group, async_op=True)


def fingerprint(parts: Sequence[object]) -> int:
    """Return 63 bits that are equal in every process for equal parts; hash() is salted anew in each."""
    digest = hashlib.sha256("\x00".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
