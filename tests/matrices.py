"""Matrices of gradients, one row per task: hostile families, each a way to break a promise, and ordinary ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["FAMILIES", "draw", "matrix", "preferences"]

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def _random(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Independent rows: angles near 90°, mild conflicts."""
    return rng.standard_normal((m, P))


def _spread(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Norms over twelve orders of magnitude: a ridge that suits one row swamps another."""
    rows: np.ndarray = _random(rng, m, P) * 10 ** rng.uniform(-6, 6, (m, 1))
    return rows


def _surrounding(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Rows less 0.9 … 1.1 of their mean: their sum nearly cancels, and the cone is thin or only {0}."""
    J = _random(rng, m, P)
    rows: np.ndarray = J - J.mean(0) * rng.uniform(0.9, 1.1)
    return rows


def _nearly_opposite(gap: float) -> Draw:
    def rows(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
        J = _random(rng, m, P)
        for i in range(1, m, 2):
            noise = rng.standard_normal(P) * np.linalg.norm(J[i - 1]) / np.sqrt(P)
            J[i] = -J[i - 1] * 10 ** rng.uniform(-1, 1) + gap * noise
        return J

    rows.__doc__ = f"Pairs {gap:g} rad from 180°: in u all but that part cancels."
    return rows


def _opposite(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Pairs exactly opposite: Pareto stationary in their plane, so u must be 0 there and not rounding."""
    J = _random(rng, m, P)
    J[1::2] = -J[0 : m - m % 2 : 2] * 3
    return J


def _duplicates(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Equal rows: a singular Gramian, λ not unique, u unique."""
    J = _random(rng, m, P)
    J[1::2] = J[0 : m - m % 2 : 2]
    return J


def _zeros(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """Every third row zero: it wants nothing and must not turn others into NaN."""
    J = _random(rng, m, P)
    J[::3] = 0
    return J


def _rank_two(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
    """All rows in a plane: any three of them are dependent."""
    rows: np.ndarray = rng.standard_normal((m, 2)) @ rng.standard_normal((2, P))
    return rows


def _scaled(factor: float) -> Draw:
    def rows(rng: np.random.Generator, m: int, P: int) -> np.ndarray:
        scaled: np.ndarray = _random(rng, m, P) * factor
        return scaled

    rows.__doc__ = f"Everything times {factor:g}: an absolute tolerance would show."
    return rows


FAMILIES: dict[str, Draw] = {
    "random": _random,
    "spread": _spread,
    "surrounding": _surrounding,
    "nearly opposite 1e-2": _nearly_opposite(1e-2),
    "nearly opposite 1e-4": _nearly_opposite(1e-4),
    "nearly opposite 1e-6": _nearly_opposite(1e-6),
    "opposite": _opposite,
    "duplicates": _duplicates,
    "zeros": _zeros,
    "rank 2": _rank_two,
    "tiny": _scaled(1e-12),
    "huge": _scaled(1e12),
}


def draw(family: str, m: int, P: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return J, (m, P), of a family."""
    return torch.tensor(FAMILIES[family](np.random.default_rng(seed), m, P)).to(dtype)


def matrix(m: int, seed: int, P: int = 10, spread: float = 0.0) -> Tensor:
    """An ordinary J: m rows of P numbers less seven tenths of their mean; lengths differ by some `spread` decades."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(m, P, generator=generator, dtype=torch.float64)
    J = J - J.mean(0) * 0.7
    return J * 10 ** (spread * torch.randn(m, 1, generator=generator, dtype=torch.float64))


def preferences(m: int) -> Tensor:
    """Unequal ones, from 0.5 to 2."""
    return torch.linspace(0.5, 2, m, dtype=torch.float64)
