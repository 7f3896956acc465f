"""Draw the pictures of docs/monitoring.md: the digits of `python -m gradsurg`, one seed, six epochs.

python docs/pictures/monitoring.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import rc_context

import gradsurg
from gradsurg import plot
from gradsurg.demo.digits import TASKS, Data, Model, one_thread

Loss = Callable[[torch.Tensor], torch.Tensor]


@one_thread()
def record(epochs: int = 6) -> gradsurg.History:
    """Train, and return the history of every second step."""
    torch.manual_seed(0)
    data, model = Data.digits(), Model(tuple(TASKS))
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=2e-3), granularity="tensor")
    history = gradsurg.History(optimizer, every=2, model=model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in data.train.batches(generator):
            optimizer.zero_grad()
            optimizer.total(model.losses(batch)).backward()
            optimizer.step()
    return history


def paths() -> tuple[dict[str, Loss], dict[str, torch.Tensor]]:
    """Return the two losses and the two paths of the page's last example."""
    losses: dict[str, Loss] = {
        "a": lambda p: (p[..., 0] - 1) ** 2 + p[..., 1] ** 2,
        "b": lambda p: (p[..., 0] + 1) ** 2 + 4 * p[..., 1] ** 2,
    }

    def path(**options: str) -> torch.Tensor:
        p = torch.nn.Parameter(torch.tensor([0.9, 1.0]))
        sgd = gradsurg.wrap(torch.optim.SGD([p], lr=0.05), **options)
        points = []
        for _ in range(40):
            points.append(p.detach().clone())
            sgd.zero_grad()
            sgd.backward({task: loss(p) for task, loss in losses.items()})
            sgd.step()
        return torch.stack(points)

    return losses, {"plain sum": path(surgery="sum", normalize="none", guarantee="none"), "gradsurg": path()}


def main(folder: Path) -> None:
    """Write the pictures."""
    history, (losses, points) = record(), paths()
    drawings = {
        "matrix": lambda: plot.conflict_matrix(history),
        "angles": lambda: plot.angles(history),
        "layers": lambda: plot.layers(history),
        "trajectory": lambda: plot.trajectory(losses, points),
    }
    for name, draw in drawings.items():
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            draw().figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
