"""gradsurg.Steps: methods that remember earlier steps, over one matrix after another, without an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurg.linalg.gramian import gramian as gramian_of
from gradsurg.normalize import Normalizer
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.tolerances import ROUNDING_EXACT
from gradsurg.surgery import Surgery
from gradsurg.surgery.functional import make_pipeline, numbers_of, row_names

__all__ = ["Steps"]


class Steps:
    """Finds the weights of one step after another, as a wrapped optimizer does.

    `gradsurg.weights` and `gradsurg.combine` know no earlier step, so modo, gradvac, excess_mtl, cr_mogm and the
    learned normalisers always take their first step there.

    Args:
        surgery: A name or a Surgery.
        normalize: A name or a Normalizer.
        preferences: r_i > 0, one per row, or a dict from row to number (1 for the others).
        guarantee: "gradient" or "none", as for `gradsurg.weights`.
        seed: Of methods that draw random numbers.

    Attributes:
        state: What the methods remember; plain numbers, dicts, lists and tensors, {} at first.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> steps = gradsurg.Steps("modo")
        >>> first, second = steps.weights(G), steps.weights(G)
        >>> bool(first[1] > second[1])  # towards the least norm, a step at a time
        True
    """

    def __init__(
        self,
        surgery: str | Surgery = "modo",
        *,
        normalize: str | Normalizer = "none",
        preferences: Tensor | Sequence[float] | Mapping[int, float] | None = None,
        guarantee: str = "none",
        seed: int = 0,
    ) -> None:
        self._pipeline = make_pipeline(surgery, normalize, None, "protect", guarantee, ())
        self._preferences, self._generator = preferences, torch.Generator().manual_seed(seed)
        self.state: Mapping[str, Any] = {}

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the weights of this step, shape (m,), and remember it; `losses` for normalisers that need them."""
        if not isinstance(gramian, Tensor) or gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
            raise ValueError("gramian must be one matrix of shape (m, m), a step's")
        m = len(gramian)
        problem = Problem(
            gramian=gramian.detach().double().unsqueeze(0),
            preferences=numbers_of(self._preferences, m, gramian.device),
            tasks=row_names(m),
            losses=None if losses is None else losses.detach().double(),
            generator=self._generator,
        )
        direction = self._pipeline.direction(problem, self.state, ROUNDING_EXACT)
        self.state = direction.state
        return direction.weights[0].to(gramian.dtype)

    def combine(self, J: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the direction u = Σ w_i g_i of the rows of J in this step, and remember it."""
        exact = J.detach().double()
        return (self.weights(gramian_of([[row] for row in exact], exact=True), losses).to(exact) @ exact).to(J.dtype)
