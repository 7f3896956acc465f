"""A sentinel: a nearly empty p.grad that shows what others do to p.grad while surgery is deferred. For capture.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradsurg.gradients.dtensor import local_of, version_of

__all__ = ["Sentinel"]

Fate = Literal["there", "gone", "added to", "scaled"]


class Sentinel:
    """A gradient of zeros with one tiny entry, in the p.grad of one parameter.

    While surgery is deferred, p.grad is empty. The sentinel tells later whether someone zeroed, scaled or added to it.
    If the parameter has a foreign gradient, this gradient is the sentinel. Its numbers are compared, because its
    `_version` is not enough: GradScaler unscales without changing it.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._signal: float | None = None
        if parameter.grad is None:
            # It vanishes in any sum, yet is not zero after a division by a loss scale of 2²⁴. In float16, whose
            # gradients no scaler takes, it is not zero after clipping to a thousandth.
            self._signal = 2.0**-14 if parameter.dtype == torch.float16 else 2.0**-100
            parameter.grad = torch.zeros_like(parameter)
            numbers = local_of(parameter.grad)
            numbers[(0,) * numbers.dim()] = self._signal
        self._tensor, self._version = parameter.grad, version_of(parameter.grad)
        self._before = None if self._tensor.is_sparse else local_of(self._tensor).clone()

    def fate(self) -> Fate:
        """Return what became of the sentinel: "gone" if zeroed or replaced, "added to" if a foreign backward ran."""
        gradient = self.parameter.grad
        if gradient is None or gradient is not self._tensor:
            return "gone"
        untouched = version_of(gradient) == self._version
        if self._before is None:
            return "there" if untouched else "added to"
        # Zeroed in place, as zero_grad(set_to_none=False) does.
        numbers = local_of(gradient)
        if not bool(numbers.any()):
            return "gone"
        if torch.equal(numbers, self._before):
            return "there" if untouched else "scaled"
        return "scaled" if _is_shrunk(numbers, self._before) else "added to"

    def below(self) -> Tensor | None:
        """Return the foreign gradient that lies under the sentinel, or None."""
        if self._signal is None:
            return self._tensor
        if self.fate() == "there":
            return None
        foreign = self._tensor.clone()
        numbers = local_of(foreign)
        numbers[(0,) * numbers.dim()] -= self._signal
        return foreign


def _is_shrunk(now: Tensor, before: Tensor) -> bool:
    """Whether now = factor · before with 0 < factor < 1, as clipping and unscaling make it, but gradients do not."""
    a, b = (torch.view_as_real(t).double() if t.is_complex() else t.double() for t in (now, before))
    factor = float((a * b).sum() / b.square().sum())
    # bfloat16 rounds away up to 1e-2.
    return 0 < factor < 1 and torch.allclose(a, factor * b, rtol=1e-2, atol=0)
