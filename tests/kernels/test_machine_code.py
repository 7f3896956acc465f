"""What the compiled kernels are made of, for every specialisation that ships: no GPU is needed."""

import itertools
import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are compiled where it is")

from benchmarks.kernels.machine_code import ARCHITECTURES, measure  # noqa: E402
from benchmarks.kernels.shipped import shipped  # noqa: E402

BUDGET = json.loads((Path(__file__).parents[2] / "benchmarks" / "kernel_budget.json").read_text())
NAMES = [specialisation.name for specialisation in shipped()]
# One of each kernel, at its largest, and those that ptxas has spilled before.
QUICK = [
    "pairs m<=4 bf16 aligned",
    "pairs m<=8 fp32 aligned",
    "pairs m<=8 bf16 aligned",
    "dots m<=16 bf16 aligned",
    "dots m<=32 fp32 aligned",
    "reduce",
    "inner 8 tasks fp32 rows fp32 aligned",
    "combine 8 tasks fp32 rows fp32 aligned",
    "combine 8 tasks fp32 rows fp32 unaligned",
    "correct 8 tasks fp32 rows bf16 aligned",
    "still bf16 aligned",
    "left",
    "moved 8 tasks fp32 rows fp32 aligned",
    "cone m<=8",
    "simplex m<=32",
]


def check(jobs):
    expected = {specialisation.name: specialisation.wide_loads for specialisation in shipped()}
    narrow = {specialisation.name: specialisation.narrow_loads for specialisation in shipped()}
    wrong = {}
    for (architecture, name), facts in measure(jobs).items():
        problems = []
        if facts.spills or facts.local:
            problems.append("local memory is used")
        if expected[name] and (facts.turns < 1 or facts.wide_loads != facts.turns * expected[name]):
            problems.append(f"{facts.wide_loads} loads of 16 bytes where a multiple of {expected[name]} is due")
        if expected[name] and facts.narrow_loads > facts.turns * narrow[name]:
            problems.append(f"{facts.narrow_loads} narrow loads in the main loop")
        if triton.__version__ == BUDGET["triton"]:
            registers, shared = BUDGET["budget"][f"sm_{architecture}"][name]
            if facts.registers > registers or facts.shared > shared:
                problems.append(f"the budget is {registers} registers and {shared} bytes of shared memory")
        if problems:
            wrong[architecture, name] = (problems, facts)
    assert not wrong


LARGEST = [(90, name) for name in QUICK]


def test_largest_kernels():
    check(LARGEST)


@pytest.mark.slow
def test_everything_else_that_ships():
    # In one pool of processes: each imports torch and Triton, 3 s, before it compiles anything.
    check([job for job in itertools.product(ARCHITECTURES, NAMES) if job not in LARGEST])


def test_budget_is_of_what_ships():
    assert list(BUDGET["budget"]) == [f"sm_{architecture}" for architecture in ARCHITECTURES]
    for budget in BUDGET["budget"].values():
        assert list(budget) == NAMES


def test_budget_is_of_this_triton():
    if triton.__version__ != BUDGET["triton"]:
        pytest.skip(
            f"registers were counted with Triton {BUDGET['triton']}, this is {triton.__version__}: "
            "python -m benchmarks.gpu --write-budget counts anew"
        )
