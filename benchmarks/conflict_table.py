"""Who conflicts: directions on hostile gradients, ours and every peer's, and the real updates of torch's optimizers.

First table: gradients of the families of tests/matrices.py (norms over twelve orders of magnitude, nearly and exactly
opposite, duplicates, zero rows, rank 2, more tasks than parameters, scales of 1e±12), in float32 as in training. A
direction conflicts where cos(u, g_i) < −1e-4 for some task, judged in float64; u = 0 does not. Where a method raises or
returns NaN, it failed: that is counted apart.

Second table: the main job of gradsurg.demo.digits under the optimizers of torch.optim; a step conflicts where the
shared parameters' movement has such a cosine with some task's gradient, by torch.autograd.grad before the step.
Exits with 1 where gradsurg's guarantee lets more than 0.1 % through.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradsurg
from benchmarks.record import conditions, record
from gradsurg.demo.digits import CONFLICT, TASKS, Data, Job, conflicts, train
from gradsurg.surgery import SURGERIES
from tests.matrices import FAMILIES, draw

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchjd.aggregation as peer
    from conflictfree.grad_operator import ConFIG_update
    from pytorch_optimizer import PCGrad as OtherPCGrad

Combine = Callable[[Tensor], Tensor]
MOST = 0.1  # per cent
TASK_COUNTS, PARAMETERS = (2, 4, 8, 16), 12  # with 16 there are more tasks than parameters

# Names of ours -> the peers' classes; MoDo, SDMGrad, CR-MOGM and PCD are weightings of a Gramian there.
AGGREGATORS: dict[str, Callable[[int], object]] = {
    "sum": lambda m: peer.Sum(),
    "mean": lambda m: peer.Mean(),
    "cone": lambda m: peer.DualProj(),
    "upgrad": lambda m: peer.UPGrad(),
    "mgda": lambda m: peer.MGDA(),
    "pcgrad": lambda m: peer.PCGrad(),
    "gradvac": lambda m: peer.GradVac(),
    "cagrad": lambda m: peer.CAGrad(c=0.5),
    "imtl_g": lambda m: peer.IMTLG(),
    "nash_mtl": lambda m: peer.NashMTL(n_tasks=m),
    "fairgrad": lambda m: peer.FairGrad(alpha=2.0),
    "aligned_mtl": lambda m: peer.AlignedMTL(),
    "config": lambda m: peer.ConFIG(),
    "excess_mtl": lambda m: peer.ExcessMTL(),
    "pcd": lambda m: peer.PCD(),
    "krum": lambda m: peer.Krum(n_byzantine=1 if m > 3 else 0),
    "trimmed_mean": lambda m: peer.TrimmedMean(1 if m > 2 else 0),
    "graddrop": lambda m: peer.GradDrop(),
    "random": lambda m: peer.Random(),
}
WEIGHTINGS: dict[str, Callable[[], object]] = {
    "sdmgrad": peer.SDMGradWeighting,
    "modo": peer.MoDoWeighting,
    "cr_mogm": lambda: peer.CRMOGMWeighting(peer.MGDAWeighting()),
}
# Each with a rate at which the plain sum trains. LBFGS wants a closure, SparseAdam sparse gradients.
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum 0.9": partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    "SGD, Nesterov": partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=2e-3),
    "AdamW, decay 0.1": partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=2e-3),
    "RAdam": partial(torch.optim.RAdam, lr=2e-3),
    "Adamax": partial(torch.optim.Adamax, lr=2e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=2e-3),
    "Adagrad": partial(torch.optim.Adagrad, lr=2e-2),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "ASGD": partial(torch.optim.ASGD, lr=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=1e-3),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon, matrices alone"] = lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=2e-3)


def instances(seeds: int) -> Iterator[Tensor]:
    """Yield J, (m, 12), float32."""
    for family in FAMILIES:
        for m in TASK_COUNTS:
            for seed in range(seeds):
                yield draw(family, m, PARAMETERS, seed, torch.float32)


def worst_cosine(J: Tensor, u: Tensor) -> float:
    """Return min_i cos(u, g_i) over the tasks with a gradient; 0 where u is 0."""
    rows, u = J.double(), u.double()
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300)
    rows = rows[rows.any(1)]
    if len(rows) == 0 or not u.any():
        return 0.0
    u = u / u.abs().max()
    return float((rows @ u / (rows.norm(dim=1) * u.norm())).min())


def peers() -> dict[str, list[tuple[str, Callable[[int], Combine]]]]:
    """Return name of ours -> the peers' versions, each a package and what makes a function for m tasks."""

    def weighted(weighting: object) -> Combine:
        return lambda J: weighting(J @ J.T) @ J  # type: ignore[operator]

    def other_pcgrad(m: int) -> Combine:
        projecting = OtherPCGrad(torch.optim.SGD([torch.zeros(1)], lr=1.0), reduction="sum")
        return lambda J: projecting.project_conflicting([*J], [torch.ones_like(row) for row in J])

    found: dict[str, list[tuple[str, Callable[[int], Combine]]]] = {name: [] for name in SURGERIES}
    for name, make in AGGREGATORS.items():
        found[name].append(("torchjd", make))  # type: ignore[arg-type]
    for name, build in WEIGHTINGS.items():
        found[name].append(("torchjd", lambda m, build=build: weighted(build())))  # type: ignore[misc]
    found["config"].append(("conflictfree", lambda m: ConFIG_update))
    found["pcgrad"].append(("pytorch_optimizer", other_pcgrad))
    return found


def shares(make: Callable[[int], Combine], seeds: int) -> tuple[float, float]:
    """Return per cent of the instances on which a method conflicts, and on which it fails."""
    total = bad = failed = 0
    torch.manual_seed(0)
    random.seed(0)
    for J in instances(seeds):
        total += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                u = make(len(J))(J)
        except Exception:  # solvers and linear algebra have errors of their own: whatever it is, there is no direction
            failed += 1
            continue
        if torch.isfinite(u).all():
            bad += worst_cosine(J, u) < CONFLICT
        else:
            failed += 1
    return 100 * bad / total, 100 * failed / total


def directions(seeds: int) -> tuple[str, bool]:
    """Return the first table and whether ours keep to what they promise."""
    count = sum(1 for _ in instances(seeds))
    lines = [
        f"Per cent of {count} hostile instances on which the direction conflicts with some task (in brackets: on which "
        "there is no direction, an error or NaN)",
        "",
        "| surgery | gradsurg | with guarantee | torchjd | others |",
        "| --- | --: | --: | --: | --: |",
    ]
    kept = True
    theirs = peers()

    def cell(make: Callable[[int], Combine]) -> str:
        bad, failed = shares(make, seeds)
        return f"{bad:.1f}" + (f" [{failed:.1f}]" if failed else "")

    for name, kind in SURGERIES.items():
        alone = shares(lambda m, name=name: partial(gradsurg.combine, surgery=name), seeds)  # type: ignore[misc]
        held = shares(
            lambda m, name=name: partial(gradsurg.combine, surgery=name, guarantee="gradient"),  # type: ignore[misc]
            seeds,
        )
        kept &= max(held) <= MOST and (not kind.conflict_free or max(alone) <= MOST)
        jd = [cell(make) for package, make in theirs[name] if package == "torchjd"]
        other = [f"{package} {cell(make)}" for package, make in theirs[name] if package != "torchjd"]
        cells = [f"{x:.1f}" + (f" [{y:.1f}]" if y else "") for x, y in (alone, held)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {', '.join(jd) or '-'} | {', '.join(other) or '-'} |")
        print(lines[-1], flush=True)
    return "\n".join(lines), kept


def updates(epochs: int, seeds: int) -> tuple[str, bool]:
    """Return the second table and whether the guarantee held."""
    data = Data.digits()
    arms: dict[str, dict[str, str] | None] = {
        "plain sum": None,
        "gradient alone": {"guarantee": "gradient"},
        "gradsurg": {},
    }
    steps = seeds * epochs * data.train.count
    lines = [
        f"Per cent of {steps} real updates that conflict with some task; {', '.join(TASKS)} of overlaid digits",
        "",
        f"| optimizer | {' | '.join(arms)} |",
        f"| --- |{' --: |' * len(arms)}",
    ]
    kept = True
    for title, make in OPTIMIZERS.items():
        cells = []
        for arm, options in arms.items():
            bad = 0
            for seed in range(seeds):
                job = Job(optimizer=make, epochs=epochs, seed=seed, options=dict(options or {}))
                bad += int(conflicts(train(job, data, wrapped=options is not None).update).sum())
            cells.append(f"{100 * bad / steps:.1f}")
            kept &= arm != "gradsurg" or 100 * bad / steps <= MOST
        lines.append(f"| {title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines), kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=5, help="a family and number of tasks")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, first_kept = directions(options.instances)
    second, second_kept = updates(options.epochs, options.seeds)
    text = f"{first}\n\n{second}"
    print(f"\n{text}\n\n{conditions()}\n{record('conflict_table', text)}")
    return 0 if first_kept and second_kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
