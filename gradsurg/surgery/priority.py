"""Primary and auxiliary tasks, and levels of them: which task yields to which. For the pipeline and wrap().

"protect" and "help" are both projections onto a dual cone, with different targets and constraints. Rows are those after
normalisation. A level's own direction comes from the surgery applied to that level alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurg.errors import unknown_name
from gradsurg.linalg.kernels.table import constant
from gradsurg.solvers.problem import HOST, Solvers

__all__ = ["AUXILIARY", "levels_of", "order", "parse_levels", "protected"]

# "protect": auxiliaries are constraints that the primary's direction must not hurt. "help": they add what does not hurt
# the primary.
AUXILIARY = {name: name for name in ("protect", "help")}

Levels = tuple[tuple[str, ...], ...]


def parse_levels(primary: str | Sequence[Any] | None) -> Levels | None:
    """Return levels of task names from what a user may write: a name, the names of one level, or lists of names."""
    if primary is None:
        return None
    if isinstance(primary, str):
        return ((primary,),)
    items = primary if isinstance(primary, (list, tuple)) else [None]
    flat = [name for item in items for name in (item if isinstance(item, (list, tuple)) else [item])]
    if not all(isinstance(name, str) for name in flat):
        raise ValueError(
            f"primary={primary!r}: pass a task's name, or levels of names such as [['main'], ['aux1', 'aux2'], ['reg']]"
        )
    if len({isinstance(item, str) for item in items}) > 1:
        raise ValueError(f"primary={primary!r} mixes names and lists: use [['main'], ['aux1', 'aux2'], ['reg']]")
    levels = (tuple(flat),) if flat == list(items) else tuple(map(tuple, items))
    if not flat or not all(levels):
        raise ValueError(f"primary={primary!r} has an empty level: name at least one task in each")
    if len(set(flat)) < len(flat):
        raise ValueError(f"primary={primary!r} names a task twice: a task belongs to one level")
    return levels


def levels_of(tasks: Sequence[str], levels: Levels | None) -> list[list[int]] | None:
    """Return the row indices of each level that has a task present; tasks not named come last, together."""
    if levels is None:
        return None
    index = {name: i for i, name in enumerate(tasks)}
    # A task that is absent in this step leaves its level, and an empty level is none.
    named = [[index[name] for name in level if name in index] for level in levels]
    seen = {i for level in named for i in level}
    rest = [i for i in range(len(tasks)) if i not in seen]
    return [level for level in [*named, rest] if level]


def check_names(levels: Levels | None, known: Iterable[str], argument: str = "primary") -> None:
    """Raise a ValueError if `levels` names a task that is not among `known`."""
    known = set(known)
    for name in (name for level in levels or () for name in level):
        if name not in known:
            raise unknown_name(argument, name, sorted(known))


def protected(m: int, levels: list[list[int]] | None, auxiliary: str, device: torch.device) -> Tensor | None:
    """Return which tasks a guarantee on top protects, bool of shape (m,), or None for all.

    With auxiliary="help" these are the tasks of the first level: protecting an auxiliary as well could cost the
    primary the progress that "help" promises it.
    """
    return None if levels is None or auxiliary == "protect" else _mask(m, levels[0], device)


def order(
    gramian: Tensor,
    levels: list[list[int]],
    auxiliary: str,
    surgery: Callable[[Tensor, list[int]], Tensor],
    solvers: Solvers = HOST,
) -> Tensor:
    """Return weights that respect the order of the levels.

    protect: u = t_0 + Σ λ_i g_i, the projection of the first level's direction t_0 onto {u : ⟨u, g_i⟩ ≥ 0 for every
    task i below it}. With one primary, ⟨u, g_0⟩ = ‖u‖². All lower levels are constraints, and their order does not
    matter.
    help: u = t_0 + Σ_k Π_k(t_k), where Π_k projects level k's direction onto the dual cone of all higher levels'
    gradients. With one primary, ⟨u, g_0⟩ ≥ ‖g_0‖²; adding a level never reduces ⟨u, g_i⟩ of a higher task.

    Args:
        gramian: Shape (..., m, m), float64, after normalisation; the weights have shape (..., m).
        levels: Row indices of each level, highest first; together all of 0 … m-1.
        auxiliary: "protect" or "help".
        surgery: (Gramian of a level, its row indices) -> the weights of its direction.
        solvers: The functions that solve the programs.

    Source: Su Jianlin 2022, kexue.fm 8907.
    """
    m, device = gramian.shape[-1], gramian.device
    # Under "protect" the lower levels are constraints alone, and have no direction of their own.
    first, *lower = [_direction(gramian, level, surgery) for level in (levels if auxiliary == "help" else levels[:1])]
    if auxiliary == "protect":
        below = ~_mask(m, levels[0], device)
        return first + solvers.nonnegative(gramian, _apply(gramian, first), allowed=below) if len(levels) > 1 else first
    total, higher = first, list(levels[0])
    # Each level yields to all above it, not only to the next one, so it is projected against every higher gradient.
    for level, direction in zip(levels[1:], lower, strict=True):
        inner = _apply(gramian, direction)
        total = total + direction + solvers.nonnegative(gramian, inner, allowed=_mask(m, higher, device))
        higher += level
    return total


def _direction(gramian: Tensor, level: list[int], surgery: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
    index = constant(level, gramian.device, torch.int64)
    # Weights over all rows, so that directions of different levels can be added.
    weights = torch.zeros(gramian.shape[:-1], dtype=gramian.dtype, device=gramian.device)
    weights[..., index] = surgery(gramian[..., index[:, None], index], level)
    return weights


def _apply(gramian: Tensor, weights: Tensor) -> Tensor:
    return (gramian @ weights.unsqueeze(-1)).squeeze(-1)


def _mask(m: int, members: list[int], device: torch.device) -> Tensor:
    return constant([i in members for i in range(m)], device, torch.bool)
