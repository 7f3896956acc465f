"""Few-shot sentiment by a masked-character pattern: 32 labelled reviews, and many without a label.

The classifier is the masked-character model itself: "很满意。" or "不满意。" (very / not satisfied) in front of the
review, its first character masked; the more likely of 很 and 不 is the answer. The 32 labelled reviews are the primary
task, masked characters on unlabelled reviews the auxiliary. Compared: the primary alone, the sum of both, and gradsurg
with auxiliary="protect" (the auxiliary only forbids steps that hurt it) and "help" (it pulls if the primary is not
hurt).
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import matplotlib as mpl
import torch
from encoder import Encoder
from gallery import Characters, conditions, options, reviews, spread
from torch import Tensor, nn

import gradsurg

LENGTH, SHOTS, BATCH = 48, 32, 32
PATTERN, ANSWERS = "满意。", "不很"  # unfavourable, favourable


class Data:
    """Reviews: 32 labelled ones, unlabelled ones, and a validation and a test set, both balanced."""

    def __init__(self, seed: int) -> None:
        everything = list(reviews())
        self.alphabet = Characters([text for text, _ in everything] + [PATTERN + ANSWERS] * 9999, 2000)
        random.Random(0).shuffle(everything)
        both = [[review for review in everything if review[1] == label] for label in (0, 1)]
        self.valid = [review for half in both for review in half[:300]]
        self.test = [review for half in both for review in half[300:1300]]
        self.random = random.Random(seed)
        self.labelled = [review for half in both for review in self.random.sample(half[1300:5000], SHOTS // 2)]
        self.unlabelled = [text for half in both for text, _ in half[5000:]]

    def asked(self, texts: list[str]) -> Tensor:
        """Return ids with the pattern in front and its first character masked."""
        ids = self.alphabet.batch(["?" + PATTERN + text for text in texts], LENGTH)
        ids[:, 1] = Characters.MASK
        return ids

    def masked(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ids of unlabelled reviews with 15 % masked, and what was there."""
        ids = self.alphabet.batch(self.random.sample(self.unlabelled, count), LENGTH)
        hidden = (torch.rand(ids.shape) < 0.15) & (ids > Characters.FRONT)
        return ids.masked_fill(hidden, Characters.MASK), ids.where(hidden, -100)


class Masked(nn.Module):
    """The encoder, and its embedding again as the output layer."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.encoder = Encoder(characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, (n, length, characters)."""
        logits: Tensor = self.encoder(ids) @ self.encoder.embed.weight.T
        return logits


def masks(model: Masked, data: Data) -> Tensor:
    """Return the loss on masked characters of a batch of unlabelled reviews."""
    ids, targets = data.masked(BATCH)
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


@cache
def pretrained(seed: int, steps: int) -> dict[str, Tensor]:
    """Return the parameters of a model of characters that has seen no label: where every way starts."""
    data = Data(seed)
    torch.manual_seed(seed)
    model = Masked(data.alphabet.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        masks(model, data).backward()
        optimizer.step()
    return model.state_dict()


def train(seed: int, warm: int, steps: int, way: str, wrapped: dict[str, Any] | None) -> tuple[float, float]:
    """Return validation and test accuracy at the evaluation that is best on validation."""
    data = Data(seed)
    model = Masked(data.alphabet.size)
    model.load_state_dict(pretrained(seed, warm))
    answers = torch.tensor([data.alphabet.index[character] for character in ANSWERS])

    def accuracy(chosen: list[tuple[str, int]]) -> float:
        with torch.no_grad():
            vectors = model.encoder(data.asked([text for text, _ in chosen]))[:, 1]
            logits = vectors @ model.encoder.embed.weight[answers].T
        return 100 * (logits.argmax(1) == torch.tensor([label for _, label in chosen])).float().mean().item()

    torch.manual_seed(seed)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    if wrapped is not None:
        optimizer = gradsurg.wrap(optimizer, primary="sentiment", **wrapped)
    shots, labels = data.asked([t for t, _ in data.labelled]), torch.tensor([label for _, label in data.labelled])
    best = (0.0, 0.0)
    for step in range(steps):
        losses = {"sentiment": nn.functional.cross_entropy(model(shots)[:, 1, answers], labels)}
        losses |= {} if way == "primary alone" else {"masks": masks(model, data)}
        optimizer.zero_grad()
        if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
            optimizer.total(losses).backward()
        else:
            torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if step % 20 == 19 or step == steps - 1:
            best = max(best, (accuracy(data.valid), accuracy(data.test)), key=lambda pair: pair[0])
    return best


def main() -> None:
    """Print accuracies, draw them."""
    chosen = options(__doc__ or "", "few_shot_mlm.png")
    warm, steps, seeds = (2, 2, 1) if chosen.fast else (500, 100, chosen.seeds)
    ways: dict[str, dict[str, Any] | None] = {
        "primary alone": None,
        "sum": None,
        "protect": {"auxiliary": "protect"},
        "help": {"auxiliary": "help"},
    }
    runs = {way: [train(s, warm, steps, way, wrapped) for s in range(seeds)] for way, wrapped in ways.items()}
    print("| | validation accuracy (%) | test accuracy (%) |\n| --- | --: | --: |")
    for way, found in runs.items():
        print(f"| {way} | {spread([valid for valid, _ in found])} | {spread([test for _, test in found])} |")
    print(f"\n{SHOTS} labelled reviews, {seeds} seeds\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for i, found in enumerate(runs.values()):
        axes.plot([i] * len(found), [test for _, test in found], "o", color="0.5")
        axes.plot(i, sum(test for _, test in found) / len(found), "_", color="k", markersize=30)
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set(ylabel="test accuracy (%)", title=f"{SHOTS} labelled reviews; points: seeds, bars: means")
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
