"""Gradients of which some balance: three or more rows add up to nothing but for a part of 1e-8 to 1e-6."""

import numpy as np
import torch
from hypothesis import strategies as st

__all__ = ["balanced", "balanced_matrices"]


def balanced(rows: int, size: int, others: int, gap: float, seed: int) -> torch.Tensor:
    """Return `rows` rows of which a positive combination is `gap` long, and `others` besides, in random order.

    The last of the rows is minus the sum of the others, each times a positive number, plus `gap` times a random row.
    Even seeds draw small whole numbers, so that other ties happen as well. Zero rows are left out.
    """
    rng = np.random.default_rng(seed)
    entries = rng.standard_normal if seed % 2 else lambda shape: rng.integers(-3, 4, shape).astype(float)
    J = entries((rows + others, size))
    J[rows - 1] = -rng.uniform(0.5, 2, rows - 1) @ J[: rows - 1] + gap * rng.standard_normal(size)
    if seed % 3 == 0:
        J *= 10 ** rng.uniform(-2, 1, (len(J), 1))
    J = J[rng.permutation(len(J))]
    return torch.tensor(J[np.abs(J).sum(1) > 0])


balanced_matrices = st.builds(
    balanced,
    rows=st.integers(3, 6),
    size=st.integers(2, 8),
    others=st.integers(0, 5),
    gap=st.floats(-9, -5).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 10**6),
)
