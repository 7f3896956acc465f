"""PCGrad: conflicts are projected away pair by pair, in random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["PCGrad"]


@dataclass(frozen=True)
class PCGrad(Surgery):
    """u = Σ r_i g_i^PC, where g_i^PC is g_i with its conflicts removed one after the other.

    For the other tasks j in random order: v ← v − min(0, ⟨v, g_j⟩) / ‖g_j‖² · g_j, starting from v = g_i. All of it
    happens to the coefficients of v in the gradients, so it costs m² numbers and not m·P.

    When it fails: removing the conflict with one task can bring back that with another, so for three tasks and more
    nothing is promised of u; `guarantee="gradient"` adds what is missing. The answer depends on the order drawn.

    Source: Yu et al. 2020, "Gradient surgery for multi-task learning", algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> gradsurg.weights(G, surgery="pcgrad").tolist()
        [1.5, 1.5]
    """

    name, paper = "pcgrad", "Yu et al. 2020"
    promise = "no conflict for two tasks; nothing for more"
    linear = True

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        gramian = problem.gramian
        m = gramian.shape[-1]
        generator = problem.generator or torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(m, generator=generator) for _ in range(m)], dim=1)
        orders = orders.to(gramian.device)
        squares = gramian.diagonal(dim1=-2, dim2=-1)
        inverse_squares = torch.where(squares > 0, 1 / squares.where(squares > 0, torch.ones_like(squares)), 0)
        own = torch.arange(m, device=gramian.device)
        coefficients = torch.eye(m, dtype=gramian.dtype, device=gramian.device).expand(gramian.shape).clone()
        # Step k of all m projections at once: row i meets task others[i].
        for others in orders:
            inner = (coefficients * gramian[..., others, :]).sum(-1)
            amount = (-inner).clamp(min=0) * inverse_squares[..., others] * (others != own)
            coefficients[..., own, others] += amount
        return problem.preferences @ coefficients, state
