"""The nonnegative quadratic program: projecting onto the dual cone of the gradients."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from gradsurg.solvers.active_set import solve_small
from gradsurg.solvers.pivoting import solve_batched

__all__ = ["nonnegative", "path"]

# Programs times m² up to which Python floats win in the mean of strongly and mildly conflicting rows. Small against
# batched, µs: 4 programs of 4 tasks 55 : 80, 5 of 5 110 : 110, 6 of 6 115 : 90, 8 of 8 335 : 120; 1 of 12 70 : 105.
SMALL = 200


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
    answer satisfies r = Gλ + b ≥ 0 and λ_i r_i = 0. It is unique in u, and also in λ if G is regular.

    Active-set methods, in rows scaled to unit length; nothing is added to the diagonal. Few small programs are solved
    one task at a time (active_set.py), others by block exchange first (pivoting.py). A task that depends on the passive
    ones replaces one of them, so b need not lie in the range of G. One attempt stops after 4m + 8 changes of the
    passive set. The tests hold it to 2m + 2 if b = Gr. An answer that violates a task is replaced by up to three more
    attempts with coarser roundings, each of 4m + 8 changes at most; block exchange takes 8 turns before all that.

    If no direction has what b asks for, the program has no minimum. Then λ is finite, at least one r_i is clearly
    negative, and the caller has to look: margins count as out of reach, PCD drops its shares.

    What holds of the answer, with r_i / (‖g_i‖ ‖t‖) and λ_i ‖g_i‖ / ‖t‖ for r_i and λ_i, and S = Σλ, of a finite G
    that is positive semidefinite to `rounding`:
    λ_i ≥ 0 always. r_i ≥ −1e-9 on every family of the tests, typically −1e-15 (1 + S). λ_i r_i is 0 up to
    1e-15 (1 + S)², which no float64 λ can better: rounding λ alone moves r by 1e-16 S. S is below 10 for most
    gradients, and 1/ε if two are within ε of opposite.
    A task whose part orthogonal to the passive set is shorter than √(8 · rounding) may be refused; it is then violated
    by at most that cosine of ‖u‖. If G is singular and its cone so thin that S > 1e3, G's own rounding moves r_i
    by up to rounding · (1 + S)²: 6e-9 was met once in 10³ draws of 16 tasks in 9 dimensions.

    Args:
        gramian: G, shape (..., m, m), symmetric positive semidefinite; solved in float64. May be singular.
        linear: b, shape (..., m); batch dimensions broadcast with those of G.
        allowed: Bool, shape (..., m): if False, λ_i = 0 and constraint i is ignored. None is all.
        scale: ‖t‖, shape (...): makes violations cosines. None takes max |b_i| / ‖g_i‖, a lower bound.
        rounding: Relative error of G's entries, |error of G_ij| / (‖g_i‖ ‖g_j‖).

    Returns:
        λ, shape (..., m), float64, on G's device. 0 for a zero row and wherever b ≥ 0; NaN throughout a program with a
        NaN or an infinity in its G or b. Problems on other devices are copied to the CPU and the answers back.

    Raises:
        ValueError: Shapes do not fit.

    Source: Lawson & Hanson 1974, "Solving least squares problems", chapter 23, in Gramian form; Goldfarb & Idnani
    1983 for the exchange.

    Example:
        >>> import torch
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
        >>> nonnegative(G, G @ torch.ones(2)).tolist()  # the sum hurts row 0: one unit of it is added
        [1.0, 0.0]
    """
    device, m = gramian.device, gramian.shape[-1]
    G, b = gramian.detach().double().cpu(), linear.detach().double().cpu()
    if G.shape[-2] != m or b.shape[-1] != m:
        raise ValueError(
            f"gramian {tuple(gramian.shape)} and linear {tuple(linear.shape)} must be (..., m, m), (..., m)"
        )
    shape = _batch_shape(G, b, allowed, scale)
    if b.numel() == 0:
        return torch.zeros(*shape, m, dtype=torch.float64, device=device)
    low, high = (extreme.item() for extreme in b.aminmax())  # NaN if there is one
    finite = -inf < low and high < inf and isfinite(G.sum().item())
    # No task is in conflict.
    if finite and low >= 0:
        return torch.zeros(*shape, m, dtype=torch.float64, device=device)
    G = G.reshape(m, m) if G.numel() == m * m else G.expand(*shape, m, m).reshape(-1, m, m)
    b = _rows(b, shape)
    masks = None if allowed is None else _rows(allowed.cpu(), shape)
    scales = None if scale is None else scale.detach().double().cpu().expand(shape).reshape(-1)
    answer = _solve(G, b, masks, scales, rounding) if finite else _isolate(G, b, masks, scales, rounding)
    return answer.reshape(*shape, m).to(device)


def path(m: int, programs: int) -> str:
    """Return which twin solves `programs` programs in m tasks: "small" (Python floats) or "batched" (torch)."""
    return "small" if programs * m * m <= SMALL else "batched"


def _solve(G: Tensor, b: Tensor, masks: Tensor | None, scales: Tensor | None, rounding: float) -> Tensor:
    if path(b.shape[-1], len(b)) == "batched":
        return solve_batched(G, b, masks, scales, rounding)[0]
    matrices = [G.tolist()] if G.ndim == 2 else G.tolist()
    rights = b.tolist()
    mask_rows = None if masks is None else masks.tolist()
    lengths = None if scales is None else scales.tolist()
    if len(matrices) == 1:
        answers, _ = solve_small(matrices[0], rights, mask_rows, lengths, rounding)
    else:
        answers = []
        for p, matrix in enumerate(matrices):
            mask, length = mask_rows and [mask_rows[p]], lengths and [lengths[p]]
            answers += solve_small(matrix, [rights[p]], mask, length, rounding)[0]
    return torch.tensor(answers, dtype=torch.float64, device="cpu")


def _isolate(G: Tensor, b: Tensor, masks: Tensor | None, scales: Tensor | None, rounding: float) -> Tensor:
    """Solve the programs that are finite and return NaN for the others."""
    bad = ~(torch.isfinite(b).all(-1) & torch.isfinite(G).all(-1).all(-1))
    if G.ndim == 2 and not torch.isfinite(G).all():
        return torch.full_like(b, torch.nan)
    if G.ndim == 3:
        G = G.masked_fill(bad[:, None, None], 0)
    answer = _solve(G, b.masked_fill(bad.unsqueeze(-1), 0), masks, scales, rounding)
    return answer.masked_fill(bad.unsqueeze(-1), torch.nan)


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
