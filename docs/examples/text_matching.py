"""Six subtasks of text matching in one encoder: two kinds of label × three classes of length, six losses.

Kind B (strict): are these the two halves of one paragraph? Kind A (loose): do they come from neighbouring paragraphs?
Each for short–short, short–long and long–long pairs from People's Daily; half of the pairs are random. One transformer
with rotary positions serves all; the subtask enters through conditional LayerNorm. It prints macro-F1 per
subtask, on paragraphs of days that were not trained on, for the plain sum of the six losses and for gradsurg.
"""

from __future__ import annotations

import random
from functools import partial

import matplotlib as mpl
import torch
from encoder import ConditionalNorm, Encoder, pooled
from gallery import Characters, conditions, options, paragraphs, spread
from torch import Tensor, nn

import gradsurg

SHORT, LONG, WINDOW = 16, 48, 3
LENGTHS = {"short-short": (SHORT, SHORT), "short-long": (SHORT, LONG), "long-long": (LONG, LONG)}
SUBTASKS = [f"{kind} {lengths}" for kind in "AB" for lengths in LENGTHS]


class Pairs:
    """Draws pairs of texts for a subtask from consecutive paragraphs."""

    def __init__(self, texts: list[str], alphabet: Characters, seed: int) -> None:
        self.texts, self.alphabet, self.random = texts, alphabet, random.Random(seed)

    def draw(self, subtask: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return two batches of characters and whether they match, half of them each."""
        kind, lengths = subtask.split(" ")
        labels = [i % 2 for i in range(count)]
        pairs = [self._pair(kind, bool(label)) for label in labels]
        a, b = (
            self.alphabet.batch([pair[side] for pair in pairs], length + 1)
            for side, length in enumerate(LENGTHS[lengths])
        )
        return a, b, torch.tensor(labels, dtype=torch.float32)

    def _pair(self, kind: str, match: bool) -> tuple[str, str]:
        i = self.random.randrange(WINDOW, len(self.texts) - WINDOW)
        here = self.texts[i]
        half = len(here) // 2
        if not match:
            other = self.random.choice(self.texts)
            return (here[:half], other[len(other) // 2 :]) if kind == "B" else (here, other)
        if kind == "B":
            return here[:half], here[half:]
        return here, self.texts[i + self.random.choice([-1, 1]) * self.random.randint(1, WINDOW)]


class Matcher(nn.Module):
    """Encodes both texts and judges their vectors; everything is shared but gain and bias of the norms."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.encoder = Encoder(characters, norm=partial(ConditionalNorm, conditions=len(SUBTASKS)))
        self.judge = nn.Linear(128, 1)

    def forward(self, a: Tensor, b: Tensor, subtask: str) -> Tensor:
        """Return a logit a pair, (n,)."""
        condition = torch.tensor(SUBTASKS.index(subtask))
        u, v = (pooled(self.encoder(ids, condition), ids) for ids in (a, b))
        logits: Tensor = self.judge(torch.cat([(u - v).abs(), u * v], 1)).squeeze(1)
        return logits


def macro_f1(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean of the F1 of both classes, in percent."""
    scores = []
    for label in (False, True):
        hits = ((predicted == label) & (truth == label)).sum().item()
        scores.append(2 * hits / ((predicted == label).sum().item() + (truth == label).sum().item()))
    return 100 * sum(scores) / 2


def train(texts: list[str], alphabet: Characters, seed: int, steps: int, wrapped: bool) -> tuple[list[float], float]:
    """Return macro-F1 a subtask and the share of steps in which two subtasks were in conflict (NaN for the sum)."""
    cut = 4 * len(texts) // 5
    pairs, unseen = Pairs(texts[:cut], alphabet, seed), Pairs(texts[cut:], alphabet, 1)
    torch.manual_seed(seed)
    model = Matcher(alphabet.size)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if wrapped:
        optimizer = gradsurg.wrap(optimizer)
    conflicts = []
    for _ in range(steps):
        losses = {}
        for subtask in SUBTASKS:
            a, b, labels = pairs.draw(subtask, 16)
            losses[subtask] = nn.functional.binary_cross_entropy_with_logits(model(a, b, subtask), labels)
        optimizer.zero_grad()
        if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
            optimizer.total(losses).backward()
        else:
            torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if isinstance(optimizer, gradsurg.MultiTaskOptimizer) and optimizer.report is not None:
            conflicts.append(bool(optimizer.report.conflicts))
    scores = []
    with torch.no_grad():
        for subtask in SUBTASKS:
            a, b, labels = unseen.draw(subtask, 1000)
            scores.append(macro_f1(model(a, b, subtask) > 0, labels > 0.5))
    return scores, 100 * sum(conflicts) / len(conflicts) if conflicts else float("nan")


def main() -> None:
    """Print macro-F1 of every subtask and draw them."""
    chosen = options(__doc__ or "", "text_matching.png")
    steps, seeds = (3, 1) if chosen.fast else (300, chosen.seeds)
    texts = [text for text in ("".join(word for word, _ in words) for words in paragraphs()) if len(text) >= 2 * SHORT]
    alphabet = Characters(texts, 2000)
    runs = {
        name: [train(texts, alphabet, s, steps, name == "gradsurg") for s in range(seeds)]
        for name in ("sum", "gradsurg")
    }
    print(f"| macro-F1 (%) | {' | '.join(runs)} |\n| --- | --: | --: |")
    for k, subtask in enumerate(SUBTASKS):
        print(f"| {subtask} | {' | '.join(spread([scores[k] for scores, _ in each]) for each in runs.values())} |")
    print(f"| mean | {' | '.join(spread([sum(scores) / 6 for scores, _ in each]) for each in runs.values())} |")
    share = spread([share for _, share in runs["gradsurg"]])
    print(f"\nsteps in which two subtasks were in conflict: {share} %\n{seeds} seeds, {steps} steps\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, (name, each), hatch in zip((-0.2, 0.2), runs.items(), ("", "//"), strict=True):
        scores = torch.tensor([found for found, _ in each])
        at = torch.arange(len(SUBTASKS)) + offset
        mean, deviation = scores.mean(0).tolist(), scores.std(0, correction=0).tolist()
        axes.bar(at.tolist(), mean, 0.38, yerr=deviation, hatch=hatch, edgecolor="w", label=name)
    axes.set_xticks(range(len(SUBTASKS)), SUBTASKS)
    axes.set(ylabel="macro-F1 (%)", ylim=(40, 100), title="six subtasks of text matching")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
