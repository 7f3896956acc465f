"""Draw the pictures of docs/monitoring.md: the digits of `python -m gradsurg`, one seed, six epochs.

python docs/pictures/monitoring.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import rc_context

import gradsurg
from gradsurg import plot
from gradsurg.demo import TASKS, Data, Model, one_thread


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


def main(folder: Path) -> None:
    """Write the pictures."""
    history = record()
    for name, draw in {"matrix": plot.conflict_matrix, "angles": plot.angles, "layers": plot.layers}.items():
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            draw(history).figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
