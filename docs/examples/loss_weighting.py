"""What a task's loss is divided by, side by side, on losses that differ by 10³ in scale and by an offset.

From the left half of a digit's image: which digit, how much ink the right half has, in grey levels, and its pixels. The
squared error of the ink starts near 10⁴, the entropy at 2.3, the error of the pixels at 0.2. Each way to scale is run
three times from the same parameters: as it is; with the ink counted in whole pixels, which divides its loss by 256;
and with 5 added to the pixels' loss, as the constant of a likelihood would. A scale is worth having if that changes
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from gallery import conditions, options, spread
from torch import Tensor, nn

import gradsurg
from gradsurg.normalize import GeneralizedMean, PriorLoss

TRAIN = 1200
VARIANTS = {"as it is": (1.0, 0.0), "ink ÷ 256": (1 / 256, 0.0), "pixels + 5": (1.0, 5.0)}


class Data:
    """Left halves of digits, and three things to be read off them."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 8, 8)
        self.halves = images[:, :, :4].flatten(1) / 16
        self.hidden = images[:, :, 4:].flatten(1) / 16
        self.ink = images[:, :, 4:].sum((1, 2))
        self.labels = torch.tensor(labels)[order]

    def losses(self, outputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return the three losses, each with its natural unit."""
        return {
            "digit": nn.functional.cross_entropy(outputs["digit"], self.labels[rows]),
            "ink": nn.functional.mse_loss(outputs["ink"].squeeze(1) * 100, self.ink[rows]),
            "pixels": nn.functional.mse_loss(outputs["pixels"], self.hidden[rows]),
        }

    def scores(self, outputs: dict[str, Tensor], rows: Tensor) -> list[float]:
        """Return accuracy, R² of the ink and R² of the pixels, in percent."""
        losses = self.losses(outputs, rows)
        right = (outputs["digit"].argmax(1) == self.labels[rows]).float().mean().item()
        ink = 1 - losses["ink"].item() / self.ink[rows].var(correction=0).item()
        pixels = 1 - losses["pixels"].item() / self.hidden[rows].var(0, correction=0).mean().item()
        return [100 * right, 100 * ink, 100 * pixels]


class Model(nn.Module):
    """One shared layer and a head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
        self.heads = nn.ModuleDict({"digit": nn.Linear(64, 10), "ink": nn.Linear(64, 1), "pixels": nn.Linear(64, 32)})

    def forward(self, halves: Tensor) -> dict[str, Tensor]:
        """Return task -> output."""
        h = self.body(halves)
        return {task: head(h) for task, head in self.heads.items()}


def priors(data: Data, scale: float, offset: float) -> dict[str, float]:
    """Return the loss of the best constant prediction of each task, in the units of a variant."""
    ink = data.ink[:TRAIN].var(correction=0).item()
    pixels = data.hidden[:TRAIN].var(0, correction=0).mean().item()
    entropy = gradsurg.normalize.class_entropy(data.labels[:TRAIN].bincount())
    return {"digit": entropy, "ink": scale * ink, "pixels": pixels + offset}


def train(
    data: Data, normalize: Any, variant: tuple[float, float], seed: int, steps: int
) -> tuple[list[float], Tensor]:
    """Return the test scores and the first direction of the shared layer."""
    scale, offset = variant
    if normalize == "prior_loss":
        normalize = PriorLoss(priors(data, scale, offset))
    torch.manual_seed(seed)
    model = Model()
    optimizer = gradsurg.wrap(
        torch.optim.Adam(model.parameters(), lr=2e-3), normalize=normalize, surgery="sum", guarantee="none"
    )
    first = torch.empty(0)
    for step in range(steps):
        rows = torch.randint(TRAIN, (100,))
        losses = data.losses(model(data.halves[rows]), rows)
        optimizer.zero_grad()
        optimizer.total({**losses, "ink": scale * losses["ink"], "pixels": losses["pixels"] + offset}).backward()
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in model.body.parameters() if p.grad is not None]).double()
        optimizer.step()
    test = torch.arange(TRAIN, len(data.labels))
    with torch.no_grad():
        return data.scores(model(data.halves[test]), test), first


def draw(scores: dict[str, list[list[float]]], output: Path) -> None:
    """Draw scores[scale][variant][task], a panel a task."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    for k, title in enumerate(("digit, accuracy (%)", "ink, R² (%)", "pixels, R² (%)")):
        for i, (variant, marker, size) in enumerate(zip(VARIANTS, "os^", (12, 8, 5), strict=True)):
            values = [each[i][k] for each in scores.values()]
            axes[k].plot(
                values, list(scores), marker, markersize=size, markerfacecolor="none", color="k", label=variant
            )
        axes[k].set(title=title)
        axes[k].grid(axis="y", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(output, dpi=120)


def main() -> None:
    """Print the table; draw the scores of every scale in the three variants."""
    chosen = options(__doc__ or "", "loss_weighting.png")
    steps, seeds = (20, 1) if chosen.fast else (1500, chosen.seeds)
    ways: dict[str, Any] = {"none": "none", "initial loss": "initial_loss", "prior loss": "prior_loss"}
    ways |= {"current loss": "loss", "generalised mean, γ = ½": GeneralizedMean(0.5), "gradient norm": "norm"}
    data = Data()
    print("| scale | units | digit (%) | ink R² (%) | pixels R² (%) | first direction turned by |")
    print("| --- | --- | --: | --: | --: | --: |")
    scores: dict[str, list[list[float]]] = {}
    for name, normalize in ways.items():
        runs = {v: [train(data, normalize, VARIANTS[v], seed, steps) for seed in range(seeds)] for v in VARIANTS}
        for variant, found in runs.items():
            both = zip(found, runs["as it is"], strict=True)
            cosines = [nn.functional.cosine_similarity(a, b, 0) for (_, a), (_, b) in both]
            angle = torch.stack(cosines).min().clamp(max=1).acos().rad2deg().item()
            cells = [spread([each[k] for each, _ in found]) for k in range(3)]
            print(f"| {name} | {variant} | {' | '.join(cells)} | {angle:.1f}° |")
            scores.setdefault(name, []).append([sum(each[k] for each, _ in found) / seeds for k in range(3)])
    print(f"\n{seeds} seeds, {steps} steps of Adam\n{conditions()}")

    draw(scores, chosen.output)


if __name__ == "__main__":
    main()
