"""A mapping from parameters to anything, by identity."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["ByParameter"]

V = TypeVar("V")


class ByParameter(Generic[V]):
    """What a dict from tensors to values is, in the order of insertion, without hashing a tensor.

    Tensor.__hash__ is Python code, and comparing tensors gives tensors. The parameters are held, so that no id can come
    to mean another tensor.
    """

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[Tensor, V]] = ()) -> None:
        self._pairs = {id(pair[0]): pair for pair in pairs}

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Tensor]:
        return (pair[0] for pair in self._pairs.values())

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._pairs

    def __getitem__(self, parameter: Tensor) -> V:
        pair = self._pairs.get(id(parameter))
        if pair is None:
            raise KeyError(f"no entry for the parameter of shape {tuple(parameter.shape)}")
        return pair[1]

    def __setitem__(self, parameter: Tensor, value: V) -> None:
        self._pairs[id(parameter)] = (parameter, value)

    def get(self, parameter: Tensor) -> V | None:
        """Return the value, or None where there is none."""
        pair = self._pairs.get(id(parameter))
        return None if pair is None else pair[1]

    def pop(self, parameter: Tensor) -> V | None:
        """Remove an entry and return its value, or None where there is none."""
        pair = self._pairs.pop(id(parameter), None)
        return None if pair is None else pair[1]

    def items(self) -> Collection[tuple[Tensor, V]]:
        """Return the pairs (parameter, value)."""
        return self._pairs.values()

    def values(self) -> list[V]:
        """Return the values."""
        return [pair[1] for pair in self._pairs.values()]

    def at(self, parameters: Iterable[Tensor]) -> list[V | None]:
        """Return the value of each of these parameters, or None where there is none."""
        find = self._pairs.get
        return [pair[1] if (pair := find(key)) else None for key in map(id, parameters)]

    def ids(self) -> Collection[int]:
        """Return id(parameter) of each entry."""
        return self._pairs.keys()

    def update(self, other: ByParameter[V]) -> None:
        """Take over all entries of another."""
        self._pairs.update(other._pairs)

    def copy(self) -> ByParameter[V]:
        """Return another with the same entries."""
        return ByParameter(self._pairs.values())
