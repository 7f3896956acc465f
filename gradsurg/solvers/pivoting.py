"""The nonnegative program for many tasks or many programs at once, in torch; active_set.py does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.solvers.active_set import CLEAR, CLEAR_ROUNDINGS, RESIDUAL, solve_small

__all__ = ["TURNS", "solve_batched"]

# Ordinary gradients are done after 2 to 5 turns, whatever m up to 64; those that need more than this seldom finish.
TURNS = 8
# Accepted violation, as a cosine; more only if G's own rounding is more.
VIOLATION = 1e-13
# Numbers in the matrices of one turn from which on it pays to leave finished programs out of the next: m = 32 or so.
LARGE = 1 << 15


def solve_batched(
    G: Tensor, b: Tensor, allowed: Tensor | None, scale: Tensor | None, rounding: float
) -> tuple[Tensor, list[int]]:
    """Return λ, (n, m), and the number of changes of the passive set of each of n programs.

    Block principal pivoting: guess the passive set (at first, all tasks in conflict), compute λ inside and the
    residuals r outside, send every task whose number is negative to the other side, repeat. Nothing proves that this
    ends, but if it does, λ ≥ 0 inside and r ≥ 0 outside are the optimality conditions. One LU solve gives both:
    M y = −q; M has A's columns for tasks inside and −I's outside. It is backward stable, so r can be believed while Σλ
    is moderate. Programs that are not done after 8 turns, or whose Σλ is large, go to the active-set method; those in
    which tasks depend on each other and b is not in the range of G are among them.

    Arguments as for `nonnegative`: G of shape (n, m, m), or (m, m) for one Gramian in all programs, b and allowed
    (n, m), scale (n,); all finite.

    Source: Júdice & Pires 1994, "A block principal pivoting algorithm for large-scale strictly monotone linear
    complementarity problems".
    """
    s = G.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).rsqrt()  # a row of zeros: q_i = 0, so it never enters
    A, right = G * s.unsqueeze(-2) * s.unsqueeze(-1), b * -s
    size = right.abs().amax(-1, keepdim=True) if scale is None else scale.unsqueeze(-1)
    least = size * -max(VIOLATION, RESIDUAL * rounding)
    if allowed is not None:
        right, least = right.where(allowed, 0), least.where(allowed, -torch.inf)
    lam, done, turns = _exchange(A, right, least)
    # A task that adds a squared length ε to the passive set makes multipliers of up to 1/√ε.
    moderate = size * max(CLEAR, CLEAR_ROUNDINGS * rounding) ** -0.5
    trusted = lam.sum(-1, keepdim=True) <= moderate  # False for a NaN
    answer, counts = lam * s, [turns] * len(b)
    if done is None and trusted.all().item():
        return answer, counts
    left = ~trusted.squeeze(-1) if done is None else ~(trusted.squeeze(-1) & done)
    for p in left.nonzero().squeeze(-1).tolist():
        found, count = solve_small(
            (G if G.ndim == 2 else G[p]).tolist(),
            [b[p].tolist()],
            None if allowed is None else [allowed[p].tolist()],
            None if scale is None else [scale[p].item()],
            rounding,
        )
        answer[p], counts[p] = torch.tensor(found[0], dtype=torch.float64, device="cpu"), turns + count[0]
    return answer, counts


def _exchange(A: Tensor, right: Tensor, least: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return λ, for which programs it is the answer (None for all), and the number of turns."""
    large = right.shape[-1] * right.numel() > LARGE
    minus = torch.eye(right.shape[-1], dtype=torch.float64, device="cpu").neg_()
    passive = right > 0
    y, wrong = _turn(A, minus, right, least, passive)
    for turn in range(1, TURNS):
        if not wrong.any().item():
            return torch.where(passive, y, 0), None, turn
        passive = passive ^ wrong
        if large:
            rows = wrong.any(-1).nonzero().squeeze(-1)
            part = A if A.ndim == 2 else A[rows]
            y[rows], wrong[rows] = _turn(part, minus, right[rows], least[rows], passive[rows])
        else:
            y, wrong = _turn(A, minus, right, least, passive)
    return torch.where(passive, y, 0), ~wrong.any(-1), TURNS


def _turn(A: Tensor, minus: Tensor, right: Tensor, least: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.linalg.solve_ex(torch.where(passive.unsqueeze(-2), A, minus), right)[0]
    return y, y < torch.where(passive, 0, least)
