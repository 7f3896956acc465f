"""Pretraining on several supervised tasks at once beside masked characters, each task from a loader of its own.

A small RoFormerV2: no biases, RMSNorm without gain, rotary positions, and what every layer adds is multiplied by a
scale that rises from 0 to 1. Word segmentation and part of speech (People's Daily), sentiment (book reviews), masked
characters (both). Every step draws three of the four tasks; `with optimizer.task(name)` sends each backward pass to its
row, so that no two batches need to be in memory together. Plain accumulation of the losses against gradsurg, whose
default scales every task's gradient to the same norm.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import matplotlib as mpl
import torch
from encoder import Encoder, pooled
from gallery import Characters, TaggedWords, conditions, options, paragraphs, reviews, spread
from torch import Tensor, nn

import gradsurg

LENGTH, BATCH = 48, 24
SIZES = {"segment": 4, "tag": 24, "sentiment": 2, "mask": 2000}  # classes per task
NOTHING = -100  # a label that cross_entropy ignores


class Loaders:
    """One batch of a task at a time: characters, targets of each character (or of the text)."""

    def __init__(self, seed: int, split: slice) -> None:
        days, texts = paragraphs(), list(reviews())
        random.Random(0).shuffle(texts)
        self.random = random.Random(seed)
        everything = ["".join(word for word, _ in words) for words in days]
        self.alphabet = Characters(everything + [text for text, _ in texts], SIZES["mask"])
        self.tags = {tag: i for i, tag in enumerate(sorted({t[0].lower() for words in days for _, t in words})[:24])}
        self.days, self.reviews = days[split], texts[split]

    def draw(self, task: str, count: int) -> tuple[Tensor, Tensor]:
        """Return ids, (count, LENGTH), and targets, (count, LENGTH), or (count,) for the sentiment."""
        if task == "sentiment":
            texts = self.random.choices(self.reviews, k=count)
            return self._ids([text for text, _ in texts]), torch.tensor([label for _, label in texts])
        chosen = self.random.choices(self.days, k=count)
        ids = self._ids(["".join(word for word, _ in words) for words in chosen])
        if task == "mask":
            hidden = (torch.rand(ids.shape) < 0.15) & (ids > Characters.FRONT)
            return ids.masked_fill(hidden, Characters.MASK), ids.where(hidden, NOTHING)
        label = self._segments if task == "segment" else self._tags
        rows = [[NOTHING, *label(words)][:LENGTH] for words in chosen]
        return ids, torch.tensor([row + [NOTHING] * (LENGTH - len(row)) for row in rows])

    def _ids(self, texts: list[str]) -> Tensor:
        return self.alphabet.batch(texts, LENGTH)

    def _segments(self, words: TaggedWords) -> list[int]:
        marks = []
        for word, _ in words:
            marks += [3] if len(word) == 1 else [0, *[1] * (len(word) - 2), 2]  # begin, middle, end, single
        return marks

    def _tags(self, words: TaggedWords) -> list[int]:
        return [self.tags.get(tag[0].lower(), NOTHING) for word, tag in words for _ in word]


class Model(nn.Module):
    """The shared encoder and a linear head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(SIZES["mask"])
        self.heads = nn.ModuleDict({task: nn.Linear(64, classes, bias=False) for task, classes in SIZES.items()})

    def forward(self, task: str, ids: Tensor, scale: float = 1.0) -> Tensor:
        """Return logits, one row a target."""
        vectors = self.encoder(ids, scale=scale)
        logits: Tensor = self.heads[task](pooled(vectors, ids) if task == "sentiment" else vectors)
        return logits.flatten(0, -2)


def train(seed: int, steps: int, wrapped: bool) -> tuple[list[float], list[list[float]]]:
    """Return accuracy a task on unseen texts, and the losses of every 10th step."""
    seen, unseen = Loaders(seed, slice(0, 14_000)), Loaders(1, slice(14_000, None))
    torch.manual_seed(seed)
    model = Model()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if wrapped:
        optimizer = gradsurg.wrap(optimizer)
    last, curves = dict.fromkeys(SIZES, float("nan")), []
    for step in range(steps):
        scale = min(1.0, 2 * (step + 1) / steps)
        optimizer.zero_grad()
        for task in seen.random.sample(list(SIZES), 3):
            ids, targets = seen.draw(task, BATCH)
            loss = nn.functional.cross_entropy(model(task, ids, scale), targets.flatten())
            last[task] = loss.item()
            if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
                with optimizer.task(task):
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        if step % 10 == 9 or steps < 10:
            curves.append(list(last.values()))
    return [accuracy(lambda ids, t=task: model(t, ids), unseen, task) for task in SIZES], curves  # type: ignore[misc]


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], loaders: Loaders, task: str) -> float:
    """Return percent right of what has a target, over 600 texts."""
    torch.manual_seed(0)  # hide the same characters for every model
    ids, targets = loaders.draw(task, 600)
    there = targets.flatten() != NOTHING
    return 100 * (predict(ids).argmax(1) == targets.flatten())[there].float().mean().item()


def main() -> None:
    """Print accuracies, draw the losses."""
    chosen = options(__doc__ or "", "multitask_pretraining.png")
    steps, seeds = (3, 1) if chosen.fast else (400, chosen.seeds)
    runs = {name: [train(s, steps, name == "gradsurg") for s in range(seeds)] for name in ("sum", "gradsurg")}
    print(f"| accuracy (%) | {' | '.join(runs)} |\n| --- | --: | --: |")
    for k, task in enumerate(SIZES):
        print(f"| {task} | {' | '.join(spread([scores[k] for scores, _ in each]) for each in runs.values())} |")
    print(f"\n{seeds} seeds, {steps} steps\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for k, (panel, task) in enumerate(zip(axes, SIZES, strict=True)):
        for (name, each), style in zip(runs.items(), ("--", "-"), strict=True):
            curve = torch.tensor([losses for _, losses in each])[:, :, k].nanmean(0)
            panel.plot(torch.arange(1, len(curve) + 1) * 10, curve, style, color="k", label=name)
        panel.set(title=task, xlabel="step")
    axes[0].set_ylabel("training loss")
    axes[0].legend(frameon=False)
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
