"""Every specialisation that the launchers use: what each kernel is compiled with, and what to expect of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradsurg.linalg.kernels import combine, cone, cone_active_set, dots, inner, left, moved, pairs, reduce
from gradsurg.linalg.kernels.dispatch import DTYPES, vector
from gradsurg.linalg.kernels.gramian import TRITON_DTYPES

__all__ = ["Specialisation", "shipped"]


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel.

    Attributes:
        name: The kernel's name and what it is compiled for.
        kernel: The Triton function.
        signature: Triton types of the arguments that are not constants.
        constants: Values of the others.
        warps: Warps of a program.
        wide_loads: How many 16-byte loads one turn of the main loop has per thread; 0 where loads are narrow (an
            unaligned tensor) or there is no such loop.
        registers: What the launcher allows ptxas; None leaves it to it.
        narrow_loads: How many loads of single numbers it has besides, which only some numbers need.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    wide_loads: int = 0
    registers: int | None = None
    narrow_loads: int = 0


def shipped() -> list[Specialisation]:
    """Return all specialisations."""
    return [*_pairs(), *_dots(), _reduce(), *_inner(), *_combine(), *_left(), *_moved(), *_cone()]


def _pairs() -> Iterator[Specialisation]:
    for M in (2, 4, 8):
        for dtype in DTYPES:
            for aligned in (True, False):
                yield Specialisation(
                    f"pairs m<={M} {_short(dtype)} {_alignment(aligned)}",
                    pairs.pairs_kernel,
                    {"pointers": "*i64", "items": "*i64", "partials": "*fp64", "width": "i32", "m": "i32"},
                    {
                        "M": M,
                        "LANES": 32 * pairs.WARPS,
                        "V": vector([dtype], aligned),
                        "DTYPE": TRITON_DTYPES[dtype],
                        "ALIGNED": aligned,
                    },
                    pairs.WARPS,
                    M if aligned else 0,
                )


def _dots() -> Iterator[Specialisation]:
    for tiles in (1, 2):
        for dtype in DTYPES:
            for aligned in (True, False):
                block = dots.block_for(tiles, dtype.itemsize)
                yield Specialisation(
                    f"dots m<={dots.TILE * tiles} {_short(dtype)} {_alignment(aligned)}",
                    dots.dots_kernel,
                    {"pointers": "*i64", "items": "*i64", "partials": "*fp64", "width": "i32", "m": "i32"},
                    {
                        "TILES": tiles,
                        "BLOCK": block,
                        "V": vector([dtype], aligned),
                        "DTYPE": TRITON_DTYPES[dtype],
                        "ALIGNED": aligned,
                    },
                    dots.WARPS,
                    tiles * dots.TILE * block * dtype.itemsize // (32 * 16) if aligned else 0,
                    dots.registers_for(tiles, dtype.itemsize, aligned),
                )


def _reduce() -> Specialisation:
    return Specialisation(
        "reduce",
        reduce.reduce_kernel,
        {"partials": "*fp64", "bounds": "*i64", "places": "*i64", "out": "*fp64", "planes": "i32", "stride": "i32"},
        {"PLANES": reduce.PLANES, "SLOTS": reduce.SLOTS},
        reduce.WARPS,
    )


def _inner() -> Iterator[Specialisation]:
    for tasks in inner.TASKS:
        for row, out in _dtype_pairs():
            for aligned in (True, False):
                V = vector([row, out], aligned)
                yield Specialisation(
                    f"inner {tasks} tasks {_short(row)} rows {_short(out)} {_alignment(aligned)}",
                    inner.inner_kernel,
                    {
                        "pointers": "*i64",
                        "items": "*i64",
                        "modes": "*i32",
                        "partials": "*fp64",
                        "width": "i32",
                        "m": "i32",
                    },
                    {
                        "TASKS": tasks,
                        "LANES": 32 * inner.WARPS,
                        "V": V,
                        "DTYPE": TRITON_DTYPES[row],
                        "MOVED": TRITON_DTYPES[out],
                        "ALIGNED": aligned,
                    },
                    inner.WARPS,
                    (tasks * row.itemsize + 2 * out.itemsize) * V // 16 if aligned else 0,
                    inner.registers_for(tasks, aligned),
                )


def _combine() -> Iterator[Specialisation]:
    for metric in (False, True):
        for tasks in combine.TASKS:
            for row, out in _dtype_pairs():
                for aligned in (True, False):
                    yield _combination(metric, tasks, row, out, aligned)


def _combination(metric: bool, tasks: int, row: Any, out: Any, aligned: bool) -> Specialisation:
    V, more = vector([row, out], aligned), tasks == combine.TASKS[-1]
    return Specialisation(
        f"{'correct' if metric else 'combine'} {tasks} tasks {_short(row)} rows {_short(out)} {_alignment(aligned)}",
        combine.combine_kernel,
        {
            "pointers": "*i64",
            "items": "*i64",
            "weights": "*fp64",
            "modes": "*i32" if metric else "*fp64",
            "factors": "*fp64",
            "flags": "*i32" if metric else "*fp64",
            "width": "i32",
            "m": "i32",
        },
        {
            "METRIC": metric,
            "TASKS": tasks,
            "MORE": more,
            "LANES": 32 * combine.WARPS,
            "V": V,
            "DTYPE": TRITON_DTYPES[row],
            "OUT": TRITON_DTYPES[out],
            "ALIGNED": aligned,
        },
        combine.WARPS,
        ((1 + more) * tasks * row.itemsize + (1 + 2 * metric) * out.itemsize) * V // 16 if aligned else 0,
        combine.registers_for(tasks, row.itemsize, out.itemsize, metric),
    )


def _left() -> Iterator[Specialisation]:
    for kernel, name in ((left.still_kernel, "still"), (left.shorten_kernel, "shorten")):
        for dtype in DTYPES:
            for aligned in (True, False):
                V = vector([dtype], aligned)
                yield Specialisation(
                    f"{name} {_short(dtype)} {_alignment(aligned)}",
                    kernel,
                    {
                        "pointers": "*i64",
                        "items": "*i64",
                        "modes": "*i32",
                        "shares": "*fp64",
                        "partials": "*fp64",
                        "width": "i32",
                        "m": "i32",
                    },
                    {
                        "LANES": 32 * left.WARPS,
                        "V": V,
                        "MOVED": TRITON_DTYPES[dtype],
                        "ALIGNED": aligned,
                    },
                    left.WARPS,
                    2 if aligned else 0,
                    left.registers_for(aligned),
                    # p.grad of the numbers that stayed; of float64, a number is no narrow load.
                    narrow_loads=V if name == "still" and dtype.itemsize < 8 else 0,
                )
    yield Specialisation(
        "left",
        left.left_kernel,
        {
            "partials": "*fp64",
            "bounds": "*i64",
            "limits": "*fp64",
            "sizes": "*i64",
            "flags": "*i32",
            "farthest": "*fp64",
            "some": "*i32",
        },
        {"SLOTS": left.SLOTS},
        left.WARPS,
    )


def _moved() -> Iterator[Specialisation]:
    for tasks in moved.TASKS:
        for row, out in _dtype_pairs():
            for aligned in (True, False):
                V = moved.vector_for([row, out], aligned)
                widest = max(row.itemsize, out.itemsize)
                yield Specialisation(
                    f"moved {tasks} tasks {_short(row)} rows {_short(out)} {_alignment(aligned)}",
                    moved.moved_kernel,
                    {
                        "pointers": "*i64",
                        "items": "*i64",
                        "modes": "*i32",
                        "flags": "*i32",
                        "metric": "*fp64",
                        "unions": "*i64",
                        "partials": "*fp64",
                        "width": "i32",
                        "m": "i32",
                    },
                    {
                        "M": tasks,
                        "LANES": 32 * moved.WARPS,
                        "V": V,
                        "DTYPE": TRITON_DTYPES[row],
                        "MOVED": TRITON_DTYPES[out],
                        "ALIGNED": aligned,
                    },
                    moved.WARPS,
                    tasks * (row.itemsize == widest) + 3 * (out.itemsize == widest) if aligned else 0,
                    moved.registers_for(tasks, row.itemsize, out.itemsize),
                )


def _cone() -> Iterator[Specialisation]:
    for simplex in (False, True):
        for tasks in (4, 8, 16, cone.MOST_TASKS):
            yield Specialisation(
                f"{'simplex' if simplex else 'cone'} m<={tasks}",
                cone_active_set.cone_kernel,
                {
                    "gramians": "*fp64",
                    "linears": "*fp64",
                    "allowed": "*i8",
                    "scales": "*fp64",
                    "roundings": "*fp64",
                    "answers": "*fp64",
                    "turns": "*i32",
                    "m": "i32",
                    "shared": "i32",
                    "attempts": "i32",
                },
                {"M": tasks, "SIMPLEX": simplex},
                cone.warps_for(tasks),
                registers=cone.registers_for(tasks),
            )


def _dtype_pairs() -> list[tuple[Any, Any]]:
    return [(row, out) for row, outs in DTYPES.items() for out in sorted(outs, key=str)]


def _short(dtype: Any) -> str:
    return str(TRITON_DTYPES[dtype])


def _alignment(aligned: bool) -> str:
    return "aligned" if aligned else "unaligned"
