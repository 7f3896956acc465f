"""The CUDA path: correctness first, then speed, on any CUDA machine. One command, one dated result file.

    python -m benchmarks.gpu                  # on a CUDA machine: everything
    python -m benchmarks.gpu --dry            # no GPU needed: the model, and what the compiled kernels are made of
    python -m benchmarks.gpu --write-budget   # no GPU needed: count registers anew (kernel_budget.json)
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse   # no GPU needed: run every section, tiny, untimed

Every time is the median of CUDA events, with its 20th and 80th percentile; the answer's error stands beside it. What
is computed from byte and instruction counts and not measured is called "model".
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_model import DTYPES, TASKS, combine_work, gramian_work, print_model
from benchmarks.gpu_report import judge, machine, number, save
from gradsurg import gramian as plain
from gradsurg import reference, solvers

HERE = Path(__file__).parent
BUDGET = HERE / "kernel_budget.json"

Losses = Callable[[], dict[str, Tensor]]

SIZES = {"1 M": 1_000_000, "25 M": 25_000_000, "100 M": 100_000_000, "1 G": 1_000_000_000}


# -- what the kernels are made of ------------------------------------------------------------------------------------


def print_facts(architectures: Sequence[int], names: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    from gradsurg.kernels.shipped import measure, shipped

    names = [one.name for one in shipped()] if names is None else names
    everything = {}
    for architecture in architectures:
        facts = everything[architecture] = measure(architecture, names)
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

    from gradsurg.kernels.shipped import ARCHITECTURES

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


# -- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """Times things on one device; on a rehearsal, only runs them."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.results: list[dict[str, Any]] = []
        self.copy_bandwidth = float("nan")
        # Twice the largest second-level cache there is: what is timed starts with nothing of its own in it.
        self.flush = torch.empty(1 if rehearse else 256 << 20, dtype=torch.int8, device=self.device)

    def time(self, run: Callable[[], object], repeats: int = 20) -> dict[str, float]:
        """Return median, 20th and 80th percentile of the device's time, and the host's, in seconds."""
        run()
        if self.rehearse:
            return dict.fromkeys(("seconds", "p20", "p80", "host"), float("nan"))
        for _ in range(3):
            run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        host = []
        for start, end in events:
            self.flush.zero_()
            start.record()
            before = time.perf_counter()
            run()
            host.append(time.perf_counter() - before)
            end.record()
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) / 1e3 for start, end in events)
        return {
            "seconds": statistics.median(times),
            "p20": times[len(times) // 5],
            "p80": times[4 * len(times) // 5],
            "host": statistics.median(host),
        }

    def watch(self, run: Callable[[], object], repeats: int = 20) -> dict[str, float]:
        """Return `time`'s numbers, how many kernels and copies one call launches, and the most memory it takes."""
        times = self.time(run, repeats)
        if self.rehearse:
            return {**times, "launches": float("nan"), "extra_bytes": float("nan")}
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - base
        return {**times, "launches": count_launches(run), "extra_bytes": extra}

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be had, with a tenth to spare."""
        return self.rehearse or size * 1.1 < torch.cuda.mem_get_info()[0]

    def keep(self, what: str, **row: Any) -> None:
        self.results.append({"what": what, **row})
        print(f"{what:24}" + "  ".join(f"{key} {number(value)}" for key, value in row.items()), flush=True)

    def rows(self, m: int, parameters: int, dtype: torch.dtype, tensors: int = 1) -> list[list[Tensor]]:
        size = max(1, parameters // tensors)
        return [
            [torch.randn(size, device=self.device, dtype=dtype) for _ in range(tensors)]
            for _ in range(m)
        ]  # fmt: skip


def count_launches(run: Callable[[], object]) -> int:
    """Return how many kernels and copies one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.device_type.name == "CUDA")


def check_correctness(bench: Bench) -> None:
    """Every kernel against float64 before anything is timed; an assertion that fails ends the run."""
    from gradsurg.kernels import combine, cone, gramian, inner

    sizes = [1, 3, 130] if bench.rehearse else [1, 3, 0, 4097, 1_000_003]
    for m in (2, 3, 8, 9) if bench.rehearse else (1, 2, 3, 5, 8, 9, 16, 32, 40):
        for dtype in DTYPES:
            rows = [[torch.randn(n, device=bench.device).to(dtype) for n in sizes] for _ in range(m)]
            like = [torch.randn(n, device=bench.device).to(dtype) for n in sizes]
            after = [p * 0.99 for p in like]
            exact = reference.gramian(rows, like)
            lengths = exact.diagonal().sqrt()
            error = ((gramian.gramian(rows) - exact).abs() / (lengths[:, None] * lengths)).max().item()
            assert error <= 1e-13, (m, dtype, error)
            weights = torch.randn(m, dtype=torch.float64, device=bench.device)
            out = [torch.empty_like(p) for p in like]
            combine.combine(rows, weights, out)
            wanted = reference.combine(rows, weights.tolist(), like)
            off = ((reference.flat(out, like) - wanted).abs() / wanted.abs().clamp(min=1e-6)).max().item()
            assert off <= torch.finfo(dtype).eps, (m, dtype, off)
            products, square = inner.inner(rows, like, after)
            moved, length = reference.inner_update(rows, like, after, [1.0] * len(like))
            assert ((products - moved).abs() <= 1e-13 * lengths * length**0.5).all()
            assert abs(square.item() - length) <= 1e-13 * length
            if m <= 32:
                lam, mine = cone.nonnegative(exact, exact.sum(-1)), cone.simplex(exact)
                wanted_lam = solvers.nonnegative(exact.cpu(), exact.sum(-1).cpu())
                J = reference.matrix(rows, like)
                assert ((lam.cpu() - wanted_lam) @ J.cpu()).abs().max() <= 1e-8 * lengths.max()
                assert ((mine.cpu() - solvers.simplex(exact.cpu())) @ J.cpu()).abs().max() <= 1e-6 * lengths.max()
            bench.keep("correct", m=m, dtype=str(dtype), gramian_error=error, combine_error=off)


def measure_copy(bench: Bench) -> None:
    n = 1000 if bench.rehearse else 1 << 28
    source, target = (torch.empty(n, dtype=torch.float32, device=bench.device) for _ in range(2))
    times = bench.time(lambda: target.copy_(source))
    bench.copy_bandwidth = 8 * n / times["seconds"]
    bench.keep("copy", bytes_per_second=bench.copy_bandwidth, **times)


def measure_passes(bench: Bench) -> None:
    from gradsurg.kernels import combine, gramian, inner

    for label, parameters in {"tiny": 300}.items() if bench.rehearse else SIZES.items():
        for dtype in DTYPES:
            for m in (2, 9) if bench.rehearse else TASKS:
                if not bench.fits((m + 2) * parameters * dtype.itemsize):
                    print(f"{label} x {m} x {dtype}: does not fit")
                    continue
                rows = bench.rows(m, parameters, dtype)
                out = [torch.empty_like(rows[0][0])]
                before = [torch.zeros_like(rows[0][0])]
                weights = torch.ones(m, dtype=torch.float64, device=bench.device)
                passes: list[tuple[str, Callable[[], object], dict[str, float]]] = [
                    ("gramian", functools.partial(gramian.gramian, rows), gramian_work(m, dtype)),
                    ("combine", functools.partial(combine.combine, rows, weights, out), combine_work(m, dtype)),
                    (
                        "inner",
                        functools.partial(inner.inner, rows, before, out),
                        {"bytes": (m + 2) * dtype.itemsize, "fma": m + 1},
                    ),
                ]
                for what, run, work in passes:
                    times = bench.time(run)
                    moved = work["bytes"] * parameters / times["seconds"]
                    bench.keep(
                        what,
                        P=label,
                        m=m,
                        dtype=str(dtype),
                        share_of_copy=moved / bench.copy_bandwidth,
                        model_bytes=work["bytes"] * parameters,
                        model_fma=work["fma"] * parameters,
                        **times,
                    )
                del rows, out, before, passes


def measure_solver(bench: Bench) -> None:
    from gradsurg.kernels import cone

    for m in (2, 5) if bench.rehearse else TASKS:
        J = torch.randn(m, 4 * m, dtype=torch.float64, device=bench.device)
        J = J - J.mean(0)
        G, ones = J @ J.T, torch.ones(m, dtype=torch.float64, device=bench.device)
        b = G @ ones - 0.1 * G.diagonal()
        for what, run in (
            ("cone", lambda G=G, b=b: cone.nonnegative(G, b)),
            ("upgrad", lambda G=G, r=ones: cone.upgrad(G, r)),
            ("mgda", lambda G=G: cone.simplex(G)),
        ):
            bench.keep(f"solver {what}", m=m, model_bytes=8 * (m * m + 2 * m), **bench.watch(run))


def shapes_of_resnet50() -> list[tuple[int, ...]]:
    """The 161 parameters of a ResNet-50 (25.6 M)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, inp, k in ((width, width_in, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, inp, k, k), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def measure_peers(bench: Bench) -> None:
    """The whole surgery on gradients that are there already, ours and others': from m lists of tensors to p.grad."""
    from gradsurg.kernels import combine, cone, gramian

    shapes = [(3, 2), (5,)] if bench.rehearse else shapes_of_resnet50()
    for m in (2,) if bench.rehearse else (2, 4, 8):
        rows = [[torch.randn(shape, device=bench.device) for shape in shapes] for _ in range(m)]
        out = [torch.empty_like(g) for g in rows[0]]
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in out]

        def ours(rows: list[list[Tensor]] = rows, out: list[Tensor] = out) -> None:
            G = gramian.gramian(rows)
            combine.combine(rows, 1 + cone.nonnegative(G, G.sum(-1)), out)

        def concatenated(rows: list[list[Tensor]] = rows) -> Tensor:
            J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            return J @ J.T

        def torch_path(rows: list[list[Tensor]] = rows, parameters: list[nn.Parameter] = parameters) -> None:
            G = plain.gramian(rows).cpu()
            weights = 1 + solvers.nonnegative(G, G.sum(-1))
            plain.combine(rows, weights.tolist(), parameters)

        contestants: dict[str, Callable[[], object]] = {
            "gradsurg cone": ours,
            "cuBLAS Gramian of a concatenated matrix (Gramian alone)": concatenated,
            "plain torch path": torch_path,
        }
        if not bench.rehearse:
            contestants["torch.compile of a plain Gramian and sum"] = compiled_twin(rows)
        contestants |= dict(peers(rows, parameters))
        work = [gramian_work(m, torch.float32), combine_work(m, torch.float32)]
        count = sum(g.numel() for g in out)
        for name, run in contestants.items():
            bench.keep(
                "surgery",
                m=m,
                by=name,
                path="triton" if run is ours else "torch",
                model_bytes=sum(one["bytes"] for one in work) * count,
                model_fma=sum(one["fma"] for one in work) * count,
                **bench.watch(run),
            )


def compiled_twin(rows: list[list[Tensor]]) -> Callable[[], object]:
    def twin() -> list[Tensor]:
        G = torch.stack(
            [
                torch.stack([torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum() for y in rows])
                for x in rows
            ]
        )
        weights = 1 + 0 * G.sum(-1)  # the program itself does not compile: it is left out
        return [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]

    return torch.compile(twin)


def peers(rows: list[list[Tensor]], parameters: list[nn.Parameter]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the others that are installed, in the fastest form of each that takes gradients."""
    try:
        from torchjd.aggregation import DualProj, UPGrad
        from torchjd.autojac import jac_to_grad
    except ImportError:
        print("torchjd is not installed: left out")
    else:
        jacobians = [torch.stack(column) for column in zip(*rows, strict=True)]  # as its backward pass leaves them
        for summed in (False, True):  # concatenated, or one Gramian a parameter, added up
            for name, aggregator in (("DualProj", DualProj()), ("UPGrad", UPGrad())):

                def run(aggregator: Any = aggregator, summed: bool = summed) -> object:
                    for p, jacobian in zip(parameters, jacobians, strict=True):
                        p.jac, p.grad = jacobian, None  # type: ignore[attr-defined]
                    return jac_to_grad(parameters, aggregator, optimize_gramian_computation=summed)

                yield f"TorchJD {name}{', Gramian summed' if summed else ''}", run
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        print("pytorch_optimizer is not installed: left out")
    else:
        wrapper = PCGrad(torch.optim.SGD(parameters, lr=0.0))
        flat = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
        reached = [torch.ones_like(g) for g in flat]
        yield "pytorch_optimizer PCGrad", lambda: wrapper.project_conflicting([g.clone() for g in flat], reached)


# -- the run ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print the model and the compiled kernels' facts only")
    parser.add_argument("--rehearse", action="store_true", help="run every section in the interpreter, untimed")
    parser.add_argument("--write-budget", action="store_true", help=f"count registers anew, into {BUDGET.name}")
    parser.add_argument("--architectures", type=int, nargs="*", help="for --dry: 80 90 100 by default")
    parser.add_argument("--kernels", nargs="*", help="for --dry: only those whose name begins so")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    if chosen.write_budget:
        write_budget()
        return 0
    if chosen.dry or not (torch.cuda.is_available() or chosen.rehearse):
        from gradsurg.kernels.shipped import ARCHITECTURES, shipped

        print("No card is used: what follows is computed or read from compiled code, not timed.")
        print_model()
        names = [one.name for one in shipped() if one.name.startswith(tuple(chosen.kernels or [""]))]
        print_facts(chosen.architectures or ARCHITECTURES, names)
        return 0
    bench, about = Bench(chosen.rehearse), machine()
    print(json.dumps(about, indent=1))
    print_model()
    from benchmarks.gpu_training import measure_training

    for section in (check_correctness, measure_copy, measure_passes, measure_solver, measure_peers, measure_training):
        print(f"\n{section.__name__.replace('_', ' ')}")
        section(bench)
    judge(bench)
    if chosen.rehearse:
        print("\nA rehearsal: every section ran, nothing was timed.")
    else:
        print(f"\nwritten: {', '.join(map(str, save(about, bench.results)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
