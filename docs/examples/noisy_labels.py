"""Many noisy labels that must not hurt the few clean ones: the clean set as an auxiliary.

The noisy set is the primary task, the clean set an auxiliary with auxiliary="protect": steps that would raise the clean
loss are bent until they do not (Su Jianlin 2022, kexue.fm 8907). Compared, on digits of which most labels are wrong,
with the noisy set alone, the clean set alone, their sum, and the sum with the clean set's weight tuned.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import torch
from gallery import conditions, options, spread
from regularizer import digits
from torch import Tensor, nn

import gradsurg

CLEAN, NOISY, TUNING, WRONG = 60, 1000, 300, 0.6
WEIGHTS = (1.0, 3.0, 10.0)
PROTECT: dict[str, Any] = {"primary": "noisy", "auxiliary": "protect"}
HELP: dict[str, Any] = {"primary": "clean", "auxiliary": "help"}


def train(seed: int, epochs: int, tasks: dict[str, float], wrapped: dict[str, Any] | None) -> Tensor:
    """Train on the weighted sum of some tasks, or wrapped; return validation and test accuracy an epoch, (E, 2)."""
    pixels, labels = digits()
    torch.manual_seed(seed)
    given = labels.clone()
    wrong = torch.rand(NOISY) < WRONG
    given[CLEAN : CLEAN + NOISY][wrong] = (given[CLEAN : CLEAN + NOISY] + torch.randint(1, 10, (NOISY,)))[wrong] % 10
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if wrapped is not None:
        optimizer = gradsurg.wrap(optimizer, **wrapped)
    scores = []
    for _ in range(epochs):
        for rows in (torch.randperm(NOISY) + CLEAN).split(100):
            batches = {"noisy": rows, "clean": torch.arange(CLEAN)}
            losses = {
                task: nn.functional.cross_entropy(model(pixels[batches[task]]), given[batches[task]]) for task in tasks
            }
            optimizer.zero_grad()
            if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
                optimizer.total(losses).backward()
            else:
                torch.stack([weight * losses[task] for task, weight in tasks.items()]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            right = (model(pixels[CLEAN + NOISY :]).argmax(1) == labels[CLEAN + NOISY :]).float()
        scores.append(100 * torch.stack([right[:TUNING].mean(), right[TUNING:].mean()]))
    return torch.stack(scores)


def main() -> None:
    """Print the table, draw test accuracy over time."""
    chosen = options(__doc__ or "", "noisy_labels.png")
    epochs, seeds = (3, 1) if chosen.fast else (100, chosen.seeds)
    ways: dict[str, tuple[dict[str, float], dict[str, Any] | None]] = {
        "noisy labels alone": ({"noisy": 1.0}, None),
        "clean labels alone": ({"clean": 1.0}, None),
        **{f"noisy + {w:g} × clean": ({"noisy": 1.0, "clean": w}, None) for w in WEIGHTS},
        "noisy, clean protected": ({"noisy": 1.0, "clean": 1.0}, PROTECT),
        "clean, noisy helps": ({"clean": 1.0, "noisy": 1.0}, HELP),
    }
    runs = {name: torch.stack([train(seed, epochs, *way) for seed in range(seeds)]) for name, way in ways.items()}

    print("| | test accuracy (%), last epoch | at the epoch that is best on validation |\n| --- | --: | --: |")
    for name, scores in runs.items():
        chosen_epoch = scores[:, :, 0].argmax(1)
        best = [scores[seed, epoch, 1].item() for seed, epoch in enumerate(chosen_epoch.tolist())]
        print(f"| {name} | {spread(scores[:, -1, 1].tolist())} | {spread(best)} |")
    print(f"\n{CLEAN} clean labels, {NOISY} of which {WRONG:.0%} are wrong; {seeds} seeds\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = ("-", "--", ":", "-.", (0, (1, 3)), "-", "--")
    for (name, scores), style, width in zip(runs.items(), styles, (1, 1, 1, 1, 1, 2.5, 2.5), strict=True):
        axes.plot(range(1, epochs + 1), scores[:, :, 1].mean(0), linestyle=style, linewidth=width, label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title="mean over seeds")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
