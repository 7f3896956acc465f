"""The kernels by themselves, for benchmarks/gpu.py: held against float64, then each pass and each solver timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_model import DTYPES, TASKS, combine_work, gramian_work
from gradsurg.linalg import reference
from gradsurg.solvers.problem import HOST

__all__ = ["check_correctness", "measure_copy", "measure_passes", "measure_solver"]

# Numbers of parameters, and of tensors: first as many as in a ResNet-50 and in the transformer of the training step.
LAYOUTS = [
    ("25 M", 25_000_000, 161),
    ("350 M", 350_000_000, 297),
    ("1 M", 1_000_000, 1),
    ("25 M", 25_000_000, 1),
    ("100 M", 100_000_000, 1),
    ("1 G", 1_000_000_000, 1),
]


def check_correctness(bench: Bench) -> None:
    """Every kernel against float64 before anything is timed; one that is wrong is a row that says so."""
    sizes = [1, 3, 130] if bench.rehearse else [1, 3, 0, 4097, 1_000_003]
    for m in (2, 3, 8, 9) if bench.rehearse else (1, 2, 3, 5, 8, 9, 16, 32, 40):
        for dtype in DTYPES:
            bench.attempt("correct", functools.partial(_errors, bench, m, dtype, sizes), m=m, dtype=str(dtype))


def _errors(bench: Bench, m: int, dtype: torch.dtype, sizes: Sequence[int]) -> dict[str, float]:
    """Return the largest errors of Gramian and combination; all kernels were held to their bounds."""
    from gradsurg.linalg.kernels import combine, cone, gramian, inner

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
    # Where the terms cancel, the order of their sum shows in more than the last place of the result.
    terms = reference.combine([[g.abs() for g in row] for row in rows], weights.abs().tolist(), like)
    off = ((reference.flat(out, like) - wanted).abs() / terms.clamp(min=1e-6)).max().item()
    assert off <= torch.finfo(dtype).eps, (m, dtype, off)
    products, square = inner.inner(rows, like, after)
    moved, length = reference.inner_update(rows, like, after, [1.0] * len(like))
    assert ((products - moved).abs() <= 1e-13 * lengths * length**0.5).all()
    assert abs(square.item() - length) <= 1e-13 * length
    if m <= 32:
        lam, mine = cone.nonnegative(exact, exact.sum(-1)), cone.simplex(exact)
        wanted_lam = HOST.nonnegative(exact.cpu(), exact.sum(-1).cpu())
        J = reference.matrix(rows, like)
        assert ((lam.cpu() - wanted_lam) @ J.cpu()).abs().max() <= 1e-8 * lengths.max()
        assert ((mine.cpu() - HOST.simplex(exact.cpu())) @ J.cpu()).abs().max() <= 1e-6 * lengths.max()
    return {"gramian_error": error, "combine_error": off}


def measure_copy(bench: Bench) -> None:
    n = 1000 if bench.rehearse else 1 << 28
    source, target = (torch.empty(n, dtype=torch.float32, device=bench.device) for _ in range(2))
    times = bench.time(lambda: target.copy_(source), ahead=True)
    bench.copy_bandwidth = 8 * n / times["seconds"]
    bench.keep("copy", bytes_per_second=bench.copy_bandwidth, **times)


def measure_passes(bench: Bench) -> None:
    for label, parameters, tensors in [("tiny", 300, 3)] if bench.rehearse else LAYOUTS:
        for dtype in DTYPES:
            for m in (2, 9) if bench.rehearse else TASKS:
                what = f"{label} in {tensors} x {m} x {dtype}"
                if bench.late(what):
                    continue
                if bench.fits((m + 2) * parameters * dtype.itemsize):
                    _measure_passes_over(bench, label, parameters, tensors, m, dtype)
                else:
                    print(f"{what}: does not fit")


def _measure_passes_over(bench: Bench, label: str, parameters: int, tensors: int, m: int, dtype: torch.dtype) -> None:
    """Time the passes over tensors that are gone when this returns: the next ones may not fit beside them."""
    from gradsurg.linalg.kernels import combine, gramian, inner

    rows = bench.rows(m, parameters, dtype, tensors)
    out = [torch.empty_like(g) for g in rows[0]]
    before = [torch.zeros_like(g) for g in rows[0]]
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
        times = bench.time(run, ahead=True)
        bench.keep(
            what,
            P=label,
            tensors=tensors,
            m=m,
            dtype=str(dtype),
            share_of_copy=work["bytes"] * parameters / times["seconds"] / bench.copy_bandwidth,
            model_bytes=work["bytes"] * parameters,
            model_fma=work["fma"] * parameters,
            **times,
        )


def measure_solver(bench: Bench) -> None:
    from gradsurg.linalg.kernels import cone

    for m in (2, 5) if bench.rehearse else TASKS:
        J = torch.randn(m, 4 * m, dtype=torch.float64, device=bench.device)
        J = J - 0.9 * J.mean(0)  # in conflict; without all of the mean, b would leave no minimum
        G, ones = J @ J.T, torch.ones(m, dtype=torch.float64, device=bench.device)
        b = G @ ones - 0.1 * G.diagonal()
        for what, run in (
            ("cone", lambda G=G, b=b: cone.nonnegative(G, b)),
            ("upgrad", lambda G=G, r=ones: r + r @ cone.project_rows(G)),
            ("mgda", lambda G=G: cone.simplex(G)),
        ):
            bench.keep(f"solver {what}", m=m, model_bytes=8 * (m * m + 2 * m), **bench.watch(run))
