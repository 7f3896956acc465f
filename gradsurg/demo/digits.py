"""The job of the demo and of several benchmarks: three tasks on overlaid digits, plain sum against gradsurg.

Conflicts are measured here and not taken from the library's reports: from gradients of torch.autograd.grad before the
step, and from the real movement of the shared parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import gradsurg

__all__ = [
    "CONFLICT",
    "OPTIMIZERS",
    "TASKS",
    "Data",
    "Job",
    "Model",
    "Pairs",
    "Run",
    "compare",
    "conflicts",
    "overlaid",
    "train",
]

TASKS = {
    "left": "left digit, test accuracy (%)",
    "right": "right digit, test accuracy (%)",
    "pixels": "pixels, test R² (%)",
}
BATCH = 128
# Size of the canvas: the right digit lies two rows lower and three columns further right.
HEIGHT, WIDTH = 10, 11
# Variance of a pixel, mean over the training pairs.
VARIANCE = 0.0675
# Losses of the best constant prediction, for normalize="prior_loss".
PRIORS = {"left": math.log(10), "right": math.log(10), "pixels": VARIANCE}
# A cos(d, g_i) below this is a conflict. Parameters are stored rounded, and rounding alone is not a conflict.
CONFLICT = -1e-4
# Optimizers, each with a learning rate at which the plain sum trains well.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=2e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=2e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=2e-3),
}


@dataclass(frozen=True)
class Job:
    """What to train and how.

    Attributes:
        tasks: Some of TASKS.
        optimizer: A key of OPTIMIZERS, or a function from parameters to an optimizer.
        options: Keyword arguments of gradsurg.wrap.
        epochs: Passes over the training pairs.
        seed: Seed of the initial parameters and of the order of the batches.
        clip: Largest norm of the gradient, for clip_grad_norm_ between backward and step.
        schedule: Builds a learning rate scheduler, which is stepped after each step.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 12
    seed: int = 0
    clip: float | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None


@dataclass(frozen=True)
class Pairs:
    """Overlaid digits: images (n, HEIGHT · WIDTH) with values from 0 to 1, and the labels of two tasks, (n,)."""

    images: Tensor
    left: Tensor
    right: Tensor

    def batches(self, generator: torch.Generator) -> Iterator[Pairs]:
        """Yield all full batches, in random order."""
        for rows in torch.randperm(len(self.images), generator=generator)[: BATCH * self.count].split(BATCH):
            yield Pairs(self.images[rows], self.left[rows], self.right[rows])

    @property
    def count(self) -> int:
        """Number of full batches."""
        return len(self.images) // BATCH

    def loss(self, task: str, output: Tensor) -> Tensor:
        """Return a digit's cross-entropy, or the mean squared error of the pixels."""
        if task == "pixels":
            return mse_loss(output, self.images)
        return cross_entropy(output, getattr(self, task))

    def score(self, task: str, output: Tensor) -> float:
        """Return percent: the accuracy of a digit, or the explained variance (R²) of the pixels."""
        if task == "pixels":
            return 100 - 100 * self.loss(task, output).item() / VARIANCE
        return 100 * float((output.argmax(1) == getattr(self, task)).float().mean())


@dataclass(frozen=True)
class Data:
    """Pairs for training and for testing; no image of a digit is in both."""

    train: Pairs
    test: Pairs

    @classmethod
    def digits(cls, train: int = 6144, test: int = 2048) -> Data:
        """Build pairs of scikit-learn's 1797 digits, always the same; three quarters of the digits are for training."""
        from sklearn.datasets import load_digits

        pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        images = pixels.float().reshape(-1, 8, 8) / 16
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator)
        seen, unseen = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
        return cls(
            overlaid(images[seen], labels[seen], train, generator),
            overlaid(images[unseen], labels[unseen], test, generator),
        )


class Model(nn.Module):
    """An encoder that all tasks share, and one head per task."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(HEIGHT * WIDTH, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, HEIGHT * WIDTH if task == "pixels" else 10) for task in tasks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return task -> output: ten logits of a digit, or the pixels."""
        h = self.encoder(images)
        return {task: head(h) for task, head in self.heads.items()}

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return task -> scalar loss."""
        return {task: pairs.loss(task, output) for task, output in self(pairs.images).items()}


@dataclass(frozen=True)
class Run:
    """The results of one training run of T steps on m tasks.

    Attributes:
        scores: Task -> test score in percent at the end.
        losses: Test losses before training and after each epoch, (epochs + 1, m).
        gradient: cos(u, g_i) of the gradient u that the optimizer got, (T, m).
        update: cos(d, g_i) of the movement d of the shared parameters, (T, m).
        seconds: Median time of a step (forward, backward, step), without the measuring.
    """

    scores: dict[str, float]
    losses: Tensor
    gradient: Tensor
    update: Tensor
    seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: on two busy cores, two threads took 10 times as long for a batch of 128 small images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(job: Job, data: Data, *, wrapped: bool, progress: Callable[[], object] = lambda: None) -> Run:
    """Train once, on the plain sum or with gradsurg; parameters and batches depend on the seed alone."""
    # The caller's own random numbers go on as before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = Model(job.tasks)
    make = OPTIMIZERS[job.optimizer] if isinstance(job.optimizer, str) else job.optimizer
    optimizer = make(list(model.parameters()))
    if wrapped:
        optimizer = gradsurg.wrap(optimizer, seed=job.seed, **job.options)
    scheduler = job.schedule(optimizer) if job.schedule else None
    generator = torch.Generator().manual_seed(job.seed)
    # Test losses are measured between epochs, outside of the time of the steps.
    losses, steps = [_test_losses(model, data)], []
    for _ in range(job.epochs):
        for batch in data.train.batches(generator):
            steps.append(_step(model, optimizer, batch, job.clip))
            if scheduler is not None:
                scheduler.step()
            progress()
        losses.append(_test_losses(model, data))
    with torch.no_grad():
        scores = {task: data.test.score(task, output) for task, output in model(data.test.images).items()}
    gradient, update, seconds = zip(*steps, strict=True)
    # The median leaves out the steps in which the machine was busy.
    median = sorted(seconds)[len(seconds) // 2]
    return Run(scores, torch.stack(losses), torch.stack(gradient), torch.stack(update), median)


def compare(job: Job, data: Data, seeds: Sequence[int], *, bar: bool = True) -> dict[str, list[Run]]:
    """Train on the plain sum and with gradsurg, in turns for each seed, so that a busy machine slows down both."""
    from tqdm import tqdm

    runs: dict[str, list[Run]] = {"plain sum": [], "gradsurg": []}
    steps = len(runs) * len(seeds) * job.epochs * data.train.count
    with tqdm(total=steps, unit="step", disable=not bar) as progress:
        for seed in seeds:
            for name, done in runs.items():
                progress.set_description(f"{name}, seed {seed}")
                each = replace(job, seed=seed)
                done.append(train(each, data, wrapped=name == "gradsurg", progress=progress.update))
    return runs


def conflicts(cosines: Tensor) -> Tensor:
    """Return, for each step, whether it conflicts with some task: (T, m) -> (T,)."""
    return (cosines < CONFLICT).any(1)


def overlaid(images: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> Pairs:
    """Return n pairs of images (k, 8, 8), drawn with replacement and laid on top of each other."""
    left, right = torch.randint(len(images), (2, n), generator=generator)
    canvas = torch.zeros(n, HEIGHT, WIDTH)
    canvas[:, :8, :8] = images[left]
    # The brighter of two overlaid pixels counts.
    canvas[:, -8:, -8:] = torch.maximum(canvas[:, -8:, -8:], images[right])
    return Pairs(canvas.flatten(1), labels[left], labels[right])


def _step(model: Model, optimizer: Optimizer, batch: Pairs, clip: float | None) -> tuple[Tensor, Tensor, float]:
    """Do one step; return cos(u, g_i), cos(d, g_i) and the seconds that it took without the measuring."""
    shared = list(model.encoder.parameters())
    began = time.perf_counter()
    losses = model.losses(batch)
    seconds = time.perf_counter() - began

    # Every task's gradient before anything of gradsurg has run, and outside of the time.
    rows = torch.stack([_flat(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses.values()])
    before = _flat(shared)

    began = time.perf_counter()
    optimizer.zero_grad()
    # The only difference between the two runs.
    if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
        optimizer.total(losses).backward()
    else:
        torch.stack(list(losses.values())).sum().backward()
    seconds += time.perf_counter() - began

    direction = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in shared])

    began = time.perf_counter()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    seconds += time.perf_counter() - began
    return _cosines(rows, direction), _cosines(rows, before - _flat(shared)), seconds


@torch.no_grad()
def _test_losses(model: Model, data: Data) -> Tensor:
    return torch.stack(list(model.losses(data.test).values()))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def _cosines(rows: Tensor, direction: Tensor) -> Tensor:
    return cosine_similarity(rows, direction[None], dim=1, eps=1e-30)
