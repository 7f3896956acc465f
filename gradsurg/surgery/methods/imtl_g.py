"""IMTL-G: the direction on which all task gradients have the same projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.pseudoinverse import equal_pull
from gradsurg.surgery.base import Surgery

__all__ = ["IMTLG"]


@dataclass(frozen=True)
class IMTLG(Surgery):
    """u = Σ α_i g_i with Σ α_i = 1 and the same ⟨u, g_i⟩ / (r_i ‖g_i‖) for every task.

    With A the Gramian of the unit gradients, v = A⁺ r and α_i ∝ v_i / ‖g_i‖. Dependent gradients get the least squares
    answer, opposite ones u = 0.

    When it fails: the common projection has the sign of Σ v_i / ‖g_i‖. If that is negative, which takes norms that
    differ and three tasks or more, u makes *every* task worse; if it is near zero, u is very long. Normalised rows
    rule out both: the sum is then rᵀ A⁺ r > 0, for equal r. Its α_i may be negative.

    Source: Liu et al. 2021, "Towards impartial multi-task learning", equation 8 (r_i = 1 there).

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
        >>> gradsurg.weights(G, surgery="imtl_g").tolist()
        [0.75, 0.25]
    """

    name, paper = "imtl_g", "Liu et al. 2021"
    promise = "equal cosines with all tasks if the gradients are independent; no conflict if normalised"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        pull = equal_pull(problem.gramian, problem.preferences)
        total = pull.sum(-1, keepdim=True)
        # A sum below the rounding of its terms has no sign, and no direction can be read off it.
        nothing = total.abs() <= 1e-14 * pull.abs().sum(-1, keepdim=True)
        return (pull / total).masked_fill_(nothing, 0), state
