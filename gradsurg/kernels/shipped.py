"""Every specialisation that the launchers use, compiled ahead of time, and what its machine code says.

No GPU and no driver is needed: Triton brings ptxas and the disassembler. Tests hold the facts against
benchmarks/kernel_budget.json, and benchmarks/gpu.py prints them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradsurg.kernels import combine, cone, dots, inner, pairs, reduce
from gradsurg.kernels.dispatch import DTYPES, vector
from gradsurg.kernels.gramian import TRITON_DTYPES

__all__ = ["ARCHITECTURES", "Facts", "Specialisation", "compile_for", "facts", "measure", "shipped"]

ARCHITECTURES = (80, 90, 100)


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
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    wide_loads: int = 0
    registers: int | None = None


@dataclass(frozen=True)
class Facts:
    """What the machine code of one specialisation says.

    Attributes:
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        local: Bytes of local memory and stack of a thread.
        spills: Instructions that load from or store to local memory.
        wide_loads: 16-byte loads from global memory in that loop.
        narrow_loads: Loads of 4 bytes or fewer in the largest loop that has wide ones: there should be none.
        instructions: Of the largest loop with wide loads, of one turn.
        turns: How often that loop was unrolled.
    """

    registers: int
    shared: int
    local: int
    spills: int
    wide_loads: int
    narrow_loads: int
    instructions: int
    turns: int


def shipped() -> list[Specialisation]:
    """Return all specialisations."""
    return [*_pairs(), *_dots(), _reduce(), *_inner(), *_combine(), *_cone()]


def compile_for(specialisation: Specialisation, architecture: int) -> Any:
    """Compile one specialisation for sm_<architecture>, as the launcher's JIT would."""
    kernel, constants = specialisation.kernel, specialisation.constants
    signature = {
        name: "constexpr" if name in constants else specialisation.signature[name] for name in kernel.arg_names
    }
    # The JIT sees that the addresses of torch's allocations are multiples of 16.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": specialisation.warps, "enable_fp_fusion": True, "maxnreg": specialisation.registers}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def facts(specialisation: Specialisation, compiled: Any) -> Facts:
    """Read the machine code of a compiled specialisation."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        code = _run(tools / "nvdisasm", "-c", "-ndf", cubin)  # no data flow: the same text, sooner
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    everything = Counter(name for name, _ in _instructions(code))
    loops = [loop for loop in _loops(code) if any(_is_wide(name) for name, _ in loop)]
    loop = max(loops, key=len, default=[])
    wide = sum(_is_wide(name) for name, _ in loop)
    return Facts(
        registers=int(numbers[1]),
        shared=int(compiled.metadata.shared),
        local=int(numbers[2]) + int(numbers[4]),
        spills=sum(n for name, n in everything.items() if name.startswith(("LDL", "STL"))),
        wide_loads=wide,
        narrow_loads=sum(_is_load(name) and not name.endswith((".128", ".64")) for name, _ in loop),
        instructions=len(loop),
        turns=wide // specialisation.wide_loads if specialisation.wide_loads else 0,
    )


def measure(architecture: int, names: Sequence[str]) -> dict[str, Facts]:
    """Compile the named specialisations, on all cores, and return the facts of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = [(architecture, name) for name in names]
    # Started afresh: a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(names, pool.map(_measure_one, jobs), strict=True))


def _measure_one(job: tuple[int, str]) -> Facts:
    architecture, name = job
    specialisation = next(one for one in shipped() if one.name == name)
    return facts(specialisation, compile_for(specialisation, architecture))


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
                block = dots.block_for(tiles)
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
    for tasks in combine.TASKS:
        for row, out in _dtype_pairs():
            for aligned in (True, False):
                V, more = vector([row, out], aligned), tasks == combine.TASKS[-1]
                yield Specialisation(
                    f"combine {tasks} tasks {_short(row)} rows {_short(out)} {_alignment(aligned)}",
                    combine.combine_kernel,
                    {
                        "pointers": "*i64",
                        "items": "*i64",
                        "weights": "*fp64",
                        "modes": "*i32",
                        "width": "i32",
                        "m": "i32",
                    },
                    {
                        "TASKS": tasks,
                        "MORE": more,
                        "LANES": 32 * combine.WARPS,
                        "V": V,
                        "DTYPE": TRITON_DTYPES[row],
                        "OUT": TRITON_DTYPES[out],
                        "ALIGNED": aligned,
                    },
                    combine.WARPS,
                    ((1 + more) * tasks * row.itemsize + out.itemsize) * V // 16 if aligned else 0,
                    combine.registers_for(row.itemsize),
                )


def _cone() -> Iterator[Specialisation]:
    for simplex in (False, True):
        for tasks in (4, 8, 16, cone.MOST_TASKS):
            yield Specialisation(
                f"{'simplex' if simplex else 'cone'} m<={tasks}",
                cone.cone_kernel,
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


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _is_load(name: str) -> bool:
    return name.split(".")[0] in ("LDG", "LDGSTS")


def _is_wide(name: str) -> bool:
    return _is_load(name) and ".128" in name


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)")


def _instructions(code: str) -> Iterator[tuple[str, str]]:
    for line in code.splitlines():
        found = _INSTRUCTION.search(line)
        if found:
            yield found[1], found[2]


def _loops(code: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the instructions between a label and a branch back to it."""
    labels: dict[str, int] = {}
    passed: list[tuple[str, str]] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(passed)
        found = _INSTRUCTION.search(line)
        if not found:
            continue
        passed.append((found[1], found[2]))
        target = re.search(r"(\.L_x_\d+)", found[2])
        # A branch to itself ends every kernel.
        if found[1].startswith("BRA") and target and target[1] in labels and len(passed) - labels[target[1]] > 1:
            yield passed[labels[target[1]] :]
