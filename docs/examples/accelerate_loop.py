"""A training loop under Accelerate: only the loss that goes to accelerator.backward is different.

python docs/examples/accelerate_loop.py --epochs 8 --precision bf16
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
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


def data() -> DataLoader[tuple[Tensor, ...]]:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return DataLoader(TensorDataset(x[:1536], y[:1536]), batch_size=32)


def train(directory: str, epochs: int = 8, precision: str = "no", resume: bool = False) -> tuple[nn.Module, object]:
    """Train for `epochs`, or from the state in `directory` for what is left of them; returns model and optimizer."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = Digits()
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=8 * 24)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, data(), schedule)
    first = 0
    if resume:
        accelerator.load_state(directory)
        first = schedule.scheduler.last_epoch // 24
    for _ in range(first, epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                losses = model(x, y)
                accelerator.backward(gradsurg.total(optimizer, losses))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.save_state(directory)
    return model, optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, trained = train(folder, options.epochs, options.precision)
    print(gradsurg.report(trained))
