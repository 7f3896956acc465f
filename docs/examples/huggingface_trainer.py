"""Hugging Face's Trainer on several losses: compute_loss returns gradsurg.total, all else is the Trainer's own.

Accumulation, clipping, schedule, checkpoints and resuming are its usual arguments.

    python docs/examples/huggingface_trainer.py --epochs 8
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import gradsurg


class Digits(nn.Module):
    """Reads a digit and redraws it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
        self.digit, self.pixels = nn.Linear(16, 10), nn.Linear(16, 64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {"digit": cross_entropy(self.digit(z), labels), "pixels": mse_loss(self.pixels(z), x)}


class MultiTaskTrainer(Trainer):
    """A Trainer whose loss is the total of several."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = model(**inputs)
        total = gradsurg.total(self.optimizer, losses)
        return (total, losses) if return_outputs else total


def data() -> list[dict[str, Tensor]]:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return [{"x": image, "labels": label} for image, label in zip(x, y, strict=True)]


def train(directory: str, epochs: float = 8, resume: str | None = None, **arguments: Any) -> MultiTaskTrainer:
    torch.manual_seed(0)
    model, items = Digits(), data()
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, int(8 * len(items) / 64))
    settings = {
        "output_dir": directory, "num_train_epochs": epochs, "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "save_strategy": "epoch", "logging_steps": 20,
        "report_to": [], "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    settings.update(arguments)
    trainer = MultiTaskTrainer(
        model, TrainingArguments(**settings), train_dataset=items[:1500], optimizers=(optimizer, schedule)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=8)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(folder, parser.parse_args().epochs)
    print(gradsurg.report(trained.optimizer))
