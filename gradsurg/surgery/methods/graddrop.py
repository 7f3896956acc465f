"""GradDrop: every number of the gradient keeps one sign, drawn by how much the tasks agree on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.surgery.base import ElementwiseSurgery, check

__all__ = ["GradDrop"]


@dataclass(frozen=True)
class GradDrop(ElementwiseSurgery):
    """Per element: u = Σ (ℓ + (1 − ℓ) M_i) r_i g_i, where M_i = 1 for g_i of the sign that was drawn, else 0.

    The purity P = ½ (1 + Σ r_i g_i / Σ r_i |g_i|) is 1 if all tasks pull upwards and 0 if all pull downwards;
    the positive sign is drawn with probability f(P) = ½ + k (P − ½), cut to [0, 1].

    When it fails: it depends on the coordinates, and drops half of what tasks disagree on, at random; the direction may
    conflict with any of them.

    Args:
        leak: ℓ in [0, 1], the share of a dropped gradient that goes through all the same; 1 is the plain sum.
        sharpness: k ≥ 0 of f; 1 is f(P) = P, large is the vote of the majority.

    Source: Chen et al. 2020, "Just pick a sign", equation 1 and algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, -2.0], [3.0, -1.0]])
        >>> gradsurg.combine(J, surgery="graddrop").tolist()
        [4.0, -3.0]
    """

    leak: float = 0.0
    sharpness: float = 1.0
    name, paper = "graddrop", "Chen et al. 2020"
    promise = "the sum, if all tasks agree on a number's sign; nothing for the direction"

    def __post_init__(self) -> None:
        check("leak", self.leak, 0 <= self.leak <= 1, "lie in [0, 1]")
        check("sharpness", self.sharpness, self.sharpness >= 0, "not be negative")

    def combine(self, columns: Tensor, preferences: Tensor | None, generator: torch.Generator) -> Tensor:  # noqa: D102
        # On the CPU, so that every device draws the same signs.
        drawn = torch.rand(columns.shape[1], generator=generator, dtype=columns.dtype).to(columns.device)
        rows = columns if preferences is None else columns * preferences[:, None]
        total, size = rows.sum(0), rows.abs().sum(0)
        purity = 0.5 + 0.5 * self.sharpness * torch.where(size > 0, total / size, 0)
        up = (purity > drawn)[None]
        kept = torch.where(up, rows.clamp(min=0), rows.clamp(max=0)).sum(0)
        return kept + self.leak * (total - kept)
