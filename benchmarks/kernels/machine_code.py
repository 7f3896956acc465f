"""What the machine code of a kernel says: compiled ahead of time, disassembled, counted.

No GPU and no driver is needed: Triton brings ptxas and the disassembler. Tests hold the facts against
benchmarks/kernel_budget.json, and benchmarks/gpu.py prints them.
"""

from __future__ import annotations

import bisect
import itertools
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels.shipped import Specialisation, shipped

__all__ = ["ARCHITECTURES", "Facts", "compile_for", "measure"]

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


def measure(jobs: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Facts]:
    """Compile specialisations, each given as (architecture, name), on all cores, and return the facts of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Started afresh: a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        built = dict(zip(jobs, pool.map(_build, jobs), strict=True))
    found: dict[tuple[int, str], Facts] = {}
    for architecture in dict.fromkeys(architecture for architecture, _ in jobs):
        mine = {job: one for job, one in built.items() if job[0] == architecture}
        codes = _disassembled(architecture, [one.cubin for one in mine.values()])
        found |= {job: _facts(one, code) for (job, one), code in zip(mine.items(), codes, strict=True)}
    return {job: found[job] for job in jobs}


@dataclass(frozen=True)
class _Built:
    """A compiled specialisation, as it comes back from another process."""

    cubin: bytes
    usage: str
    shared: int
    wide_loads: int


class _Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def _build(job: tuple[int, str]) -> _Built:
    architecture, name = job
    specialisation = next(one for one in shipped() if one.name == name)
    compiled = compile_for(specialisation, architecture)
    cubin = compiled.asm["cubin"]
    return _Built(cubin, _tool("cuobjdump", ["-res-usage"], cubin), compiled.metadata.shared, specialisation.wide_loads)


def _facts(built: _Built, code: list[_Instruction]) -> Facts:
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", built.usage)
    assert numbers is not None, built.usage
    loops = [loop for loop in _loops(code) if any(_is_wide(name) for _, name, _ in loop)]
    loop = max(loops, key=len, default=[])
    wide = sum(_is_wide(name) for _, name, _ in loop)
    return Facts(
        registers=int(numbers[1]),
        shared=built.shared,
        local=int(numbers[2]) + int(numbers[4]),
        spills=sum(name.startswith(("LDL", "STL")) for _, name, _ in code),
        wide_loads=wide,
        narrow_loads=sum(_is_load(name) and not name.endswith((".128", ".64")) for _, name, _ in loop),
        instructions=len(loop),
        turns=wide // built.wide_loads if built.wide_loads else 0,
    )


def _disassembled(architecture: int, cubins: Sequence[bytes]) -> list[list[_Instruction]]:
    """Return the instructions of each, from one run over all of them: the disassembler takes 0.4 s to start."""
    machine = f"SM{architecture}{'a' if architecture >= 90 else ''}"  # as Triton asks ptxas for it
    codes = [_text_of(cubin) for cubin in cubins]
    lines = _tool("nvdisasm", ["-b", machine, "-ndf"], b"".join(codes)).splitlines()  # no data flow: sooner
    found = [m for line in lines if (m := _INSTRUCTION.search(line))]
    everything = [_Instruction(int(m[1], 16), m[2], m[3]) for m in found]
    ends = list(itertools.accumulate(map(len, codes)))
    places = [bisect.bisect_left(everything, (end,)) for end in ends]
    return [everything[start:end] for start, end in zip([0, *places], places, strict=False)]


def _text_of(cubin: bytes) -> bytes:
    """Return the machine code of an ELF file of 64 bits: its sections named .text."""
    (table,), (count, names_at) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
    # Name, type, flags, address, offset, size, and what else there is of each section.
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    names = sections[names_at][4]
    return b"".join(cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", names + s[0]))


def _tool(name: str, options: Sequence[str], content: bytes) -> str:
    """Run one of the tools that Triton brings on a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(content)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        done = subprocess.run([str(tool), *options, str(file)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _is_load(name: str) -> bool:
    return name.split(".")[0] in ("LDG", "LDGSTS")


def _is_wide(name: str) -> bool:
    return _is_load(name) and ".128" in name


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)")


def _loops(code: list[_Instruction]) -> Iterator[list[_Instruction]]:
    """Yield the instructions from each place that a later branch goes back to, up to that branch."""
    for k, (address, name, operands) in enumerate(code):
        targets = re.findall(r"\b0x([0-9a-f]+)", operands) if name.startswith("BRA") else []
        # A branch to itself ends every kernel.
        if targets and code[0].address <= int(targets[-1], 16) < address:
            yield code[bisect.bisect_left(code, (int(targets[-1], 16),)) : k + 1]
