"""Chooses the path of a step and its kernels, from backend, device, dtypes, m and alignment alone; for optimizer/."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurg.errors import choose, warn

__all__ = ["BACKENDS", "PROGRAM_UP_TO", "GramianKernel", "gramian_kernel", "path", "path_of", "task_tiles", "vector"]

BACKENDS = {name: name for name in ("auto", "torch", "triton")}

# Dtype of a row -> possible dtypes of p.grad. No machine code was checked for any other pair, which therefore takes the
# torch path.
DTYPES: dict[torch.dtype, frozenset[torch.dtype]] = {
    torch.float32: frozenset({torch.float32, torch.bfloat16, torch.float16}),
    torch.bfloat16: frozenset({torch.bfloat16, torch.float32}),
    torch.float16: frozenset({torch.float16, torch.float32}),
    torch.float64: frozenset({torch.float64}),
}

# The first Triton whose tl.dot multiplies float64; torch 2.9 brings it.
LEAST_TRITON = (3, 5)
# The oldest cards that machine code was checked for. Older ones have no bfloat16, and little float64.
LEAST_CAPABILITY = (8, 0)
# One multiply-add chain per pair of tasks needs m(m+1)/2 float64 accumulators: 36 at m = 8 fit in 128 to 238 of the
# 255 registers (read from SASS, sm_80 to sm_100); 78 at m = 12 do not.
PAIRS_UP_TO = 8
# Three 16 x 16 tiles of accumulators of one warp take up to 218 registers; ten of them (m = 64) spill.
DOTS_UP_TO = 32
# The largest tableau that one program holds in registers: 32 x 32 float64 twice takes up to 246 of 255.
PROGRAM_UP_TO = 32


class GramianKernel(NamedTuple):
    """A kernel and the number of tasks that it is compiled for; missing tasks are null pointers, which are not read."""

    name: str
    tasks: int


def path(
    backend: str,
    device: torch.device,
    *,
    dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = (),
    sparse: bool = False,
) -> str:
    """Return "triton" or "torch", for rows on a device.

    `dtypes` has the pairs (dtype of a row, dtype of p.grad) that occur; complex ones count as their real parts.

    Raises:
        ValueError: backend="triton", but it cannot run; the message says what to change.
    """
    backend = choose("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch"
    misfit = _misfit(device)
    problem = misfit or _problem(dtypes, sparse)
    if problem and backend == "triton":
        raise cannot_run(problem)
    if misfit and device.type == "cuda":
        _warn_of(device, misfit)
    return "torch" if problem else "triton"


def cannot_run(reason: str) -> ValueError:
    """Return the error for backend="triton", which was asked for by name and cannot be had."""
    return ValueError(f"backend='triton' cannot run: {reason}. Use backend='auto' to fall back to torch.")


def path_of(backend: str, rows: Iterable[Iterable[Tensor | None]], like: Sequence[Tensor]) -> str:
    """Return `path` for these rows of gradients of the parameters `like`."""
    devices = {p.device for p in like}
    if backend == "torch" or (backend == "auto" and devices == {torch.device("cpu")} and not is_interpreted()):
        return "torch"
    if len(devices) > 1:
        if backend == "triton":
            raise cannot_run(f"shared parameters are on {sorted(map(str, devices))}, and one kernel reads one device")
        return "torch"
    rows = [list(row) for row in rows]
    sparse = any(g is not None and g.is_sparse for row in rows for g in row)
    pairs = {(_real(g.dtype), _real(p.dtype)) for row in rows for g, p in zip(row, like, strict=True) if g is not None}
    return path(backend, like[0].device, dtypes=pairs, sparse=sparse)


def gramian_kernel(m: int) -> GramianKernel:
    """Return the kernel for m tasks, or for a union of tiles of tasks if m is too large for any kernel."""
    for tasks in (2, 4, PAIRS_UP_TO):
        if m <= tasks:
            return GramianKernel("pairs", tasks)
    return GramianKernel("dots", 16 if m <= 16 else DOTS_UP_TO)


def task_tiles(m: int) -> list[tuple[int, int]]:
    """Return ranges of tasks whose pairwise unions cover all pairs; one range if a kernel takes all m.

    m = 64 is 4 tiles, 6 unions of 32 tasks: every gradient is then read 3 times.
    """
    if m <= DOTS_UP_TO:
        return [(0, m)]
    half = DOTS_UP_TO // 2
    return [(start, min(start + half, m)) for start in range(0, m, half)]


def vector(dtypes: Sequence[torch.dtype], aligned: bool) -> int:
    """Return how many elements one thread loads at once: 16 bytes of the narrowest dtype; one if unaligned."""
    return 16 // min(dtype.itemsize for dtype in dtypes) if aligned else 1


@functools.cache
def triton_is_available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def unfit(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on a CUDA device, or "" if they can; found out once per device.

    Otherwise the first launch would fail, in the middle of the user's step.
    """
    if torch.version.hip is not None:
        return "the kernels were never compiled for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        return f"{device} is of compute capability {found}, and the kernels need {least}"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < LEAST_TRITON:
            least = ".".join(map(str, LEAST_TRITON))
            return f"Triton {triton.__version__} is installed, and the kernels need {least}, which torch 2.9 brings"
        # This builds Triton's launcher, which needs a C compiler.
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"Triton does not start ({type(error).__name__}: {reason[0] if reason else 'no message'})"
    return ""


def is_interpreted() -> bool:
    """Whether kernels that are defined now run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def _misfit(device: torch.device) -> str:
    """Return why no kernel can run on a device, whatever the gradients are; "" if some can."""
    if not triton_is_available():
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        return unfit(device)
    on_cpu = device.type == "cpu" and is_interpreted()
    return "" if on_cpu else f"the gradients are on {device}, not on a CUDA device"


@functools.cache
def _warn_of(device: torch.device, misfit: str) -> None:
    warn(
        f"gradsurg's kernels cannot run on {device}: {misfit}. Its steps are right without them, but take longer and "
        "wait for the device. backend='torch' asks for that, without this warning."
    )


def _problem(dtypes: Iterable[tuple[torch.dtype, torch.dtype]], sparse: bool) -> str:
    if sparse:
        return "there are sparse gradients"
    for row, out in dtypes:
        if out not in DTYPES.get(row, ()):
            return f"rows of {row} for parameters of {out} have no kernel"
    return ""


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
