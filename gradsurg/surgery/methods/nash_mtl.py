"""Nash-MTL: the direction that tasks would agree on if they bargained."""

from __future__ import annotations

from dataclasses import dataclass

from gradsurg.errors import choose
from gradsurg.surgery.blockwise import UNITS, Block, BlockwiseSurgery, Memory, Vector
from gradsurg.surgery.methods.fairgrad import fair_weights

__all__ = ["NashMTL"]


@dataclass(frozen=True)
class NashMTL(BlockwiseSurgery):
    """u = Σ α_i g_i with α > 0 and G α = r / α: maximises Σ r_i log ⟨u, g_i⟩ on a sphere.

    Then ⟨u, g_i⟩ = r_i / α_i > 0 for every task, and the direction is unchanged when one gradient is scaled. At Pareto
    stationary points u = 0. The solution is exact; the authors' code does at most 20 steps of a concave–convex
    procedure from the weights of the last step, so its answer depends on where training has been, and cuts u to length
    1 (clip the gradient if you want that).

    The equation fixes ‖u‖ to √Σ r_i whatever the gradients. So they are measured in units of their root mean square
    norm, and u grows with them: orthogonal ones of equal norm give the plain sum.

    When it fails: near Pareto stationary points u keeps its length, with weights that grow without bound.

    Args:
        units: "relative", or "absolute" for the equation as it is printed.

    Source: Navon et al. 2022, "Multi-task learning as a bargaining game", claim 3.1 (r_i = 1 there).

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="nash_mtl").tolist()
        [1.0, 1.0]
    """

    units: str = "relative"
    name, paper = "nash_mtl", "Navon et al. 2022"
    promise = "no conflict, and a direction that the scale of a loss does not change"
    conflict_free = True

    def __post_init__(self) -> None:
        choose("units", self.units, UNITS)

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        return fair_weights(1.0, self.units, block), {}
