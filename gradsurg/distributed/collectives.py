"""Messages between ranks: the questions that ranks ask each other, and the error if one of them does not answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurg.errors import MultiTaskError

__all__ = [
    "Group",
    "RanksError",
    "checksum",
    "fingerprint",
    "listening",
    "merged",
    "of_backend",
    "start_all_gather",
    "start_reduce_scatter",
]


class RanksError(MultiTaskError):
    """An error about other ranks: they know of it already, or can no longer be told."""


@contextmanager
def listening(what: str) -> Iterator[None]:
    """Turn the backend's error about a lost or late rank into one that says what this rank was doing."""
    try:
        yield
    except MultiTaskError:
        raise
    except RuntimeError as error:  # the class of all errors of a backend
        raise RanksError(
            f"while {what}, another rank did not answer: it died, raised, or did not call the same method of the "
            "optimizer (every rank has to, in every step). Parameters and p.grad of this rank are as before. The "
            f"process group said: {error}"
        ) from error


def of_backend(error: RuntimeError) -> bool:
    """Whether the process group raised this error; gloo raises plain RuntimeErrors, which are told by their text."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error)


class Group:
    """A process group (None is all ranks), and the questions that its ranks ask each other.

    All of them stand on one primitive, the sum over ranks; names of different lengths alone need `objects`. Messages
    travel on the device of the parameters: NCCL sends nothing from the CPU.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def start(self, numbers: Tensor) -> tuple[Tensor, Any]:
        """Begin to add numbers up over ranks, and return where the sum will be, and what to wait for."""
        # The sum is written in place, and the caller keeps its own numbers.
        there = numbers.to(self.device, copy=True)
        return there, dist.all_reduce(there, group=self.group, async_op=True)

    def total(self, numbers: Tensor, what: str = "adding up inner products over the ranks") -> Tensor:
        """Return the sum over ranks, equal to the bit on all of them, on the device of `numbers`.

        All ranks give one shape and dtype. If one of them does not answer, the error says `what` they were doing.
        """
        with listening(what):
            there, work = self.start(numbers)
            work.wait()
        return there.to(numbers.device)

    def mean(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over ranks of numbers that all ranks have, by name; they stay on the device."""
        if not named:
            return {}
        # In float64, so that the mean over ranks is that of one process to the last place of a float32 loss.
        numbers = torch.stack([number.double().to(self.device).view(()) for number in named.values()])
        return dict(zip(named, self.total(numbers) / self.size, strict=True))

    def start_gather(self, numbers: Tensor) -> tuple[Tensor, Any]:
        """Begin to collect the numbers of all ranks, (ranks, …), as the sum of what is zero but for one rank."""
        place = numbers.new_zeros((self.size, *numbers.shape))
        place[self.rank] = numbers
        with listening("comparing the tasks of this step"):
            return self.start(place)

    def gather(self, numbers: Tensor) -> Tensor:
        """Return the numbers of all ranks, (ranks, …), on the CPU."""
        with listening("comparing numbers over the ranks"):
            there, work = self.start_gather(numbers)
            work.wait()
        return there.cpu()

    def objects(self, mine: object) -> list[Any]:
        """Return the object of each rank: slow, for what happens once or seldom."""
        found: list[Any] = [None] * self.size
        with listening("comparing names over the ranks"):
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def refuse_other_options(self, options: Mapping[str, str], preferences: Sequence[tuple[str, float]]) -> None:
        """Raise an error, on all ranks, if options of wrap() or a step's preferences differ; all ranks have to ask."""
        of_ranks = self.objects({**options, "preferences of this step": repr(dict(preferences))})
        differing = [name for name in of_ranks[0] if len({each.get(name) for each in of_ranks}) > 1]
        if differing:
            found = "; ".join(
                f"{name} is " + ", ".join(f"{each[name]} on rank {rank}" for rank, each in enumerate(of_ranks))
                for name in differing
            )
            raise RanksError(
                f"the ranks have different options: {found}. Give the same on every rank; what is computed "
                "from a rank's own data has to be averaged or broadcast first. Parameters, p.grad and optimizer state "
                "are as before."
            )


def merged(lists: Iterable[Iterable[str]]) -> list[str]:
    """Return each name once, in the order of the first list that has it."""
    return list(dict.fromkeys(name for each in lists for name in each))


# Both were renamed in torch 2.13.


def start_all_gather(whole: Tensor, mine: Tensor, group: Any) -> Any:
    """Begin to gather equal parts of all ranks into one tensor, and return what to wait for."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole.view(-1), mine.view(-1), group=group, async_op=True)


def start_reduce_scatter(mine: Tensor, parts: Tensor, group: Any) -> Any:
    """Begin to add up the (ranks, …) parts of all ranks and give each rank its own; return what to wait for."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(mine, parts.view(-1), group=group, async_op=True)


# Of 4-byte numbers: the sum of a piece needs 32 MiB beside it.
PIECE = 2**20
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Return two int64 that almost surely differ if any bit differs; NaN and −0 are compared as bits."""
    flat = tensor.detach().contiguous().view(-1)
    words = (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(WORDS[flat.real.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), PIECE):
        piece = words[start : start + PIECE].to(torch.int64)
        position = torch.arange(start + 1, start + piece.numel() + 1, device=tensor.device)
        # Odd factors: int64 wraps around, and a multiplication by an odd number loses no bit.
        mixed = (piece + 1) * (position * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01)
        sums += torch.stack([mixed.sum(), (mixed ^ (mixed >> 31)).sum()])
    return sums


def fingerprint(parts: Sequence[object]) -> int:
    """Return 63 bits that are equal in every process if the parts are; hash() is salted differently in each process."""
    # One bit less than 64: the sum over ranks is one of int64.
    digest = hashlib.sha256("\x00".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
