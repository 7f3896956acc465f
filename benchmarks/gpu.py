"""The CUDA path: correctness first, then speed, on any CUDA machine. One command, one dated result file.

    python benchmarks/gpu.py                  # on a CUDA machine: everything
    python benchmarks/gpu.py --dry            # no GPU needed: the model, and what the compiled kernels are made of
    python benchmarks/gpu.py --write-budget   # no GPU needed: count registers anew (kernel_budget.json)
    TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse   # no GPU needed: run every section, tiny, untimed

Every time is the median of CUDA events, with its 20th and 80th percentile; the answer's error stands beside it. What
is computed from byte and instruction counts and not measured is called "model".
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsurg
from gradsurg import gramian as plain
from gradsurg import reference, solvers

HERE = Path(__file__).parent
BUDGET = HERE / "kernel_budget.json"
RESULTS = HERE / "results"

Losses = Callable[[], dict[str, Tensor]]

SIZES = {"1 M": 1_000_000, "25 M": 25_000_000, "100 M": 100_000_000, "1 G": 1_000_000_000}
TASKS = (2, 4, 8, 16, 32)
DTYPES = (torch.float32, torch.bfloat16)
TARGETS = {
    "share of copy bandwidth, Gramian and combination, from 25 M parameters": 0.85,
    "share of a training step": 0.05,
    "times less surgery time than the best peer": 3.0,
}

# Memory bandwidth in bytes a second, processors, clock, float64 multiply-adds a clock of a processor (vector units,
# tensor cores), conversions from and to float64 a clock of a processor. From data sheets and the CUDA programming
# guide's table of instruction throughput; only the model uses them.
CARDS = {
    "A100 SXM 80 GB": (2.04e12, 108, 1.41e9, 32, 64, 16),
    "H100 SXM": (3.35e12, 132, 1.755e9, 64, 128, 16),
    "B200": (8e12, 148, 1.85e9, 64, 64, 16),
    "L40S": (0.864e12, 142, 2.52e9, 2, 2, 2),
}


# -- the model -------------------------------------------------------------------------------------------------------


def gramian_work(m: int, dtype: torch.dtype) -> dict[str, float]:
    """What one parameter costs: bytes read, multiply-adds, float64 ones among them, conversions to float64."""
    if m <= 8:
        M = 2 if m <= 2 else 4 if m <= 4 else 8
        pairs = M * (M + 1) / 2
        return {"bytes": m * dtype.itemsize, "vector": pairs, "tensor": 0, "conversions": M, "fma": pairs}
    tiles = 1 if m <= 16 else 2
    products = 256 * tiles * (tiles + 1) / 2
    # Conversions read from SASS: once a tile that is alone, twice where two tiles meet.
    return {
        "bytes": m * dtype.itemsize,
        "vector": 0,
        "tensor": products,
        "conversions": 16 * tiles * tiles,
        "fma": products,
    }


def combine_work(m: int, dtype: torch.dtype) -> dict[str, float]:
    """As `gramian_work`, for u = Σ w_i g_i into tensors of the rows' dtype."""
    padded = 4 if m <= 4 else 8 * math.ceil(m / 8)
    return {
        "bytes": (m + 1) * dtype.itemsize,
        "vector": padded,
        "tensor": 0,
        "conversions": padded + 2,
        "fma": padded,
    }


def model_seconds(work: dict[str, float], parameters: int, card: str) -> tuple[float, str]:
    """Return the least time that one card needs, and what binds it."""
    bandwidth, processors, clock, vector, tensor, conversions = CARDS[card]
    clocks = {
        "float64 units": work["vector"] / vector,
        "float64 tensor cores": work["tensor"] / tensor,
        "conversions": work["conversions"] / conversions,
    }
    times = {name: n * parameters / (processors * clock) for name, n in clocks.items()}
    times["memory"] = work["bytes"] * parameters / bandwidth
    binding = max(times, key=lambda name: times[name])
    return times[binding], binding


def print_model() -> None:
    print("\nModel (bytes and instruction counts; nothing here was timed), 100 M parameters")
    print(f"{'':28}{'bytes':>7}{'FMA':>7}{'FMA/byte':>9}" + "".join(f"{card:>32}" for card in CARDS))
    for what, work_of in (("gramian", gramian_work), ("combine", combine_work)):
        for dtype in DTYPES:
            for m in TASKS:
                work = work_of(m, dtype)
                line = f"{what} m={m} {str(dtype)[6:]}"
                line = f"{line:28}{work['bytes']:7.0f}{work['fma']:7.0f}{work['fma'] / work['bytes']:9.2f}"
                for card in CARDS:
                    seconds, binding = model_seconds(work, 100_000_000, card)
                    line += f"{seconds * 1e3:8.2f} ms {binding:>20}"
                print(line)


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

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be had, with a tenth to spare."""
        return self.rehearse or size * 1.1 < torch.cuda.mem_get_info()[0]

    def keep(self, what: str, **row: Any) -> None:
        self.results.append({"what": what, **row})
        print(f"{what:24}" + "  ".join(f"{key} {_number(value)}" for key, value in row.items()), flush=True)

    def rows(self, m: int, parameters: int, dtype: torch.dtype, tensors: int = 1) -> list[list[Tensor]]:
        size = max(1, parameters // tensors)
        return [
            [torch.randn(size, device=self.device, dtype=dtype) for _ in range(tensors)]
            for _ in range(m)
        ]  # fmt: skip


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
                        {"bytes": (m + 2) * dtype.itemsize},
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
                        model_fma=work.get("fma", m) * parameters,
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
            bench.keep(f"solver {what}", m=m, **bench.time(run))


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
        bench_times = {}
        for name, run in contestants.items():
            if not bench.rehearse:
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
            bench_times[name] = bench.time(run)
            peak = float("nan") if bench.rehearse else torch.cuda.max_memory_allocated() - base
            launches = float("nan") if bench.rehearse else count_launches(run)
            bench.keep("surgery", m=m, by=name, launches=launches, extra_bytes=peak, **bench_times[name])


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
    except ImportError:
        print("torchjd is not installed: left out")
    else:
        for name, aggregator in (("TorchJD DualProj", DualProj()), ("TorchJD UPGrad", UPGrad())):

            def run(aggregator: nn.Module = aggregator) -> object:
                return aggregator(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))

            yield name, run
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        print("pytorch_optimizer is not installed: left out")
    else:
        wrapper = PCGrad(torch.optim.SGD(parameters, lr=0.0))
        flat = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
        reached = [torch.ones_like(g) for g in flat]
        yield "pytorch_optimizer PCGrad", lambda: wrapper.project_conflicting([g.clone() for g in flat], reached)


def count_launches(run: Callable[[], object]) -> int:
    """Return how many kernels and copies one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.device_type.name == "CUDA")


# -- a real training step --------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A block of ResNet-50 (He et al. 2016)."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inp, out, k, s in ((wide, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)):
            layers += [nn.Conv2d(inp, out, k, s, k // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        changes = stride != 1 or wide != 4 * width
        self.short: nn.Module = (
            nn.Sequential(nn.Conv2d(wide, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet50(blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    wide = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(wide, width << stage, 2 if block == 0 and stage else 1))
            wide = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Transformer(nn.Module):
    """An encoder of 24 layers of width 1024 and 32 768 tokens: 336 M parameters."""

    def __init__(self, layers: int = 24, width: int = 1024, tokens: int = 32_768) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.layers(self.tokens(x))
        return encoded.mean(1)


def training_cases(bench: Bench, heads: int) -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    if bench.rehearse:
        yield "tiny resnet", resnet50((1, 1), 4), torch.randn(2, 3, 32, 32), 32
        yield "tiny transformer", Transformer(1, 64, 100), torch.randint(100, (2, 8)), 64
        return
    device = bench.device
    yield "ResNet-50", resnet50().to(device), torch.randn(64, 3, 224, 224, device=device), 2048
    yield "transformer 336 M", Transformer().to(device), torch.randint(32_768, (8, 512), device=device), 1024


def measure_training(bench: Bench) -> None:
    """A step with surgery against the same m backward passes, summed by autograd, and against one of the sum."""
    for heads in (3,) if bench.rehearse else (2, 4):
        for name, body, x, width in training_cases(bench, heads):
            model = nn.ModuleList([body, *(nn.Linear(width, 10) for _ in range(heads))]).to(bench.device)

            def losses(model: nn.ModuleList = model, x: Tensor = x) -> dict[str, Tensor]:
                h = model[0](x)
                return {str(i): head(h).square().mean() for i, head in enumerate(list(model)[1:])}

            inner = torch.optim.AdamW(model.parameters(), lr=1e-5)

            def plain_step(inner: torch.optim.Optimizer = inner, losses: Losses = losses) -> None:
                inner.zero_grad()
                torch.stack(list(losses().values())).sum().backward()
                inner.step()

            def separate_step(inner: torch.optim.Optimizer = inner, losses: Losses = losses) -> None:
                inner.zero_grad()
                for loss in (all_losses := list(losses().values())):
                    loss.backward(retain_graph=loss is not all_losses[-1])
                inner.step()

            times = {"sum": bench.time(plain_step, 10), "separate backward passes": bench.time(separate_step, 10)}
            for guarantee in ("gradient", "update"):
                optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=1e-5), guarantee=guarantee)

                def our_step(optimizer: gradsurg.MultiTaskOptimizer = optimizer, losses: Losses = losses) -> None:
                    optimizer.zero_grad()
                    optimizer.total(losses()).backward()
                    optimizer.step()

                if not bench.rehearse:
                    torch.cuda.reset_peak_memory_stats()
                times[f"gradsurg, guarantee={guarantee}"] = bench.time(our_step, 10)
                peak = float("nan") if bench.rehearse else torch.cuda.max_memory_allocated()
                ours = times[f"gradsurg, guarantee={guarantee}"]["seconds"]
                share = 1 - times["separate backward passes"]["seconds"] / ours
                bench.keep("step", model=name, heads=heads, guarantee=guarantee, peak_bytes=peak, surgery_share=share)
            for by, measured in times.items():
                bench.keep("step time", model=name, heads=heads, by=by, **measured)


# -- the run ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    import triton

    about = {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gradsurg": gradsurg.__version__,
        "card": None,
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver and clocks": driver,
        }
    return about


def save(about: dict[str, Any], results: list[dict[str, Any]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    card = str(about["card"]).replace(" ", "-")
    path = RESULTS / f"gpu-{about['date'].replace(':', '')[:15]}-{card}.json"
    path.write_text(json.dumps({"machine": about, "targets": TARGETS, "results": results}, indent=1) + "\n")
    return path


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    for section in (check_correctness, measure_copy, measure_passes, measure_solver, measure_peers, measure_training):
        print(f"\n{section.__name__.replace('_', ' ')}")
        section(bench)
    if chosen.rehearse:
        print("\nA rehearsal: every section ran, nothing was timed.")
    else:
        print(f"\nwritten: {save(about, bench.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
