"""What the machine code of a kernel says: compiled ahead of time, disassembled, counted.

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

from gradsurg.kernels.shipped import Specialisation, shipped

__all__ = ["ARCHITECTURES", "Facts", "compile_for", "facts", "measure"]

ARCHITECTURES = (80, 90, 100)


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
