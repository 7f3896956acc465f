"""The two-parameter problem of the CAGrad and Nash-MTL papers: every surgery from their starts, a table and a picture.

Two losses of θ in the plane. Above θ_2 = 0 they are two logarithmic valleys whose gradients are nearly opposite; below,
two bowls whose Pareto front is the line from (−7, −8.3) to (7, −8.3). The papers ask who gets there from where:

- Liu et al. 2021, "Conflict-averse gradient descent for multi-task learning": 3 starts, equal scales, 100 000 steps.
- Navon et al. 2022, "Multi-task learning as a bargaining game": 5 starts, the first loss times 0.1, 35 000 steps.

Adam with learning rate 1e-3 in both. All starts of a method are one batch of Gramians, in which each start is a block
with state of its own; Adam is elementwise, so one of it serves all methods and starts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import conditions, record
from gradsurg.normalize import resolve_normalizer
from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.tolerances import ROUNDING_EXACT
from gradsurg.surgery import SURGERIES, FairGrad, NashMTL, Surgery, resolve_surgery
from gradsurg.surgery.base import ElementwiseSurgery
from gradsurg.surgery.pipeline import Pipeline

Array = np.ndarray

FLOOR = 5e-6
LR, BETA_1, BETA_2, EPS = 1e-3, 0.9, 0.999, 1e-8
# The front, and how near counts as there: Adam's step is 1e-3 whatever the gradient, and never quite comes to rest.
FRONT_END, FRONT_HEIGHT, NEAR = 7.0, -8.3, 0.15
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "toy.png"


@dataclass(frozen=True)
class Setting:
    """What a paper ran.

    Attributes:
        paper: Whose it is.
        starts: θ at step 0, shape (S, 2).
        scales: What the two losses are multiplied by.
        steps: Of Adam.
    """

    paper: str
    starts: tuple[tuple[float, float], ...]
    scales: tuple[float, float]
    steps: int


SETTINGS = {
    "cagrad": Setting("Liu et al. 2021", ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), (1.0, 1.0), 100_000),
    "nash_mtl": Setting(
        "Navon et al. 2022", ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)), (0.1, 1.0), 35_000
    ),
}
# The papers' equations fix the length of u whatever that of the gradients, and here it matters: a valley's gradient may
# be a hundred thousand times the usual, and a direction that grows with it fills Adam's second moment for thousands of
# steps, so that the run hardly moves.
AS_PRINTED: dict[str, Surgery] = {"nash_mtl": NashMTL(units="absolute"), "fairgrad": FairGrad(units="absolute")}
# gradsurg's default direction comes on top of the surgeries by themselves.
DEFAULT = "norm + cone"


def losses_and_gradients(theta: Array, scales: Sequence[float] = (1.0, 1.0)) -> tuple[Array, Array]:
    """Return L, shape (n, 2), and J, shape (n, 2, 2): row i of J is the gradient of loss i.

    L_i = s_i (max(tanh(θ_2/2), 0) f_i + max(tanh(−θ_2/2), 0) q_i), with the valleys
    f_1 = log max(|(−θ_1 − 7)/2 + tanh θ_2|, 5e-6) + 6, f_2 = log max(|(−θ_1 + 3)/2 − tanh θ_2 + 2|, 5e-6) + 6 and the
    bowls q_1 = ((θ_1 − 7)² + (θ_2 + 8)²/10)/10 − 20, q_2 = ((θ_1 + 7)² + (θ_2 + 8)²/10)/10 − 20.

    Example:
        >>> L, J = losses_and_gradients(np.array([[0.0, -8.0]]))
        >>> L.round(2).tolist(), J[0].round(2).tolist()
        ([[-15.09, -15.09]], [[-1.4, 0.01], [1.4, 0.01]])
    """
    x, y = theta[:, 0], theta[:, 1]
    half, t = np.tanh(y / 2), np.tanh(y)
    slope, slope_t = (1 - half * half) / 2, 1 - t * t
    up, down = np.maximum(half, 0), np.maximum(-half, 0)
    # At θ_2 = 0 both, as autograd has it: one start lies there.
    up_slope, down_slope = np.where(half >= 0, slope, 0), np.where(half <= 0, -slope, 0)
    L, J = np.empty((len(x), 2)), np.empty((len(x), 2, 2))
    for i, (inside, sign, centre) in enumerate((((-x - 7) / 2 + t, 1.0, 7.0), ((-x + 3) / 2 - t + 2, -1.0, -7.0))):
        size = np.abs(inside)
        valley = np.log(np.maximum(size, FLOOR)) + 6
        steep = np.where(size > FLOOR, 1 / np.where(size > FLOOR, inside, 1), 0)
        bowl = ((x - centre) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
        L[:, i] = scales[i] * (up * valley + down * bowl)
        J[:, i, 0] = scales[i] * (-0.5 * up * steep + down * (x - centre) / 5)
        J[:, i, 1] = scales[i] * (
            up_slope * valley + up * sign * slope_t * steep + down_slope * bowl + down * 0.02 * (y + 8)
        )
    return L, J


@dataclass
class Method:
    """A pipeline and what it remembers; one start is one block."""

    pipeline: Pipeline
    state: State = field(default_factory=dict)

    def direction(self, J: Array, losses: Array, step: int) -> Array:
        """Return u, shape (S, 2), of rows of shape (S, 2, 2)."""
        generator = torch.Generator().manual_seed(step)
        surgery = self.pipeline.surgery
        if isinstance(surgery, ElementwiseSurgery):
            columns = torch.from_numpy(np.ascontiguousarray(J.transpose(1, 0, 2)).reshape(2, -1))
            numbers: Array = surgery.combine(columns, None, generator).numpy()
            return numbers.reshape(-1, 2)
        problem = Problem(
            gramian=torch.from_numpy(J @ J.transpose(0, 2, 1)),
            preferences=torch.ones(2, dtype=torch.float64),
            tasks=("1", "2"),
            generator=generator,
        )
        _, weights, scales, _, self.state = self.pipeline.solve(problem, self.state, ROUNDING_EXACT)
        u: Array = np.einsum("sm,smp->sp", (weights * scales).numpy(), J)
        return u


def pipelines() -> dict[str, Pipeline]:
    """Return every surgery on the gradients as they are, and gradsurg's default."""
    bare = Pipeline(resolve_normalizer("none"), resolve_surgery("sum"))
    named = {name: replace(bare, surgery=resolve_surgery(AS_PRINTED.get(name, name))) for name in SURGERIES}
    return named | {DEFAULT: Pipeline(resolve_normalizer("norm"), resolve_surgery("cone"))}


@torch.no_grad()
def run(
    setting: Setting,
    methods: Mapping[str, Pipeline],
    steps: int | None = None,
    every: int = 50,
    rate: float = LR,
) -> dict[str, Array]:
    """Return name -> θ of every `every`-th step and the last, shape (T, S, 2)."""
    workers = [Method(pipeline) for pipeline in methods.values()]
    n, starts = len(workers), np.array(setting.starts)
    theta = np.tile(starts, (n, 1))  # (n · S, 2)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    kept = []
    for step in range(setting.steps if steps is None else steps):
        if step % every == 0:
            kept.append(theta.copy())
        L, J = losses_and_gradients(theta, setting.scales)
        blocks = [slice(i * len(starts), (i + 1) * len(starts)) for i in range(n)]
        u = np.concatenate([worker.direction(J[b], L[b], step) for worker, b in zip(workers, blocks, strict=True)])
        first += (1 - BETA_1) * (u - first)
        second += (1 - BETA_2) * (u * u - second)
        length = rate / (1 - BETA_1 ** (step + 1))
        theta = theta - length * first / (np.sqrt(second / (1 - BETA_2 ** (step + 1))) + EPS)
    kept.append(theta)
    paths = np.stack(kept).reshape(len(kept), n, len(starts), 2)
    return {name: paths[:, i] for i, name in enumerate(methods)}


def on_front(theta: Array) -> Array:
    """Return whether points are within 0.15 of the Pareto front."""
    held_gradients = np.maximum(np.abs(theta[..., 0]) - FRONT_END, 0)
    reached: Array = np.hypot(held_gradients, theta[..., 1] - FRONT_HEIGHT) <= NEAR
    return reached


def table(setting: Setting, paths: Mapping[str, Array]) -> str:
    """Return where every method ended: θ on the front, or where it stood."""
    head = " | ".join(f"({x:g}, {y:g})" for x, y in setting.starts)
    lines = [
        f"{setting.paper}: losses × {setting.scales[0]:g} and × {setting.scales[1]:g}, {setting.steps} steps of Adam, "
        f"learning rate {LR:g}. θ_1 where the front was reached; else where the run ended, in brackets.",
        "",
        f"| surgery | {head} | reached |",
        f"| --- |{' --: |' * (len(setting.starts) + 1)}",
    ]
    for name, path in paths.items():
        end, there = path[-1], on_front(path[-1])
        cells = [f"{x:.1f}" if ok else f"[{x:.1f}, {y:.1f}]" for (x, y), ok in zip(end, there, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {there.sum()} of {len(there)} |")
    return "\n".join(lines)


def picture(setting: Setting, paths: Mapping[str, Array], path: Path) -> None:
    """Draw the trajectories in the plane of the parameters, one panel a method."""
    from matplotlib.figure import Figure

    columns = 6
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.25 * rows + 0.5), dpi=100, layout="constrained")
    grid = np.linspace(-11, 11, 150)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    surface = (losses_and_gradients(points)[0] / 2).sum(1).reshape(150, 150)
    for k, (name, lines) in enumerate(paths.items()):
        axes = figure.add_subplot(rows, columns, k + 1)
        axes.contour(grid, grid, surface, levels=12, cmap="Greys_r", linewidths=0.5, alpha=0.6)
        axes.plot([-FRONT_END, FRONT_END], [FRONT_HEIGHT] * 2, color="tab:blue", linewidth=4, alpha=0.35)
        there = on_front(lines[-1])
        for s, ok in enumerate(there):
            color = "tab:green" if ok else "tab:red"
            axes.plot(lines[:, s, 0], lines[:, s, 1], color=color, linewidth=1.3)
            axes.plot(*lines[0, s], marker="o", markersize=3.5, color="black")
            axes.plot(*lines[-1, s], marker="*" if ok else "X", markersize=7, color=color, markeredgecolor="white")
        axes.set(title=f"{name}: {there.sum()} of {len(there)}", xlim=(-11, 11), ylim=(-11, 11), xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    scale = f"first loss × {setting.scales[0]:g}, {setting.steps} steps of Adam at {LR:g}"
    figure.suptitle(f"The toy problem of {setting.paper}: {scale}", fontsize=11)
    figure.supxlabel("dots: starts; thick line: the Pareto front; green: reached, red: not", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--surgery", nargs="+", choices=[*SURGERIES, DEFAULT], default=[*SURGERIES, DEFAULT])
    parser.add_argument("--picture", type=Path, help="of the last setting; docs/pictures/toy.png where all is run")
    parser.add_argument("--keep", type=Path, help="a folder: what was run before is read from there, not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = {name: pipeline for name, pipeline in pipelines().items() if name in options.surgery}
    texts = []
    for key in options.setting:
        setting = SETTINGS[key]
        kept = options.keep / f"{key}.npz" if options.keep else None
        if kept is not None and kept.exists():
            with np.load(kept) as saved:
                paths, seconds = {name: saved[name] for name in saved if name != "seconds"}, float(saved["seconds"])
        else:
            began = time.perf_counter()
            paths = run(setting, methods)
            seconds = time.perf_counter() - began
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                arrays: dict[str, Any] = {"seconds": np.array(seconds), **paths}
                np.savez_compressed(kept, **arrays)
        texts.append(f"{table(setting, paths)}\n\n{seconds:.0f} s")
        print(f"{texts[-1]}\n", flush=True)
        target = options.picture or (PICTURE if len(methods) > len(SURGERIES) and key == "nash_mtl" else None)
        if target is not None:
            picture(setting, paths, target)
            print(f"picture: {target}")
    print(f"{conditions()}\n{record('toy', (chr(10) * 2).join(texts))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
