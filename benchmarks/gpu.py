"""The CUDA path: correctness first, then speed, on any CUDA machine. One command, one dated result file.

    python -m benchmarks.gpu                  # on a CUDA machine: everything
    python -m benchmarks.gpu --dry            # no GPU needed: the model, and what the compiled kernels are made of
    python -m benchmarks.gpu --write-budget   # no GPU needed: count registers anew (kernel_budget.json)
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse   # no GPU needed: run every section, tiny, untimed
    python -m benchmarks.gpu --minutes 8      # leave out what cannot be begun by then

Each number is written when it was measured; what fails is a row that says so. Peers that are not installed are left
out. Whole training steps come right after correctness, so that a short run has them. Every time is the median of CUDA
events, with its 20th and 80th percentile; the answer's error stands beside it. What is computed from byte and
instruction counts and not measured is called "model".
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_model import print_model
from benchmarks.gpu_report import judge, machine, save, tables
from benchmarks.record import record

BUDGET = Path(__file__).parent / "kernel_budget.json"


def print_facts(architectures: Sequence[int], names: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    from benchmarks.kernels.machine_code import measure
    from benchmarks.kernels.shipped import shipped

    names = [one.name for one in shipped()] if names is None else names
    found = measure([(architecture, name) for architecture in architectures for name in names])
    everything = {}
    for architecture in architectures:
        facts = everything[architecture] = {name: found[architecture, name] for name in names}
        print(f"\nMachine code for sm_{architecture} (read from the disassembly)")
        heads = {"registers": 10, "shared": 8, "local": 7, "spills": 7, "16-byte loads": 14, "loop": 6, "turns": 6}
        print(" " * 46 + "".join(f"{head:>{width}}" for head, width in heads.items()))
        for name, fact in facts.items():
            print(
                f"{name:46}{fact.registers:10}{fact.shared:8}{fact.local:7}{fact.spills:7}{fact.wide_loads:14}"
                f"{fact.instructions:6}{fact.turns:6}"
            )
    return everything


def write_budget() -> None:
    """Write what every specialisation takes now; a later change that takes more has to say so in its diff."""
    import triton

    from benchmarks.kernels.machine_code import ARCHITECTURES

    everything = print_facts(ARCHITECTURES)
    budget = {
        f"sm_{architecture}": {name: [fact.registers, fact.shared] for name, fact in facts.items()}
        for architecture, facts in everything.items()
    }
    head = {"triton": triton.__version__, "what": "registers of a thread, bytes of shared memory of a program"}
    lines = [f' "{key}": {json.dumps(value)}' for key, value in head.items()]
    groups = [
        f'  "{sm}": {{\n' + ",\n".join(f"   {json.dumps(k)}: {v}" for k, v in names.items()) + "\n  }"
        for sm, names in budget.items()
    ]
    BUDGET.write_text("{\n" + ",\n".join([*lines, ' "budget": {\n' + ",\n".join(groups) + "\n }"]) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print the model and the compiled kernels' facts only")
    parser.add_argument("--rehearse", action="store_true", help="run every section in the interpreter, untimed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many minutes")
    parser.add_argument("--write-budget", action="store_true", help=f"count registers anew, into {BUDGET.name}")
    parser.add_argument("--architectures", type=int, nargs="*", help="for --dry: 80 90 100 by default")
    parser.add_argument("--kernels", nargs="*", help="for --dry: only those whose name begins so")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    if chosen.write_budget:
        write_budget()
        return 0
    if chosen.dry or not (torch.cuda.is_available() or chosen.rehearse):
        from benchmarks.kernels.machine_code import ARCHITECTURES
        from benchmarks.kernels.shipped import shipped

        print("No card is used: what follows is computed or read from compiled code, not timed.")
        print_model()
        names = [one.name for one in shipped() if one.name.startswith(tuple(chosen.kernels or [""]))]
        print_facts(chosen.architectures or ARCHITECTURES, names)
        return 0
    about = machine()
    keep = (lambda results: None) if chosen.rehearse else functools.partial(save, about)
    bench = Bench(chosen.rehearse, chosen.minutes, keep)
    print(json.dumps(about, indent=1))
    print_model()
    from benchmarks.gpu_passes import check_correctness, measure_copy, measure_passes, measure_solver
    from benchmarks.gpu_peers import measure_peers
    from benchmarks.gpu_training import measure_training

    sections = (check_correctness, measure_training, measure_copy, measure_passes, measure_solver, measure_peers, judge)
    for section in sections:
        name = section.__name__.replace("_", " ")
        print(f"\n{name}")
        try:
            section(bench)
        except BaseException as error:
            about["ended in"] = f"{name}, by {type(error).__name__}"
            keep(bench.results)
            raise
    if chosen.rehearse:
        print("\nA rehearsal: every section ran, nothing was timed.")
    else:
        print(f"written: {record('gpu', tables(about, bench.results))}")
    failed = [row for row in bench.results if "failed" in row and row.get("by", "gradsurg").startswith("gradsurg")]
    for row in failed:
        print("failed:", row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
