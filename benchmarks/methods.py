"""Time of one weights() call a method, ours and the peer's, on the same matrices in one process.

Both get what they are made for: we the Gramian through gradsurg.weights, which checks its arguments, and the rows where
a method needs them; the peer its weighting or aggregator, built once. Calls of the two alternate, on other matrices
each time, and the median over all is printed. Methods that the peer solves with cvxpy must take at most a fifth of its
time, others no longer; exits with 1 where one does.

Without generator= a call draws what a generator of seed 0 draws first, the same in every call, so that "random" has
nothing to draw a second time, and pcgrad, gradvac, modo and graddrop draw anew. "random drawn" is the call with a
generator of its own, which like the peer's has new weights each time; it is shown for comparison.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torchjd.aggregation as peer
from torch import Tensor

import gradsurg
from benchmarks.record import conditions, record
from gradsurg.surgery import PCD, CAGrad, FairGrad, GradVac, Krum, MoDo, SDMGrad, Surgery

Call = Callable[[Tensor, Tensor], object]
SMOOTH = {"cagrad", "nash_mtl"}  # the peer solves these with cvxpy

warnings.simplefilter("ignore")


def peers(m: int) -> dict[str, tuple[str | Surgery, Call]]:
    """Return name -> (our surgery, the peer's call on (J, G))."""

    def rows(weighting: Callable[[Tensor], object]) -> Call:
        return lambda J, G: weighting(J)

    def gramian(weighting: Callable[[Tensor], object]) -> Call:
        return lambda J, G: weighting(G)

    nash = peer.NashMTL(n_tasks=m, max_norm=0.0, update_weights_every=1, optim_niter=20)
    return {
        "sum": ("sum", rows(peer.SumWeighting())),
        "mean": ("mean", rows(peer.MeanWeighting())),
        "random": ("random", rows(peer.RandomWeighting())),
        "cone": ("cone", gramian(peer.DualProjWeighting())),
        "upgrad": ("upgrad", gramian(peer.UPGradWeighting())),
        "mgda": ("mgda", gramian(peer.MGDAWeighting())),
        "pcgrad": ("pcgrad", gramian(peer.PCGradWeighting())),
        "gradvac": (GradVac(0.5), gramian(peer.GradVacWeighting())),
        "cagrad": (CAGrad(0.5), gramian(peer.CAGradWeighting(c=0.5))),
        "imtl_g": ("imtl_g", gramian(peer.IMTLGWeighting())),
        "nash_mtl": ("nash_mtl", rows(nash.weighting)),
        "fairgrad": (FairGrad(2.0), gramian(peer.FairGradWeighting(alpha=2.0))),
        "aligned_mtl": ("aligned_mtl", gramian(peer.AlignedMTLWeighting())),
        "config": ("config", rows(peer.ConFIG())),
        "sdmgrad": (SDMGrad(), gramian(peer.SDMGradWeighting())),
        "modo": (MoDo(), gramian(peer.MoDoWeighting())),
        "cr_mogm": ("cr_mogm", gramian(peer.CRMOGMWeighting(peer.MGDAWeighting()))),
        "excess_mtl": ("excess_mtl", rows(peer.ExcessMTLWeighting())),
        "pcd": (PCD(), gramian(peer.PCDWeighting())),
        "krum": (Krum(1), gramian(peer.KrumWeighting(n_byzantine=1))),
        "graddrop": ("graddrop", rows(peer.GradDrop())),
        "trimmed_mean": ("trimmed_mean", rows(peer.TrimmedMean(1))),
    }


def ours(surgery: str | Surgery) -> Call:
    """Return our call on (J, G)."""
    if surgery in ("graddrop", "trimmed_mean"):
        return lambda J, G: gradsurg.combine(J, surgery)
    return lambda J, G: gradsurg.weights(G, surgery)


def matrices(m: int, parameters: int, count: int) -> list[Tensor]:
    """Return rows whose sum conflicts with some of them, as in training: less 0.7 of their mean."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(m, parameters, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [J - 0.7 * J.mean(0) for J in drawn]


def medians(ours: Call, theirs: Call, data: list[tuple[Tensor, Tensor]], seconds: float) -> tuple[float, float]:
    """Return the two medians in µs, of calls that alternate for about this long."""
    times: tuple[list[float], list[float]] = ([], [])
    for J, G in data[:3]:
        ours(J, G), theirs(J, G)
    end, k = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or k < 20:
        J, G = data[k % len(data)]
        for call, spent in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            call(J, G)
            spent.append(time.perf_counter() - began)
        k += 1
    return 1e6 * statistics.median(times[0]), 1e6 * statistics.median(times[1])


def main() -> int:
    """Measure and print; return 1 where a method is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0, help="a method")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = [(J, J @ J.T) for J in matrices(options.tasks, options.parameters, 50)]
    lines = [
        f"torchjd {importlib.metadata.version('torchjd')}, 1 thread; {options.tasks} tasks, {options.parameters} "
        "parameters, float64; medians in µs",
        "",
        f"| {'method':12} | {'gradsurg':>9} | {'torchjd':>9} | {'ours / theirs':>13} | allowed |",
        f"| {'-' * 12} | {'-' * 8}: | {'-' * 8}: | {'-' * 12}: | {'-' * 6}: |",
    ]
    print("\n".join(lines))
    slow = []
    for name, (surgery, theirs) in peers(options.tasks).items():
        mine, other = medians(ours(surgery), theirs, data, options.seconds)
        allowed = 0.2 if name in SMOOTH else 1.0
        lines.append(f"| {name:12} | {mine:9.1f} | {other:9.1f} | {mine / other:13.2f} | {allowed:7.1f} |")
        print(lines[-1], flush=True)
        if mine > allowed * other:
            slow.append(name)
    generator = torch.Generator()
    mine, other = medians(
        lambda J, G: gradsurg.weights(G, "random", generator=generator),
        peers(options.tasks)["random"][1],
        data,
        options.seconds,
    )
    lines.append(f"| random drawn | {mine:9.1f} | {other:9.1f} | {mine / other:13.2f} | {'-':>7} |")
    print(lines[-1])
    lines += ["", f"slower than allowed: {', '.join(slow) or 'none'}"]
    print(f"{lines[-1]}\n\n{conditions()}\n{record('methods', chr(10).join(lines))}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
