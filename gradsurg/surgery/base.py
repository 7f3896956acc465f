"""The two interfaces of surgeries: frozen options with one pure function. For those who add a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State

__all__ = ["ElementwiseSurgery", "Surgery", "check", "check_gramian"]


class Surgery(ABC):
    """Turns the Gramian of the (scaled) task gradients into one weight per task: u = Σ w_i g_i.

    Subclasses are frozen dataclasses whose fields are the options of the published method.

    Example:
        >>> import dataclasses, torch, gradsurg
        >>> @dataclasses.dataclass(frozen=True)
        ... class Loudest(gradsurg.Surgery):
        ...     name, paper, promise = "loudest", "-", "nothing"
        ...     def weights(self, problem, state):
        ...         norms = problem.norms
        ...         return (norms == norms.amax(-1, keepdim=True)).double(), state
        >>> J = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
        >>> gradsurg.combine(J, surgery=Loudest()).tolist()
        [-2.0, 1.0]
        >>> gradsurg.combine(J, surgery=Loudest(), guarantee="gradient").tolist()
        [0.0, 1.0]
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    # What holds of u on every instance, in one line. The table of methods shows it to users.
    promise: ClassVar[str]
    # Whether ⟨u, g_i⟩ ≥ 0 for every task on every instance, so that the gradient guarantee has nothing to do.
    conflict_free: ClassVar[bool] = False
    # Whether the weights are found on the host, for which a step on a CUDA device waits once. If False, `weights`
    # launches only operations on the Gramian's device, solves with problem.solvers, and keeps no state.
    waits: ClassVar[bool] = True
    # Whether a task with r_i = 0 has no part in u although `weights` gets its row, as if u = Σ r_i g_i'.
    linear: ClassVar[bool] = False
    # Of the state: one that another version saved is not loaded.
    version: ClassVar[int] = 1
    # What the weights depend on: the "products" of the gradients, which of them are "zeros", or "nothing".
    reads: ClassVar[str] = "products"

    @property
    def label(self) -> str:
        """Say whose state it is that this surgery keeps."""
        return f"{getattr(self, 'name', type(self).__name__)} {self.version}"

    @abstractmethod
    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Return the weights and the next state.

        Args:
            problem: What is known of the step. `problem.gramian` is that of the rows after normalisation; a row of
                zeros is a task that wants nothing, and must get a finite weight.
            state: As for `Normalizer.scales`.

        Returns:
            Weights of shape (..., m), float64 and finite, and the state to be handed in next time.
        """


class ElementwiseSurgery(Surgery):
    """Turns every column of the gradient matrix into one number of u, without looking at the other columns.

    Not invariant to a rotation of parameter space, and without weights: wrap() and combine() call `combine`, one
    parameter at a time. Normalisation before it and guarantees after it work as for any surgery; levels of priority,
    which weigh whole gradients, do not.
    """

    # Whether `combine` draws from its generator.
    draws: ClassVar[bool] = True

    @abstractmethod
    def combine(self, columns: Tensor, preferences: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return u, shape (n,).

        Args:
            columns: n numbers of every task's (scaled) gradient, shape (m', n), of the tasks that have a gradient for
                them; float32 or float64. Not to be written to.
            preferences: Their r_i, shape (m',), of the same dtype and device; None for 1 each.
            generator: Source of all random choices, on the CPU.
        """

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Raise a ValueError: there are none."""
        raise ValueError(
            f"surgery={self.name!r} treats every number of the gradients by itself, so it has no weights and needs the "
            "rows: use gradsurg.combine(J, ...) or gradsurg.wrap(...), without primary="
        )


def check(option: str, value: object, valid: bool, must: str) -> None:
    """Raise a ValueError that says what an option of a method must be, unless the value is valid."""
    if not valid:
        raise ValueError(f"{option}={value!r}: must {must}")


def check_gramian(gramian: Tensor) -> None:
    """Raise a ValueError for what cannot be inner products of vectors; a matrix on a device is not read."""
    if not gramian.is_cpu:
        return
    G = gramian.detach().double()
    squares = G.diagonal(dim1=-2, dim2=-1)
    lengths = squares.clamp(min=0).sqrt()
    bound = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    # The rounding of long sums in the dtype that it came in.
    slack = 1e3 * torch.finfo(gramian.dtype).eps
    wrong = ((G - G.mT).abs() > slack * bound) | (G.abs() > (1 + slack) * bound) & (bound > 0)
    if bool((squares < 0).any() | wrong.any()):
        raise ValueError(
            "gramian is no matrix of inner products: it must be symmetric, with G_ii ≥ 0 and |G_ij| ≤ √(G_ii G_jj). "
            "From the gradients J, one per row, it is J @ J.T"
        )
