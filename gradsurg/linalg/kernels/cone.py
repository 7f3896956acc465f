"""The nonnegative and the simplex program on the device: many programs in one launch, and no host in between."""

import torch
from torch import Tensor

from gradsurg.linalg.kernels.cone_active_set import cone_kernel
from gradsurg.linalg.kernels.dispatch import PROGRAM_UP_TO
from gradsurg.linalg.kernels.table import constant, on_device
from gradsurg.solvers.tolerances import COARSER, ROUNDING_EXACT

__all__ = ["MOST_TASKS", "nonnegative", "project_rows", "registers_for", "simplex", "tasks_for", "warps_for"]

MOST_TASKS = PROGRAM_UP_TO


def nonnegative(
    gramian: Tensor,
    linear: Tensor,
    *,
    allowed: Tensor | None = None,
    scale: Tensor | None = None,
    rounding: float = ROUNDING_EXACT,
) -> Tensor:
    """Return λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀb: the twin of solvers.nonnegative, same arguments and same answers.

    All programs run in one launch, one to a program of 1 to 4 warps; at most 8m + 16 steps each. m ≤ 32.
    """
    m = _checked(gramian)
    shape = _common_shape(
        gramian.shape[:-2],
        linear.shape[:-1],
        torch.Size() if allowed is None else allowed.shape[:-1],
        torch.Size() if scale is None else scale.shape,
    )
    device = gramian.device
    sizes = constant([-1.0], device).view(()) if scale is None else scale.to(torch.float64)
    b = linear.to(torch.float64).expand(*shape, m)
    return _solve(gramian, b, _mask(allowed, shape, m, device), sizes.expand(shape), rounding)


def project_rows(gramian: Tensor, *, rounding: float = ROUNDING_EXACT) -> Tensor:
    """Return Λ, every gradient's projection by itself: the twin of solvers.project_rows, same answers."""
    return nonnegative(gramian.unsqueeze(-3), gramian, rounding=rounding)


def simplex(gramian: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Return α = argmin_{α ≥ 0, Σα = 1} αᵀGα: the twin of solvers.simplex, same arguments and same answers."""
    m = _checked(gramian)
    shape = _common_shape(gramian.shape[:-2], torch.Size() if allowed is None else allowed.shape[:-1])
    return _solve(gramian, None, _mask(allowed, shape, m, gramian.device), None, ROUNDING_EXACT)


def tasks_for(m: int) -> int:
    """Return the size of the tableau that m tasks are solved in."""
    return next(size for size in (4, 8, 16, MOST_TASKS) if m <= size)


def warps_for(tasks: int) -> int:
    """Return the warps of one program: as few as hold the tableau, because each step is a chain of sums over it.

    32 x 32 float64 and A beside it take 178 to 189 registers in 8 warps; in 4 they take all 255, and 15 are spilled.
    """
    return {4: 1, 8: 1, 16: 2, MOST_TASKS: 8}[tasks]


def registers_for(tasks: int) -> int | None:
    """Return how many registers ptxas may use; None leaves it to it.

    Left alone it stops at 128 for 16 and 32 tasks and at 96 for 8, and spills. 16 tasks need 187 to 199.
    """
    return {8: 128, 16: 255, MOST_TASKS: 240}.get(tasks)


def _checked(gramian: Tensor) -> int:
    m = gramian.shape[-1]
    if gramian.shape[-2] != m or m > MOST_TASKS:
        raise ValueError(f"gramian {tuple(gramian.shape)}: must be (..., m, m) with m of at most {MOST_TASKS}")
    return m


def _common_shape(*shapes: torch.Size) -> torch.Size:
    # broadcast_shapes() takes the host 0.17 ms, and a step solves six programs.
    longest = max(shapes, key=len)
    usual = all(shape in ((), longest) for shape in shapes)
    return longest if usual else torch.broadcast_shapes(*shapes)


def _mask(allowed: Tensor | None, shape: torch.Size, m: int, device: torch.device) -> Tensor:
    if allowed is None:
        return constant([1] * (shape.numel() * m), device, torch.int8).view(*shape, m)
    return allowed.to(torch.int8).expand(*shape, m)


def _solve(gramian: Tensor, linear: Tensor | None, mask: Tensor, sizes: Tensor | None, rounding: float) -> Tensor:
    m, device, shape = gramian.shape[-1], gramian.device, mask.shape[:-1]
    programs = shape.numel()
    gramian = gramian.detach().to(torch.float64)
    one_for_all = gramian.ndim == 2
    one_for_a_row = gramian.ndim > 2 and gramian.shape[-3] == 1 and gramian.shape[:-3] == shape[:-1]
    if one_for_all or one_for_a_row:
        shared = programs // max(gramian[..., 0, 0].numel(), 1)
    else:
        gramian, shared = gramian.expand(*shape, m, m), 1
    answers = torch.empty(*shape, m, dtype=torch.float64, device=device)
    nothing = answers  # an argument that is not read
    with on_device(device):
        cone_kernel[(programs,)](
            gramian.contiguous(),
            nothing if linear is None else linear.detach().contiguous(),
            mask.contiguous(),
            nothing if sizes is None else sizes.contiguous(),
            constant([rounding], device),
            answers,
            torch.empty(programs, dtype=torch.int32, device=device),
            m,
            max(shared, 1),
            1 + sum(coarser > rounding for coarser in COARSER),
            M=tasks_for(m),
            SIMPLEX=linear is None,
            num_warps=warps_for(tasks_for(m)),
            maxnreg=registers_for(tasks_for(m)),
            enable_fp_fusion=True,
        )
    return answers
