"""The default direction and update, found by a least-squares solver that has nothing to do with the library."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

Vector = NDArray[np.float64]


def vector(tensors: Iterable[Tensor]) -> Vector:
    """All numbers of some tensors in one vector."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors]).numpy()


def gradients_of(losses: Iterable[Tensor], parameters: list[Tensor]) -> Vector:
    """One row per loss, by torch.autograd.grad, the graph kept; zeros where a loss does not reach."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    return np.stack([vector(row) for row in rows])


def nearest_without_conflict(v: Vector, J: Vector, metric: Vector | float = 1.0) -> Vector:
    """Solve min Σ (x − v)² / metric so that J x ≥ 0, by its dual, a least-squares problem with λ ≥ 0."""
    root = np.sqrt(metric * np.ones_like(v))
    J = J / np.linalg.norm(J, axis=1, keepdims=True)
    multipliers, _ = nnls((J * root).T, -v / root)
    return v + metric * (J.T @ multipliers)


def default_direction(J: Vector) -> Vector:
    """The sum of the rows, scaled to their mean norm, moved as little as possible to where it hurts no task."""
    norms = np.linalg.norm(J, axis=1, keepdims=True)
    return nearest_without_conflict((J * norms.mean() / norms).sum(0), J)
