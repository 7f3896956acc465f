"""Word segmentation with a conditional random field whose transitions need a learning rate of their own.

A linear-chain CRF adds a 4 × 4 matrix of transitions to the encoder's scores of every character. At the encoder's
learning rate these 16 numbers hardly move, and words come out with impossible marks (a "begin" after a "begin"); a
parameter group with a rate 100 or 1000 times larger mends that (Su Jianlin 2020, kexue.fm 7196). Parameter groups pass
through gradsurg.wrap untouched: the encoder serves two tasks here, segmentation and part of speech, and the
transitions, which only segmentation reaches, get their own plain gradient.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from encoder import Encoder
from gallery import conditions, options, spread
from multitask_pretraining import SIZES, Loaders
from torch import Tensor, nn

import gradsurg

BEGIN, MIDDLE, END, SINGLE = range(4)
LEGAL = {(BEGIN, MIDDLE), (BEGIN, END), (MIDDLE, MIDDLE), (MIDDLE, END), (END, BEGIN), (END, SINGLE), (SINGLE, BEGIN)}
LEGAL |= {(SINGLE, SINGLE)}


class Chain(nn.Module):
    """p(marks) ∝ exp(Σ_t score_t[mark_t] + Σ_t transitions[mark_t, mark_{t+1}])."""

    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(4, 4))

    def loss(self, scores: Tensor, marks: Tensor, there: Tensor) -> Tensor:
        """Return −log p a character, of scores (n, length, 4), marks (n, length) and which of them count."""
        picked = scores.gather(2, marks.unsqueeze(2)).squeeze(2)
        steps = self.transitions[marks[:, :-1], marks[:, 1:]]
        truth = (picked * there).sum() + (steps * there[:, 1:]).sum()
        total = scores[:, 0]
        for t in range(1, scores.shape[1]):
            ahead = torch.logsumexp(total.unsqueeze(2) + self.transitions, 1) + scores[:, t]
            total = torch.where(there[:, t, None], ahead, total)
        return (total.logsumexp(1).sum() - truth) / there.sum()

    @torch.no_grad()
    def best(self, scores: Tensor, there: Tensor) -> Tensor:
        """Return the most probable marks, (n, length), by Viterbi's recursion."""
        total, back = scores[:, 0], []
        for t in range(1, scores.shape[1]):
            value, origin = (total.unsqueeze(2) + self.transitions).max(1)
            stay = torch.arange(4).expand_as(origin)
            back.append(torch.where(there[:, t, None], origin, stay))
            total = torch.where(there[:, t, None], value + scores[:, t], total)
        marks = [total.argmax(1)]
        for origin in reversed(back):
            marks.append(origin.gather(1, marks[-1].unsqueeze(1)).squeeze(1))
        return torch.stack(marks[::-1], 1)


def words(marks: Tensor, there: Tensor) -> set[tuple[int, int, int]]:
    """Return the words as (text, first, last); a word ends at END, SINGLE, or before BEGIN and SINGLE."""
    found = set()
    for i, (row, count) in enumerate(zip(marks.tolist(), there.sum(1).tolist(), strict=True)):
        first = 0
        for t in range(count):
            if t == count - 1 or row[t] in (END, SINGLE) or row[t + 1] in (BEGIN, SINGLE):
                found.add((i, first, t))
                first = t + 1
    return found


def train(seed: int, steps: int, factor: float) -> tuple[float, float, Tensor]:
    """Return F1 of the words, percent of impossible pairs of marks among those predicted, and the transitions."""
    seen, unseen = Loaders(seed, slice(0, 14_000)), Loaders(1, slice(14_000, None))
    torch.manual_seed(seed)
    encoder, chain = Encoder(SIZES["mask"], layers=1), Chain()
    heads = nn.ModuleDict({"segment": nn.Linear(64, 4), "tag": nn.Linear(64, SIZES["tag"])})
    rate = 1e-3
    groups = [
        {"params": [*encoder.parameters(), *heads.parameters()], "lr": rate},
        {"params": list(chain.parameters()), "lr": rate * factor},
    ]
    optimizer = gradsurg.wrap(torch.optim.Adam(groups))

    def marked(loaders: Loaders, count: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, marks = loaders.draw("segment", count)
        there = marks[:, 1:] >= 0
        return ids, marks[:, 1:].clamp(min=0), there

    for _ in range(steps):
        ids, marks, there = marked(seen, 24)
        tag_ids, tags = seen.draw("tag", 24)
        losses = {
            "segment": chain.loss(heads["segment"](encoder(ids))[:, 1:], marks, there),
            "tag": nn.functional.cross_entropy(heads["tag"](encoder(tag_ids)).flatten(0, 1), tags.flatten()),
        }
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        optimizer.step()
    ids, marks, there = marked(unseen, 600)
    with torch.no_grad():
        predicted = chain.best(heads["segment"](encoder(ids))[:, 1:], there)
    ours, truth = words(predicted, there), words(marks, there)
    legal = torch.tensor([[(a, b) in LEGAL for b in range(4)] for a in range(4)])
    pairs = there[:, 1:] & there[:, :-1]
    impossible = (~legal[predicted[:, :-1], predicted[:, 1:]] & pairs).sum() / pairs.sum()
    return 200 * len(ours & truth) / (len(ours) + len(truth)), 100 * impossible.item(), chain.transitions.detach()


def draw(matrices: dict[float, Tensor], output: Path) -> None:
    """Draw the transitions learned at each rate."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained")
    for panel, (factor, matrix) in zip(axes, matrices.items(), strict=True):
        bound = max(matrix.abs().max().item(), 1e-6)
        panel.imshow(matrix.numpy(), cmap="PuOr", vmin=-bound, vmax=bound)
        for a in range(4):
            for b in range(4):
                mark = "" if (a, b) in LEGAL else "×"
                dark = "w" if abs(matrix[a, b]) > 0.6 * bound else "k"
                panel.text(b, a, f"{matrix[a, b]:.2f}{mark}", ha="center", va="center", fontsize=8, color=dark)
        panel.set_xticks(range(4), "BMES")
        panel.set_yticks(range(4), "BMES")
        panel.set(title=f"rate {factor:g} ×", xlabel="to (× impossible)", ylabel="from")
    figure.savefig(output, dpi=120)


def main() -> None:
    """Print the table, draw the transitions."""
    chosen = options(__doc__ or "", "crf_tagging.png")
    steps, seeds = (3, 1) if chosen.fast else (300, chosen.seeds)
    runs = {factor: [train(seed, steps, factor) for seed in range(seeds)] for factor in (1.0, 1e2, 1e3)}
    print("| rate of the transitions | words, F1 (%) | impossible pairs of marks (%) | largest transition |")
    print("| --: | --: | --: | --: |")
    for factor, found in runs.items():
        f1, impossible, matrices = zip(*found, strict=True)
        largest = spread([matrix.abs().max().item() for matrix in matrices])
        print(f"| {factor:g} × the encoder's | {spread(list(f1))} | {spread(list(impossible))} | {largest} |")
    print(f"\n{seeds} seeds, {steps} steps\n{conditions()}")

    draw({factor: found[0][2] for factor, found in runs.items()}, chosen.output)


if __name__ == "__main__":
    main()
