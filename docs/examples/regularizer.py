"""Weight decay that acts only if a step would make the weights longer: the penalty as an auxiliary task.

The penalty ½‖θ‖² has the gradient θ. As an auxiliary with auxiliary="protect" it never pulls by itself: it only forbids
steps that lengthen θ (math: λ = relu(−⟨g, θ⟩) / ‖θ‖²; Su Jianlin 2022, kexue.fm 8907). Compared with no decay and with
AdamW's on few labelled digits, where a large network overfits; the decay's strength is tuned, the auxiliary has none.
"""

from __future__ import annotations

import matplotlib as mpl
import torch
from gallery import conditions, options, spread
from torch import Tensor, nn

import gradsurg

LABELLED, TUNING = 200, 400
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0)


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1797 digits, always in the same random order: pixels 0 … 1 and labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def train(seed: int, epochs: int, decay: float | None) -> tuple[float, float, list[float]]:
    """Train once; decay None is the penalty as an auxiliary. Return validation and test accuracy, ‖θ‖ per epoch."""
    pixels, labels = digits()
    pieces = (slice(LABELLED), slice(LABELLED, LABELLED + TUNING), slice(LABELLED + TUNING, None))
    known, valid, test = ((pixels[piece], labels[piece]) for piece in pieces)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=decay or 0.0)
    if decay is None:
        optimizer = gradsurg.wrap(optimizer, normalize="none", primary="digits", auxiliary="protect")
    lengths = []
    for _ in range(epochs):
        for rows in torch.randperm(LABELLED).split(50):
            loss = nn.functional.cross_entropy(model(known[0][rows]), known[1][rows])
            optimizer.zero_grad()
            if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
                penalty = 0.5 * torch.stack([p.square().sum() for p in parameters]).sum()
                optimizer.total({"digits": loss, "length": penalty}).backward()
            else:
                loss.backward()
            optimizer.step()
        lengths.append(float(torch.stack([p.detach().square().sum() for p in parameters]).sum().sqrt()))

    def accuracy(images: Tensor, truth: Tensor) -> float:
        with torch.no_grad():
            return 100 * (model(images).argmax(1) == truth).float().mean().item()

    return accuracy(*valid), accuracy(*test), lengths


def main() -> None:
    """Print the table, draw how long the weights grow."""
    chosen = options(__doc__ or "", "regularizer.png")
    epochs, seeds = (3, 1) if chosen.fast else (150, chosen.seeds)
    runs = {decay: [train(seed, epochs, decay) for seed in range(seeds)] for decay in (0.0, *DECAYS, None)}
    best = max(DECAYS, key=lambda decay: sum(valid for valid, _, _ in runs[decay]))
    names = {0.0: "no decay", best: f"AdamW, decay {best:g} (best of {len(DECAYS)} on validation)", None: "auxiliary"}

    print("| | validation accuracy (%) | test accuracy (%) | ‖θ‖ at the end |\n| --- | --: | --: | --: |")
    for decay, name in names.items():
        valid, test, lengths = zip(*runs[decay], strict=True)
        print(f"| {name} | {spread(list(valid))} | {spread(list(test))} | {spread([last[-1] for last in lengths])} |")
    print(f"\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (decay, name), style in zip(names.items(), ("-", "--", ":"), strict=True):
        axes.plot(range(1, epochs + 1), runs[decay][0][2], style, color="k", label=name)
    axes.set(xlabel="epoch", ylabel="‖θ‖", title="length of the weights, first seed")
    axes.legend(frameon=False)
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
