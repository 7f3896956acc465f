"""Sentinels: nearly empty p.grad that show what others do to p.grad while surgery is deferred. For capture.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsurg.gradients.dtensor import local_of, version_of
from gradsurg.gradients.rows import Row

__all__ = ["Sentinel", "Sentinels", "watched"]

Fate = Literal["there", "gone", "added to", "scaled", "in part"]
# It vanishes in any sum, yet is not zero after a division by a loss scale of 2²⁴. In float16, whose gradients no scaler
# takes, it is not zero after clipping to a thousandth.
SIGNAL, SIGNAL_16 = 2.0**-100, 2.0**-14


class Sentinel:
    """A gradient of tiny numbers in the p.grad of one parameter.

    While surgery is deferred, p.grad is empty. The sentinel tells later whether someone zeroed, scaled, masked or added
    to it. If the parameter has a foreign gradient, this gradient is the sentinel. Its numbers are compared, because its
    `_version` is not enough: GradScaler unscales without changing it.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._signal: float | None = None
        if parameter.grad is None:
            self._signal = SIGNAL_16 if parameter.dtype == torch.float16 else SIGNAL
            parameter.grad = torch.zeros_like(parameter)
            # Everywhere, so that a mask leaves some of it.
            local_of(parameter.grad).fill_(self._signal)
        self._tensor, self._version = parameter.grad, version_of(parameter.grad)
        self._before = None if self._tensor.is_sparse else local_of(self._tensor).clone()

    def fate(self) -> Fate:
        """Return what became of the sentinel.

        Returns:
            "gone" if it was zeroed or replaced, "added to" if a foreign backward ran, "scaled" if a part of all numbers
            is left, "in part" if others are zero or cannot be told from a foreign gradient.
        """
        gradient = self.parameter.grad
        same = gradient is self._tensor
        # Another tensor may hold some of our numbers, as after p.grad = p.grad * mask. That says nothing if they were
        # foreign: the next such gradient may have them too.
        if gradient is None or (not same and (self._signal is None or gradient.is_sparse)):
            return "gone"
        untouched = same and version_of(gradient) == self._version
        if self._before is None:
            return "there" if untouched else "added to"
        # Zeroed in place, as zero_grad(set_to_none=False) does.
        numbers = local_of(gradient).detach()
        if not bool(numbers.any()):
            return "gone"
        if torch.equal(numbers, self._before):
            return "there" if untouched else "scaled"
        kept = numbers != 0
        lost = bool((~kept & (self._before != 0)).any())
        if _is_shrunk(numbers[kept], self._before[kept]):
            return "in part" if lost else "scaled"
        if not same:
            # backward(create_graph=True) puts the sum into another tensor.
            return "in part" if gradient.requires_grad else "gone"
        # Zeros that were added would have left the signal. Of several writes, the first may have been zero_grad().
        writes = (version_of(gradient) - self._version) / (2 if hasattr(gradient, "to_local") else 1)
        return "in part" if (lost and self._signal == SIGNAL) or writes > 1 else "added to"

    def below(self) -> Tensor | None:
        """Return the foreign gradient that lies under the sentinel, or None."""
        if self._signal is None:
            return self._tensor
        if self.fate() == "there":
            return None
        foreign = self._tensor.clone()
        local_of(foreign).sub_(self._signal)
        return foreign


def watched(reached: Sequence[Tensor], foreign: Row) -> list[Tensor]:
    """Return the parameters that get a sentinel, and take gradients of zeros there out of the foreign ones."""
    dirty = Row((p, g) for p, g in foreign.items() if not _is_zero(g))
    # A mask may zero the only number of a parameter, or all biases: so two of different dimensions, and more numbers.
    first = min(reached, key=lambda p: (p in dirty, p.numel() == 1, p.numel()), default=None)
    if first is None:
        return []
    others = [p for p in reached if p is not first]
    second = min(others, key=lambda p: (p in dirty, p.numel() == 1, p.dim() == first.dim(), p.numel()), default=first)
    # In foreign gradients, a multiple is told from a sum by comparing numbers: one number cannot be compared.
    parameters = [first] if second is first or (second in dirty and second.numel() == 1) else [first, second]
    for p in parameters:
        if p not in dirty:
            foreign.pop(p)
    return parameters


class Sentinels:
    """A sentinel in each of these parameters: zero_grad() takes all, and other changes may take one."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._each = [Sentinel(p) for p in parameters]

    def fate(self) -> Fate:
        """Return what became of all of them; "in part" if some are gone and others are not."""
        fates = {each.fate() for each in self._each}
        if len(fates) > 1 and "gone" in fates:
            return "in part"
        return next(fate for fate in ("in part", "scaled", "added to", "gone", "there") if fate in fates)

    def below(self) -> Row:
        """Return the foreign gradients that lie under them."""
        found = ((each.parameter, each.below()) for each in self._each)
        return Row((p, g) for p, g in found if g is not None)


def _is_shrunk(now: Tensor, before: Tensor) -> bool:
    """Whether now = factor · before with 0 < factor ≤ 1, as clipping and unscaling make it, but gradients do not."""
    a, b = (torch.view_as_real(t).double() if t.is_complex() else t.double() for t in (now, before))
    factor = float((a * b).sum() / b.square().sum())
    # bfloat16 rounds away up to 1e-2.
    return 0 < factor <= 1 and torch.allclose(a, factor * b, rtol=1e-2, atol=0)


def _is_zero(gradient: Tensor) -> bool:
    # The ranks must agree, and a shard that is zero on this rank may not be so on others.
    return not hasattr(gradient, "to_local") and not gradient.is_sparse and not bool(gradient.any())
