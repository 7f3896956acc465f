"""PyTorch Ignite, and any loop like it: the update function calls backward on gradsurg.total.

python docs/examples/ignite_loop.py --epochs 8
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gradsurg


class Digits(nn.Module):
    """Reads a digit and redraws it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
        self.digit, self.pixels = nn.Linear(16, 10), nn.Linear(16, 64)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {"digit": cross_entropy(self.digit(z), y), "pixels": mse_loss(self.pixels(z), x)}


def train(directory: str, epochs: int = 8, resume: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Digits()
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=8 * 24)

    def update(engine: Engine, batch: list[Tensor]) -> float:
        total = optimizer.total(model(*batch))
        (total / 2).backward()
        if engine.state.iteration % 2 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return total.item()

    trainer = Engine(update)
    everything = {"model": model, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    saver = DiskSaver(directory, create_dir=True, require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(everything, saver, n_saved=None))
    if resume is not None:
        Checkpoint.load_objects(everything, torch.load(resume, weights_only=True))
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    trainer.run(DataLoader(TensorDataset(x[:1536], y[:1536]), batch_size=32), max_epochs=epochs)
    return model, optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    with tempfile.TemporaryDirectory() as folder:
        _, trained = train(folder, parser.parse_args().epochs)
    print(gradsurg.report(trained))
