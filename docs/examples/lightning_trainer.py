"""Lightning on several losses: training_step returns gradsurg.total, or hands it to manual_backward.

python docs/examples/lightning_trainer.py --epochs 8
python docs/examples/lightning_trainer.py --epochs 8 --manual
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gradsurg


class Digits(lightning.LightningModule):
    """Reads a digit and redraws it; Lightning accumulates, clips and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
        self.digit, self.pixels = nn.Linear(16, 10), nn.Linear(16, 64)

    def total(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        z = self.trunk(x)
        losses = {"digit": cross_entropy(self.digit(z), y), "pixels": mse_loss(self.pixels(z), x)}
        return gradsurg.total(self.optimizers(), losses)

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        return self.total(batch)

    def configure_optimizers(self) -> Any:
        optimizer = gradsurg.wrap(torch.optim.AdamW(self.parameters(), lr=3e-3))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=8 * 24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ManualDigits(Digits):
    """The same with manual optimization: we accumulate, clip and step."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        self.manual_backward(self.total(batch) / 2)
        if index % 2 == 1:
            optimizer: Any = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def train(directory: str, epochs: int = 8, manual: bool = False, resume: str | None = None, **options: Any) -> Digits:
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = ManualDigits() if manual else Digits()
    theirs = {} if manual else {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=directory, logger=False, **theirs, **options
    )
    trainer.fit(model, DataLoader(TensorDataset(x[:1536], y[:1536]), batch_size=32), ckpt_path=resume)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--manual", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(gradsurg.report(train(folder, chosen.epochs, chosen.manual).optimizers()))
