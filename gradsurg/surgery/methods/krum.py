"""Krum: the gradient that most others are near to, so that a few wrong ones have no say."""

from __future__ import annotations

from dataclasses import dataclass

from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import Block, BlockwiseSurgery, Memory, Vector

__all__ = ["Krum"]

# ‖g_i − g_j‖² = G_ii + G_jj − 2 G_ij is rounding below this share of G_ii + G_jj.
SAME = 16 * 2.0**-53


@dataclass(frozen=True)
class Krum(BlockwiseSurgery):
    """u = the g_i with the least Σ ‖g_i − g_j‖² over the m − f − 2 gradients nearest to it; Multi-Krum: several.

    Of several selected, weights are ∝ r_i and add up to 1. Equal scores share a place, so that the order of the tasks
    does not matter. With fewer than f + 3 tasks the nearest one alone is looked at.

    When it fails: it is meant for copies of *one* task of which f are corrupt. Of different tasks it follows one and
    ignores the others, most often that with the smallest gradient.

    Args:
        byzantine: f, the number of gradients that may be corrupt.
        selected: How many gradients to average (1 is Krum, more Multi-Krum).

    Source: Blanchard et al. 2017, "Machine learning with adversaries", section 4.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-90.0, 90.0]])
        >>> gradsurg.weights(J @ J.T, surgery=gradsurg.surgery.Krum(byzantine=0)).tolist()
        [0.0, 1.0, 0.0, 0.0]
    """

    byzantine: int = 0
    selected: int = 1
    name, paper = "krum", "Blanchard et al. 2017"
    promise = "f corrupt copies of a task among 2f + 3 cannot turn it; nothing for different tasks"

    def __post_init__(self) -> None:
        check("byzantine", self.byzantine, self.byzantine >= 0, "not be negative")
        check("selected", self.selected, self.selected >= 1, "be at least 1")

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        G = block.gramian
        m = len(G)
        near = min(max(m - self.byzantine - 2, 1), m - 1)
        scores = []
        for i, row in enumerate(G):
            distances = []
            for j in range(m):
                total = row[i] + G[j][j]
                square = total - row[j] - G[j][i]
                if j != i:
                    distances.append(square if square > SAME * total else 0.0)
            scores.append(sum(sorted(distances)[:near]))
        weights, free = [0.0] * m, min(self.selected, m)
        for score in sorted(set(scores)):
            tied = [i for i, x in enumerate(scores) if x == score]
            for i in tied:
                weights[i] = block.preferences[i] * min(free / len(tied), 1.0)
            free -= len(tied)
            if free <= 0:
                break
        total = sum(weights)
        return [w / total for w in weights], {}
