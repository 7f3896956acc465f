"""Which outputs can a trained softmax layer never predict?

Class k can win, for some input h, only if ⟨w_k, h⟩ > ⟨w_j, h⟩ for every other j: some h makes an acute angle with every
row w_k − w_j. Such an h exists exactly if 0 is not in the convex hull of these rows. The hull's point nearest to 0 is
then one. It is the minimum-norm point of gradsurg's surgery "mgda", here with classes in place of tasks. Every answer
is checked against a linear program. The layer: next-character models of few dimensions, trained on People's Daily.
"""

from __future__ import annotations

import matplotlib as mpl
import torch
from gallery import Characters, conditions, options, paragraphs
from torch import Tensor, nn

import gradsurg

CONTEXT = 4


class NextCharacter(nn.Module):
    """A few characters, their embeddings side by side, down to `width` dimensions, and a layer with a row a class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 32)
        self.body = nn.Sequential(nn.Linear(32 * CONTEXT, 128), nn.Tanh(), nn.Linear(128, width))
        self.output = nn.Linear(width, classes, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """Return logits, (n, classes), of n contexts, (n, CONTEXT)."""
        logits: Tensor = self.output(self.body(self.embed(context).flatten(1)))
        return logits


def train(text: Tensor, classes: int, width: int, steps: int) -> NextCharacter:
    """Return a model that predicts text[i] from the characters before it."""
    torch.manual_seed(width)
    model = NextCharacter(classes, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(text) - CONTEXT, (256, 1))
        window = text[at + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(window[:, :-1]), window[:, -1]).backward()
        optimizer.step()
    return model


def directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every class the h under which it wins by most, and its least cosine: not above 0 where none does."""
    found, margins = [], []
    for k in range(len(rows)):
        others = torch.cat([rows[:k], rows[k + 1 :]])
        # Length does not change on which side of h a row lies. Equal lengths make the nearest point well defined.
        apart = nn.functional.normalize(rows[k] - others, dim=1)
        h = gradsurg.weights(apart @ apart.T, surgery="mgda") @ apart
        found.append(h)
        margins.append((apart @ nn.functional.normalize(h, dim=0)).min())
    return torch.stack(found), torch.stack(margins)


def by_linear_program(rows: Tensor, k: int) -> bool:
    """Whether some h in the unit cube has ⟨w_k − w_j, h⟩ ≥ t for all j with a t that is not 0: scipy's answer."""
    from scipy.optimize import linprog

    apart = nn.functional.normalize(rows[k] - torch.cat([rows[:k], rows[k + 1 :]]), dim=1).numpy()
    width = apart.shape[1]
    constraints = [[*(-row), 1.0] for row in apart]
    answer = linprog([0.0] * width + [-1.0], constraints, [0.0] * len(apart), bounds=[(-1, 1)] * width + [(None, 1)])
    return bool(answer.status == 0 and -answer.fun > 1e-9)


def main() -> None:
    """Train with 2, 3, 4, 6 and 8 dimensions; print a table, draw the layer with 2."""
    chosen = options(__doc__ or "", "unargmaxable.png")
    texts = ["".join(word for word, _ in words) for words in paragraphs()]
    classes, steps, widths = (40, 100, (2, 4)) if chosen.fast else (300, 3000, (2, 3, 4, 6, 8))
    alphabet = Characters(texts, classes)
    text = torch.tensor([i for t in texts for i in alphabet.encode(t, len(t) + 1) if i != Characters.UNKNOWN])

    print("| dimensions | classes that can never win | the same by linear program | least cosine of those that can |")
    print("| --: | --: | --: | --: |")
    shares, layers = [], {}
    for width in widths:
        rows = train(text, classes, width, steps).output.weight.detach().double()
        _, margins = directions(rows)
        never = [k for k in range(classes) if margins[k] <= 1e-9]
        by_program = [k for k in range(classes) if not by_linear_program(rows, k)]
        if never != by_program:
            raise SystemExit(f"with {width} dimensions the two disagree on {sorted({*never} ^ {*by_program})}")
        least = margins[margins > 1e-9].min().item()
        print(f"| {width} | {len(never)} of {classes} | {len(by_program)} | {least:.1e} |")
        shares.append(100 * len(never) / classes)
        layers[width] = (rows, never)
    print(f"\n{conditions()}")

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows, never = layers[2]
    can = [k for k in range(classes) if k not in never]
    left.scatter(*rows[never].T, s=14, color="0.6", label=f"can never win ({len(never)})")
    left.scatter(*rows[can].T, s=30, marker="D", color="C0", label=f"can win ({len(can)})")
    centred = rows[can] - rows[can].mean(0)
    left.fill(*rows[can][torch.atan2(*centred.T).argsort()].T, fill=False, edgecolor="C0", linewidth=0.8)
    left.set(title="the layer's rows in two dimensions", xlabel="first", ylabel="second", aspect="equal")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    right.bar([str(width) for width in widths], shares, color="C0")
    right.set(title=f"{classes} classes", xlabel="dimensions of the layer", ylabel="can never be predicted (%)")
    figure.savefig(chosen.output, dpi=120)


if __name__ == "__main__":
    main()
