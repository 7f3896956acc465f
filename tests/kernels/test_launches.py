"""What the launchers ask Triton for: every launch is of a specialisation that ships, compiled to the same code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are launched where it is")

from triton.runtime.jit import JITFunction

from benchmarks.kernels.machine_code import compile_for
from benchmarks.kernels.shipped import shipped
from gradsurg.linalg.kernels import combine, cone, gramian, inner, left, moved
from gradsurg.linalg.kernels.dispatch import DTYPES

OPTIONS = {"num_warps", "maxnreg", "enable_fp_fusion"}


def run_all(m, row, out, unaligned):
    def tensor(dtype):
        return torch.zeros(101, dtype=dtype)[unaligned:]

    rows = [[tensor(row)] for _ in range(m)]
    gramian.gramian(rows)
    combine.combine(rows, torch.ones(m, dtype=torch.float64), [tensor(out)])
    combine.correct(rows, torch.ones(m, dtype=torch.float64), [tensor(out)], before=[tensor(out)])
    inner.inner(rows, [tensor(out)], [tensor(out)])
    after, modes, ones = [tensor(out)], torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.float64)
    layout = inner.layout_of(rows, [tensor(out)], after, [tensor(out)], partitions=[0])
    flags = left.left_in_place(layout, m, [0], modes).flags
    moved.gramian_moved(layout, m, ones, flags, modes)
    combine.correct(rows, torch.ones(m, dtype=torch.float64), after, layout=layout, factors=ones, flags=flags)
    left.shorten(layout, m, ones, after)
    if m <= cone.MOST_TASKS:
        G = torch.eye(m, dtype=torch.float64)
        cone.nonnegative(G, G[0])
        cone.project_rows(G)
        cone.simplex(G)


def key(kernel, constants, warps, registers):
    return kernel, tuple(sorted((name, str(value)) for name, value in constants.items())), warps, registers


@pytest.fixture
def launches(monkeypatch):
    """Record launches instead of doing them."""
    made = set()

    def record(self, grid):
        def launch(*arguments, **keywords):
            assert keywords["enable_fp_fusion"] is True  # Triton 3.10 turns it off by default
            constants = {name: value for name, value in keywords.items() if name not in OPTIONS}
            assert len(arguments) + len(constants) == len(self.arg_names)
            made.add(key(self, constants, keywords["num_warps"], keywords.get("maxnreg")))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", record)
    return made


def test_what_is_launched_is_what_ships(launches):
    for row, outs in DTYPES.items():
        for out in outs:
            for unaligned in (0, 1):
                for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33):
                    run_all(m, row, out, unaligned)
    wanted = {key(one.kernel, one.constants, one.warps, one.registers) for one in shipped()}
    assert launches == wanted


def compare_code():
    """With a driver that only says which card it is for, let the launchers compile, and compare byte by byte."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Card:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    driver.set_active(Card())
    compiled = {}

    def compile_only(self, grid):
        def launch(*arguments, **keywords):
            constants = {name: value for name, value in keywords.items() if name not in OPTIONS}
            made = self.warmup(*arguments, grid=grid, **keywords)
            compiled[key(self, constants, keywords["num_warps"], keywords.get("maxnreg"))] = made

        return launch

    JITFunction.__getitem__ = compile_only
    run_all(3, torch.float32, torch.float32, 0)
    run_all(16, torch.bfloat16, torch.float32, 1)
    assert len(compiled) == 20
    for one in shipped():
        mine = compiled.pop(key(one.kernel, one.constants, one.warps, one.registers), None)
        assert mine is None or mine.asm["cubin"] == compile_for(one, 90).asm["cubin"], one.name
    assert not compiled


def test_what_is_launched_is_compiled_to_the_same_code(tmp_path):
    # In a process and a cache of its own: what Triton caches for this card must not reach a real one, and cached code
    # names the lines of the file as it was.
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    code = "from tests.kernels.test_launches import compare_code; compare_code()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
