"""The nonnegative program for many tasks or many programs at once, in torch: the plain twin of small.py."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve_batched"]


def solve_batched(
    G: Tensor, b: Tensor, allowed: Tensor | None, scale: Tensor | None, rounding: float
) -> tuple[Tensor, Tensor]:
    """Return λ, (n, m), and the number of pivots of each of n programs; arguments as for `nonnegative`."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    s = torch.where(diagonal > 0, diagonal.clamp(min=0).rsqrt(), 0)
    A, q = G * s.unsqueeze(-1) * s.unsqueeze(-2), b * s
    size = q.abs().amax(-1) if scale is None else scale
    broken = ~(torch.isfinite(A).all(-1).all(-1) & torch.isfinite(b).all(-1) & torch.isfinite(size))
    idle = broken | (size == 0)
    A, s = torch.where(broken[:, None, None], 0, A), torch.where(broken[:, None], 0, s)
    q = torch.where(idle[:, None], 0, q / torch.where(idle, 1, size)[:, None])
    usable = s > 0 if allowed is None else (s > 0) & allowed
    lam, pivots = _active_set(A, q, usable, rounding)
    answer = torch.where(idle, 0, size)[:, None] * lam * s
    return answer.masked_fill(broken[:, None], float("nan")), pivots


def _active_set(A: Tensor, q: Tensor, usable: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    n, m = q.shape
    eye = torch.eye(m, dtype=A.dtype)
    lam = torch.zeros_like(q)
    passive, banned = torch.zeros_like(usable), torch.zeros_like(usable)
    done = torch.zeros(n, dtype=torch.bool)
    pivots = torch.zeros(n, dtype=torch.long)
    for _ in range(8 * m + 16):
        inside = passive.unsqueeze(-1) & passive.unsqueeze(-2)
        factor, _info = torch.linalg.cholesky_ex(torch.where(inside, A, eye))
        goal = torch.cholesky_solve(torch.where(passive, -q, 0).unsqueeze(-1), factor).squeeze(-1)
        goal = torch.where(passive, goal, 0)
        blocking = passive & (goal <= 0)
        blocked = blocking.any(-1)

        # Blocked programs walk as far as they may and let the blocking task go.
        way = torch.where(lam > goal, lam / torch.where(lam > goal, lam - goal, 1), 0)
        share, out = torch.where(blocking, way, torch.inf).min(-1)
        step = torch.where(blocked, share, 1).unsqueeze(-1)
        walked = torch.where(passive, (lam + step * (goal - lam)).clamp(min=0), 0)
        new = torch.where(blocked.unsqueeze(-1), walked, goal)
        leaving = torch.nn.functional.one_hot(out, m).bool() & blocked.unsqueeze(-1)
        new = torch.where(leaving, 0, new)
        moved = torch.where(blocked, share > 0, (new != lam).any(-1))
        banned = torch.where(moved.unsqueeze(-1), False, banned) | (leaving & ~moved.unsqueeze(-1))
        lam = torch.where(done.unsqueeze(-1), lam, new)
        passive = passive & ~(leaving & ~done.unsqueeze(-1))

        # The others take in the task that is most violated, if one is, beyond what rounding can do to a residual.
        residual = q + (A @ lam.unsqueeze(-1)).squeeze(-1)
        tolerance = 4 * rounding * (1 + lam.sum(-1, keepdim=True))
        candidate = usable & ~passive & ~banned & (residual < -tolerance)
        done = done | (~blocked & ~candidate.any(-1))
        if bool(done.all()):
            break
        enter = torch.where(candidate, residual, torch.inf).argmin(-1)
        column = A.gather(-1, enter[:, None, None].expand(n, m, 1))
        part = torch.linalg.solve_triangular(factor, torch.where(passive.unsqueeze(-1), column, 0), upper=False)
        length = column.squeeze(-1).gather(-1, enter[:, None]).squeeze(-1) - part.square().sum((-1, -2))
        entering = torch.nn.functional.one_hot(enter, m).bool() & (~blocked & ~done).unsqueeze(-1)
        independent = (length > 8 * rounding).unsqueeze(-1)
        passive = passive | (entering & independent)
        banned = banned | (entering & ~independent)
        pivots += (leaving | (entering & independent)).any(-1) & ~done
    return lam, pivots
