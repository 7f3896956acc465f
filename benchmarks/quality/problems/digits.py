"""Two overlaid digits: read the left one, read the right one, redraw the pixels. The main job's data and encoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.quality.problems.base import Metric, Net, Problem, Split, Stream, Task, classes
from gradsurg.demo.digits import HEIGHT, VARIANCE, WIDTH, Pairs, overlaid
from gradsurg.normalize import target_variance

__all__ = ["digits"]

PIXELS = HEIGHT * WIDTH


def digits(seed: int = 0) -> Problem:
    """Build it, the same for every seed; the images are split 60 : 15 : 25, so no digit's image is in two splits."""
    from sklearn.datasets import load_digits

    del seed
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 8, 8) / 16
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    cuts = [0, int(0.6 * len(order)), int(0.75 * len(order)), len(order)]
    parts = [order[a:b] for a, b in itertools.pairwise(cuts)]
    train, valid, test = (
        _split(overlaid(images[part], labels[part], n, generator))
        for part, n in zip(parts, (4096, 1024, 2048), strict=True)
    )
    return Problem(
        name="digits",
        title="two overlaid 8×8 digits of scikit-learn's set, and their pixels",
        tasks={
            "left": classes("left", 10, "left digit"),
            "right": classes("right", 10, "right digit"),
            "pixels": Task("pixels", PIXELS, mse_loss, (Metric("pixels, R² %", True, _explained),), target_variance),
        },
        streams={"pairs": Stream(train, valid, test)},
        net=_net,
        steps=300,
        batch=64,
        wide=5.0,
    )


def _split(pairs: Pairs) -> Split:
    return Split(pairs.images, {"left": pairs.left, "right": pairs.right, "pixels": pairs.images})


def _explained(output: Tensor, target: Tensor) -> float:
    return 100 - 100 * mse_loss(output, target).item() / VARIANCE


def _net(tasks: Sequence[str], width: float) -> Net:
    hidden, code = int(128 * width), int(48 * width)
    trunk = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, code), nn.ReLU())
    heads = {task: nn.Linear(code, PIXELS if task == "pixels" else 10) for task in tasks}
    return Net({"pairs": nn.Identity()}, trunk, heads)
