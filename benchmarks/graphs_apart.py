"""Losses whose graphs do not meet, three ways to hand them over: `python -m benchmarks.graphs_apart`.

A backward pass frees a graph while it runs, unless a later loss may need it. `total` cannot know that cheaply, so it
keeps every graph but the last. A walk through the graphs would tell, but costs a microsecond per node: a tenth of the
passes of a small network. This measures what the caller can do instead: name the loss with the largest graph last, or
hand over functions, whose graphs are built one at a time.

The network is that of a small physics-informed one, with three losses: an equation with second derivatives at N points,
and boundary and start at N / 10 points each. Steps take turns in one process. Times are processor time of one thread.
Other work on the machine only ever adds to them, so the least ones are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradsurg
from benchmarks.cpu import seconds, table
from benchmarks.record import conditions, record

# Width, points, rounds; four hidden layers.
SIZES = [(20, 200, 400), (50, 1000, 120), (50, 3000, 60), (50, 10_000, 24)]
WAYS = ("losses", "the largest last", "functions")


def functions(net: nn.Module, points: int) -> dict[str, Callable[[], Tensor]]:
    """Return the three losses as functions; the points are drawn now."""
    inside = torch.rand(points, 2, requires_grad=True)
    edge, first = torch.rand(2, points // 10, 2)

    def equation() -> Tensor:
        u = net(inside)
        u_x, u_t = torch.autograd.grad(u.sum(), inside, create_graph=True)[0].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 0]
        loss: Tensor = (u_t + u[:, 0] * u_x - 0.01 * u_xx).square().mean()
        return loss

    return {
        "equation": equation,
        "edge": lambda: net(edge).square().mean(),
        "first": lambda: (net(first)[:, 0] + torch.sin(torch.pi * first[:, 0])).square().mean(),
    }


def measure(width: int, points: int, rounds: int) -> dict[str, float]:
    """Return the least seconds of a whole step, by way."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *layers, nn.Linear(width, 1))
    optimizer = gradsurg.wrap(torch.optim.Adam(net.parameters(), lr=1e-3))

    def step(way: str) -> None:
        given = functions(net, points)
        optimizer.zero_grad()
        if way == "functions":
            optimizer.backward(given)
        else:
            losses = {name: loss() for name, loss in given.items()}
            if way == "the largest last":
                losses["equation"] = losses.pop("equation")
            optimizer.total(losses).backward()
        optimizer.step()

    least = dict.fromkeys(WAYS, float("inf"))
    for turn in range(rounds):
        for k in range(len(WAYS)):
            way = WAYS[(turn + k) % len(WAYS)]
            least[way] = min(least[way], seconds(lambda way=way: step(way)))  # type: ignore[misc]
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="keep no result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{conditions()}, 1 thread\n")
    rows = []
    for width, points, rounds in SIZES:
        least = measure(width, points, rounds)
        share = [f"{least[way] / least['losses']:.2f}" for way in WAYS[1:]]
        rows.append([f"width {width}, {points} points", f"{1e3 * least['losses']:.2f}", *share])
        print(rows[-1], flush=True)
    text = table(["", "losses, ms a step", *(f"{way}, × of this" for way in WAYS[1:])], rows)
    print(f"\n{text}")
    if not options.dry:
        record("graphs_apart", f"1 thread, processor time, least of all rounds.\n\n{text}")


if __name__ == "__main__":
    main()
