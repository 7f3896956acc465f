"""What one step of training asks of the m x m part of the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.rows import project_rows
from gradsurg.solvers.simplex import simplex

__all__ = ["HOST", "Problem", "Solvers", "State"]


State = Mapping[str, Any]


@dataclass(frozen=True)
class Solvers:
    """The functions of these names in solvers/, or others of the same arguments and answers."""

    nonnegative: Callable[..., Tensor]
    simplex: Callable[..., Tensor]
    project_rows: Callable[..., Tensor]


HOST = Solvers(nonnegative, simplex, project_rows)


@dataclass(frozen=True)
class Problem:
    """The Gramian of one step and what belongs to it; everything about the algorithm is a function of this.

    Attributes:
        gramian: G_ij = ⟨g_i, g_j⟩, shape (..., m, m), float64, symmetric up to rounding; the batch dimensions are the
            blocks of parameters that are treated apart (one for granularity="model").
        preferences: r_i ≥ 0, shape (m,), float64.
        tasks: The m names, in the order of the rows.
        losses: The m loss values, shape (m,), float64, or None if there are none (functional use, set_gradients).
        generator: Source of all random choices; None means a fresh one with seed 0.
        solvers: Who solves small programs on this Gramian.
        unwanted: The rows with r_i = 0, for which a device is not read. Surgeries that are not `linear` never see them.
    """

    gramian: Tensor
    preferences: Tensor
    tasks: tuple[str, ...]
    losses: Tensor | None = None
    generator: torch.Generator | None = None
    solvers: Solvers = HOST
    unwanted: tuple[int, ...] = ()

    @property
    def norms(self) -> Tensor:
        """‖g_i‖, shape (..., m)."""
        return self.gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
