"""How far above its minimum a loss is, by the curvature of each parameter: what one method needs the rows for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurg.linalg.blocks import real_of
from gradsurg.linalg.blocks import Rows
from gradsurg.solvers.problem import Problem, State

if TYPE_CHECKING:
    from gradsurg.optimizer.inputs import Patient

__all__ = ["excess_of", "measured"]

Roots = Mapping[int, Tensor]  # position of a parameter -> root of the accumulated squares of one task's gradient


def measured(
    patient: Patient, problem: Problem, blocks: list[list[Tensor]], tables: Sequence[Rows]
) -> tuple[Problem, dict[str, Any]]:
    """Put into the problem what the surgery asks of the rows; also what the state has to keep of it, {} for nothing."""
    pipeline = patient.settings.pipeline
    if not pipeline.surgery.measures_excess:
        return problem, {}
    place = {id(p): k for k, p in enumerate(patient.parameters)}
    roots, found = patient.state.get("curvature", {}), []
    for block, table, scales in zip(blocks, tables, pipeline.scales(problem, patient.state)[0].tolist(), strict=True):
        excess, roots = excess_of(table, scales, problem.tasks, [place[id(p)] for p in block], roots)
        found.append(excess)
    return replace(problem, excess=torch.tensor(found, dtype=torch.float64)), {"curvature": roots}


@torch.no_grad()
def excess_of(
    rows: Rows, scales: Sequence[float], tasks: Sequence[str], positions: Sequence[int], state: State
) -> tuple[list[float], dict[str, dict[int, Tensor]]]:
    """Return E_i = Σ_p g_ip² / h_ip, with h_ip = √(Σ g_ip²) over this step and those before, and the next state.

    Args:
        rows: m lists of one gradient, or None, per parameter; each is multiplied by its scale first.
        scales: One number a row.
        tasks: The names of the rows.
        positions: What the state calls each parameter.
        state: Task name -> position -> h; of the dtype of the gradients, float32 at least. Left as it is, as are the
            tensors in it: a state dict in somebody's hand keeps its numbers.

    Returns:
        The m sums, formed in float64, and the state with the roots of these rows in place of the old ones.
    """
    found, new = [], {name: dict(roots) for name, roots in state.items()}
    for row, scale, name in zip(rows, scales, tasks, strict=True):
        roots = new.setdefault(name, {})
        excess = 0.0
        for g, position in zip(row, positions, strict=True):
            if g is None:
                continue
            scaled = scale * _real(g)
            old = roots.get(position)
            # hypot, and a quotient before the product: squares of gradients of 1e-23 would be 0 in single precision.
            root = scaled.abs() if old is None else torch.hypot(old.to(scaled), scaled)
            roots[position] = root
            excess += float((scaled * (scaled / root).nan_to_num(0.0)).sum(dtype=torch.float64))
        found.append(excess)
    return found, new


def _real(gradient: Tensor) -> Tensor:
    """Return real numbers in one piece, of float32 at least."""
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    real = real_of(dense)
    return real.to(torch.promote_types(real.dtype, torch.float32))
