"""The nonnegative quadratic program: projecting onto the dual cone of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.solvers.batched import solve_batched
from gradsurg.solvers.small import solve_small

__all__ = ["nonnegative", "path"]

# Programs in plain Python floats beat torch calls of 2 µs each while they are few and small; see `path`.
SMALL_TASKS = 16
SMALL_PROGRAMS = 32


def nonnegative(
    gramian: Tensor,
    linear: Tensor,
    *,
    allowed: Tensor | None = None,
    scale: Tensor | None = None,
    rounding: float = 4e-16,
) -> Tensor:
    """Return λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀb.

    With b_i = ⟨t, g_i⟩ this is the dual of projecting t onto the cone {u : ⟨u, g_i⟩ ≥ 0}: u = t + Σ λ_i g_i. The
    answer satisfies r = Gλ + b ≥ 0 and λ_i r_i = 0; it is unique in u, and in λ where G is regular.

    An active-set method: rows are scaled to unit length, then tasks enter the passive set, most violated first, and
    leave it when their multiplier would turn negative; each step solves with the Cholesky factor of the passive part.
    Nothing is added to the diagonal. A task enters only if its part orthogonal to the passive set is longer than
    √(8 · rounding), so a refused one is violated by at most that cosine of ‖u‖. At most 8m + 16 steps are done;
    the tests hold every instance they draw to 2m + 2.

    Args:
        gramian: G, shape (..., m, m), symmetric positive semidefinite; solved in float64. May be singular.
        linear: b, shape (..., m); batch dimensions broadcast with those of G.
        allowed: Bool, shape (..., m): where False, λ_i = 0 and constraint i is ignored. None is all.
        scale: ‖t‖, shape (...): makes violations cosines. None takes max |b_i| / ‖g_i‖, a lower bound.
        rounding: Relative error of G's entries, |error of G_ij| / (‖g_i‖ ‖g_j‖).

    Returns:
        λ, shape (..., m), float64, on G's device. 0 for a zero row and wherever b ≥ 0; NaN throughout a program
        that would have to be solved and has a NaN or an infinity in it. Problems on other devices are copied to the
        CPU and the answers back.

    Source: Lawson & Hanson 1974, "Solving least squares problems", chapter 23, in Gramian form.

    Example:
        >>> import torch
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
        >>> nonnegative(G, G @ torch.ones(2)).tolist()      # the sum hurts row 0: one unit of it is added
        [1.0, 0.0]
    """
    device, m = gramian.device, gramian.shape[-1]
    G, b = gramian.detach().double().cpu(), linear.detach().double().cpu()
    if G.shape[-2] != m or b.shape[-1] != m:
        raise ValueError(
            f"gramian {tuple(gramian.shape)} and linear {tuple(linear.shape)} must be (..., m, m), (..., m)"
        )
    shape = _batch_shape(G, b, allowed, scale)
    if b.numel() and b.min().item() >= 0:  # nobody is in conflict; False with a NaN
        return torch.zeros(*shape, m, dtype=torch.float64, device=device)
    rights = _rows(b, shape)
    masks = None if allowed is None else _rows(allowed.cpu(), shape)
    scales = None if scale is None else scale.double().cpu().expand(shape).reshape(-1)
    if path(m, len(rights), one_gramian=G.numel() == m * m) == "small":
        answer = _one_gramian(G.reshape(m, m), rights, masks, scales, rounding)
    else:
        answer, _ = solve_batched(G.expand(*shape, m, m).reshape(-1, m, m), rights, masks, scales, rounding)
    return answer.reshape(*shape, m).to(device)


def _one_gramian(G: Tensor, b: Tensor, masks: Tensor | None, scales: Tensor | None, rounding: float) -> Tensor:
    answers = solve_small(
        G.tolist(),
        b.tolist(),
        None if masks is None else masks.tolist(),
        None if scales is None else scales.tolist(),
        rounding,
    )
    return torch.tensor(answers, dtype=torch.float64)


def _batch_shape(G: Tensor, b: Tensor, allowed: Tensor | None, scale: Tensor | None) -> torch.Size:
    if G.numel() == G.shape[-1] ** 2 and G.ndim <= b.ndim + 1 and allowed is None and scale is None:
        return b.shape[:-1]  # broadcast_shapes takes 8 µs
    extras = [t.shape[:-1] for t in (allowed,) if t is not None] + [t.shape for t in (scale,) if t is not None]
    shape: torch.Size = torch.broadcast_shapes(G.shape[:-2], b.shape[:-1], *extras)
    return shape


def _rows(vectors: Tensor, shape: torch.Size) -> Tensor:
    if vectors.shape[:-1] != shape:
        vectors = vectors.expand(*shape, vectors.shape[-1])
    return vectors if vectors.ndim == 2 else vectors.reshape(-1, vectors.shape[-1])


def path(m: int, programs: int, one_gramian: bool) -> str:
    """Return which twin solves `programs` programs in m tasks: "small" (Python floats) or "batched" (torch)."""
    return "small" if one_gramian and m <= SMALL_TASKS and programs <= SMALL_PROGRAMS else "batched"
