"""A physics-informed network for Burgers' equation: three losses, and which of them a step hurts.

u_t + u u_x = ν u_xx on −1 ≤ x ≤ 1, 0 ≤ t ≤ 1, with ν = 0.01 / π, u(x, 0) = −sin πx and u(±1, t) = 0: a shock grows at
x = 0. It prints the relative L2 error of the sum of the losses with three weights, the best of them also with twice the
steps, and of gradsurg with and without a margin. One picture shows the solution, one which loss a step hurts, and when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import matplotlib as mpl
import torch
from gallery import conditions, options, spread
from torch import Tensor, nn

import gradsurg

NU, INSIDE, OUTSIDE, LOOK = 0.01 / torch.pi, 1000, 100, 20
TASKS = ("equation", "boundary", "start")
# What boundary and start are multiplied by.
SUMS = {"sum": 1, "sum, weights 1, 10, 10": 10, "sum, weights 1, 100, 100": 100}
OURS = {"default": {}, "margin=0.5": {"margin": 0.5}}


@cache
def reference() -> tuple[Tensor, Tensor, Tensor]:
    """Return a grid of t and of x, and u on it, by Cole–Hopf: two integrals over y, by the trapezoidal rule."""
    t, x = torch.linspace(0, 1, 51).double(), torch.linspace(-1, 1, 201).double()
    y, u = torch.linspace(-2.5, 2.5, 4001).double(), [-torch.sin(torch.pi * x)]
    for moment in t[1:]:
        at = x[:, None] - y
        share = torch.softmax(-torch.cos(torch.pi * at) / (2 * torch.pi * NU) - y.square() / (4 * NU * moment), 1)
        u.append(-(share * torch.sin(torch.pi * at)).sum(1))
    return t, x, torch.stack(u)


def tasks_of(net: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return the three losses at fresh random points, as functions: each has a graph of its own."""
    inside = (torch.rand(INSIDE, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])).requires_grad_()
    edge = torch.stack([torch.randint(2, (OUTSIDE,)) * 2.0 - 1, torch.rand(OUTSIDE)], 1)
    first = torch.stack([torch.rand(OUTSIDE) * 2 - 1, torch.zeros(OUTSIDE)], 1)

    def equation() -> Tensor:
        u = net(inside)[:, 0]
        u_x, u_t = torch.autograd.grad(u.sum(), inside, create_graph=True)[0].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 0]
        return (u_t + u * u_x - NU * u_xx).square().mean()

    return {
        "equation": equation,
        "boundary": lambda: net(edge).square().mean(),
        "start": lambda: (net(first)[:, 0] + torch.sin(torch.pi * first[:, 0])).square().mean(),
    }


def train(seed: int, steps: int, way: str) -> tuple[Tensor, list[list[float]], float]:
    """Train once. Return u on the grid, cos(movement, gradient) at some steps, and ms of processor time a step."""
    torch.manual_seed(seed)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.Tanh())]
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), *hidden, nn.Linear(32, 1))
    parameters = list(net.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=2e-3)
    if way in OURS:
        optimizer = gradsurg.wrap(optimizer, **OURS[way])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen, spent = [], 0.0
    for number in range(steps):
        losses = tasks_of(net)
        if number % LOOK == 0:
            rows = [flat(torch.autograd.grad(losses[name](), parameters, materialize_grads=True)) for name in TASKS]
            before = flat(parameters)
        begin = time.process_time()
        optimizer.zero_grad()
        if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
            optimizer.backward(losses)
        else:
            equation, boundary, start = (loss() for loss in losses.values())
            (equation + SUMS[way] * (boundary + start)).backward()
        optimizer.step()
        spent += time.process_time() - begin
        schedule.step()
        if number % LOOK == 0:
            moved = before - flat(parameters)
            seen.append([float(torch.cosine_similarity(moved, row, dim=0)) for row in rows])
    t, x, _ = reference()
    with torch.no_grad():
        u = net(torch.cartesian_prod(x, t).float()).reshape(len(x), len(t)).T.double()
    return u, seen, 1e3 * spent / steps


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return all numbers in one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def main() -> None:
    """Print the table, draw the solution with its error, and the conflicts over time."""
    chosen = options(__doc__ or "", "pinn.png")
    steps, seeds = (2 * LOOK, 1) if chosen.fast else (6000, chosen.seeds)
    runs = {way: [train(seed, steps, way) for seed in range(seeds)] for way in (*SUMS, *OURS)}
    *_, exact = reference()

    def errors(way: str) -> list[float]:
        return [100 * float((u - exact).norm() / exact.norm()) for u, *_ in runs[way]]

    shown, best = "margin=0.5", min(SUMS, key=lambda way: sum(errors(way)))
    SUMS[longer := f"{best}, twice the steps"] = SUMS[best]
    runs[longer] = [train(seed, 2 * steps, longer) for seed in range(seeds)]

    print(f"| | error (%) | ms a step | {' | '.join(f'steps that hurt the {task} (%)' for task in TASKS)} |")
    print(f"| --- |{' --: |' * 5}")
    for way in (*SUMS, *OURS):
        hurt = torch.tensor([cosines for _, seen, _ in runs[way] for cosines in seen]) < -1e-4
        shares = [f"{100 * share:.1f}" for share in hurt.double().mean(0).tolist()]
        print(f"| {way} | {spread(errors(way))} | {min(ms for *_, ms in runs[way]):.1f} | {' | '.join(shares)} |")
    print(f"\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 6), layout="constrained", sharex=True, sharey=True)
    pieces = {"reference": exact, f"gradsurg, {shown}": runs[shown][0][0]}
    pieces |= {f"error of {way}": (runs[way][0][0] - exact).abs() for way in (best, shown)}
    for axis, (title, values) in zip(axes.flat, pieces.items(), strict=True):
        low, high, colours = (0, 0.3, "Greys") if title.startswith("error") else (-1, 1, "RdBu")
        image = axis.imshow(values.T.numpy(), colours, vmin=low, vmax=high, origin="lower", extent=(0, 1, -1, 1))
        figure.colorbar(image, ax=axis)
        axis.set(title=title, aspect="auto", xlabel="t", ylabel="x")
    figure.savefig(chosen.output, dpi=120)

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained", sharey=True)
    for axis, way in zip(axes, (best, shown), strict=True):
        hurt = (torch.tensor([seen for _, seen, _ in runs[way]]) < -1e-4).double().mean(0)
        parts = torch.stack([part.mean(0) for part in hurt.split(max(len(hurt) // 20, 1))])
        for k, style in enumerate(("-", "--", ":")):
            axis.plot(
                range(0, steps, steps // len(parts)), (100 * parts[:, k]).tolist(), style, color="k", label=TASKS[k]
            )
        axis.set(xlabel="step", title=way)
    axes[0].set(ylabel="steps that hurt the loss (%)", ylim=(-2, 100))
    axes[0].legend(frameon=False)
    figure.savefig(chosen.output.with_stem(f"{chosen.output.stem}_conflicts"), dpi=120)


if __name__ == "__main__":
    main()
