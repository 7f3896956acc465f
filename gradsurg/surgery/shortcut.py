"""One small Gramian in Python floats: what `gradsurg.weights` does where no option asks for more.

A torch call takes 2 µs whatever its size, `torch.tensor(list)` 4 to 9 µs, reading 8 x 8 numbers into lists 1.4 µs and
an array of 8 handed to torch 1.3 µs; so a whole answer costs less here than its checks cost in tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import isfinite, sqrt
from operator import mul

import torch
from torch import Tensor, frombuffer

from gradsurg.solvers.active_set import Matrix, Vector
from gradsurg.solvers.simplex import STATIONARY

__all__ = ["MOST", "agree", "alive", "far_from_zero", "rows_of", "vector"]

# More tasks than this, and loops over floats are slower than torch.
MOST = 16
FLOAT64 = torch.float64  # 0.1 µs less


def rows_of(gramian: Tensor) -> Matrix | None:
    """Return a Gramian as lists; None where it is not finite or too large to be worth it."""
    if gramian.shape[-1] > MOST:
        return None
    rows: Matrix = gramian.tolist()
    return rows if isfinite(sum(map(sum, rows))) else None


def agree(rows: Matrix) -> bool:
    """Whether no two tasks conflict."""
    return min(map(min, rows)) >= 0


def alive(gramian: Tensor) -> bool:
    """Whether no task's gradient is zero."""
    return 0.0 not in gramian.diagonal().tolist()


def far_from_zero(rows: Matrix, weights: Vector) -> bool:
    """Whether u = Σ w_i g_i is longer than its rounding, so that there is nothing to settle."""
    square: float = sum(x * sum(map(mul, row, weights)) for x, row in zip(weights, rows, strict=True))
    lengths: float = sum(abs(x) * sqrt(max(row[i], 0.0)) for i, (x, row) in enumerate(zip(weights, rows, strict=True)))
    return square > STATIONARY * lengths * lengths


def vector(weights: Sequence[float], gramian: Tensor) -> Tensor:
    """Return weights as a tensor of the Gramian's dtype.

    Example:
        >>> import torch
        >>> vector([1.0, 0.5], torch.eye(2))
        tensor([1.0000, 0.5000])
    """
    dtype = gramian.dtype
    if dtype is FLOAT64:
        return frombuffer(array("d", weights), dtype=FLOAT64)
    if dtype is torch.float32:
        return frombuffer(array("f", weights), dtype=dtype)
    return frombuffer(array("d", weights), dtype=FLOAT64).to(dtype)
