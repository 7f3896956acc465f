"""Who solves the small programs of a step: Python and torch on the host, or a kernel where the Gramian is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.rows import project_rows
from gradsurg.solvers.simplex import simplex

__all__ = ["HOST", "Solvers"]


@dataclass(frozen=True)
class Solvers:
    """Three functions of the same arguments and answers, whoever provides them.

    Attributes:
        nonnegative: As solvers.nonnegative.
        simplex: As solvers.simplex.
        project_rows: As solvers.project_rows.
    """

    nonnegative: Callable[..., Tensor]
    simplex: Callable[..., Tensor]
    project_rows: Callable[..., Tensor]


HOST = Solvers(nonnegative, simplex, project_rows)
