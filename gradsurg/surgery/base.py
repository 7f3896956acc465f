"""What every surgery is: a frozen set of options with one pure function, (problem, state) -> (weights, state)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Generator, Tensor

from gradsurg.solvers.problem import Problem, State

__all__ = ["Surgery"]


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
    # What holds of u on every instance, in one line: it is shown to users in the table of methods.
    promise: ClassVar[str]
    # True where ⟨u, g_i⟩ ≥ 0 for every task on every instance, so that the gradient guarantee has nothing to do.
    conflict_free: ClassVar[bool] = False
    # Whether the weights are found on the host, for which a step on a CUDA device has to wait once. Where it is False,
    # `weights` launches only operations on the Gramian's device, solves with problem.solvers, and keeps no state.
    waits: ClassVar[bool] = True

    @property
    def measures_excess(self) -> bool:
        """Whether `weights` wants problem.excess, for which wrap() hands the rows to gradsurg.surgery.methods.excess_mtl."""
        return False

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

    def shortcut(self, gramian: Tensor, generator: Generator | None) -> Tensor | None:
        """Return what `weights` would for preferences of 1 and no state, or None where it must be asked.

        For `gradsurg.weights` alone, whose calls are to cost microseconds; a method without one is complete.

        Args:
            gramian: Shape (m, m), of any floating dtype, on the CPU.
            generator: As problem.generator: what is drawn from it must be what `weights` would draw.

        Returns:
            Weights of shape (m,), with the Gramian's dtype; 0 where only u = 0 is left of a conflict-free method.
        """
        del gramian, generator
        return None
