"""The mark that stands in one p.grad while surgery waits, and what can be read off it later."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Mark"]

Fate = Literal["there", "gone", "added to", "scaled"]


class Mark:
    """Zeros but for one number too small to matter, in a p.grad that is otherwise empty.

    `_version` alone would not do: GradScaler unscales without changing it. Where the parameter has a foreign gradient,
    that is the mark, and nothing can be read off it but whether it is still there.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._signal = parameter.grad is None
        if parameter.grad is None:
            self._number = _small(parameter.dtype)
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad[_first(parameter)] = self._number
        self._tensor, self._version = parameter.grad, parameter.grad._version

    def fate(self) -> Fate:
        """Return what became of it: gone is zeroed or replaced; added to, by a backward pass of somebody else."""
        gradient = self.parameter.grad
        if gradient is None or gradient is not self._tensor:
            return "gone"
        if not self._signal:
            return "there" if gradient._version == self._version else "added to"
        if not bool(gradient.any()):
            return "gone"
        alone = bool((gradient.abs() <= self._number).all())
        if gradient._version == self._version:
            return "there" if alone and bool(gradient[_first(gradient)] == self._number) else "scaled"
        return "scaled" if alone else "added to"

    def below(self) -> Tensor | None:
        """Return what is foreign in the marked p.grad."""
        if not self._signal:
            return self._tensor
        if self.fate() == "there":
            return None
        foreign = self._tensor.clone()
        foreign[_first(foreign)] -= self._number
        return foreign


def _first(tensor: Tensor) -> tuple[int, ...]:
    return (0,) * tensor.dim()


def _small(dtype: torch.dtype) -> float:
    """Return a number that is lost in any sum, and is still not zero when a scale of 2²⁴ is divided out of it."""
    return 2.0**-24 if dtype == torch.float16 else 2.0**-100
