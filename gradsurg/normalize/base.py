"""The interface of normalisers: frozen options with one pure function. For those who add a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from gradsurg.solvers.problem import Problem, State

__all__ = ["Normalizer"]


class Normalizer(ABC):
    """Gives every task one positive scale s_i, computed without gradient flowing through it.

    Subclasses are frozen dataclasses whose fields are the options. `scales` is called once per step, before surgery,
    with the raw Gramian. A common factor of the scales does not matter: the caller multiplies them by the factor that
    keeps the mean of the tasks' gradient norms, so that learning rates keep their meaning.

    Example:
        >>> import dataclasses, torch, gradsurg
        >>> @dataclasses.dataclass(frozen=True)
        ... class RootOfNorm(gradsurg.Normalizer):
        ...     name, paper = "root_of_norm", "-"
        ...     def scales(self, problem, state):
        ...         return problem.norms.clamp(min=1e-12) ** -0.5, state
        >>> G = torch.diag(torch.tensor([1.0, 81.0]))  # norms 1 and 9 become as 1 to 3
        >>> w = gradsurg.weights(G, "sum", normalize=RootOfNorm())
        >>> (w * G.diagonal().sqrt()).tolist()
        [2.5, 7.5]
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    # Of the state: one that another version saved is not loaded.
    version: ClassVar[int] = 1
    # Whether the scales are found on the host, for which a step on a CUDA device waits once.
    waits: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Say whose state it is that this normaliser keeps."""
        return f"{getattr(self, 'name', type(self).__name__)} {self.version}"

    @abstractmethod
    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Return the scales and the next state.

        Args:
            problem: What is known of the step; `problem.losses` is None if the caller has none.
            state: What this normaliser returned the last time, {} at first; plain numbers, strings, lists, dicts
                and tensors only, because it is saved in the optimizer's state dict. State per task is keyed
                by its name, since tasks come and go. Never modified in place.

        Returns:
            Scales of shape (..., m), float64, nonnegative and finite, and the state to be handed in next time.

        Raises:
            ValueError: The losses are not what the method needs (given, positive); the message names the task and
                the value.
        """
