"""What a problem is: streams of examples, the tasks on them, their losses and scores, and a model they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gradsurg.normalize import class_entropy, target_variance

__all__ = ["Metric", "Net", "Problem", "Split", "Stream", "Task", "accuracy", "batches", "classes", "numbers"]

ABSENT = -100  # the label of a position that carries none


@dataclass(frozen=True)
class Metric:
    """One number by which a task is judged.

    Attributes:
        title: For tables, with its unit.
        higher: Whether more is better.
        score: (output, target) -> the number.
    """

    title: str
    higher: bool
    score: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """A head with its loss; `prior` gives the loss of the best constant prediction from the training targets."""

    name: str
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...]
    prior: Callable[[Tensor], float]


@dataclass(frozen=True)
class Split:
    """Examples: inputs (n, ...) and task name -> targets (n, ...)."""

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def rows(self, index: Tensor) -> Split:
        """Return some of the examples."""
        return Split(self.inputs[index], {task: target[index] for task, target in self.targets.items()})


@dataclass(frozen=True)
class Stream:
    """One data set: every example in it carries the labels of all its tasks. No example is in two splits."""

    train: Split
    valid: Split
    test: Split

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with labels here."""
        return tuple(self.train.targets)


class Net(nn.Module):
    """A trunk that all tasks share, an input layer for each stream and a head for each task."""

    def __init__(self, inlets: Mapping[str, nn.Module], trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inlets, self.trunk, self.heads = nn.ModuleDict(inlets), trunk, nn.ModuleDict(heads)

    def forward(self, stream: str, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return task -> output."""
        h = self.trunk(self.inlets[stream](inputs))
        return {task: self.heads[task](h) for task in tasks}


@dataclass(frozen=True)
class Problem:
    """A multi-task problem, ready to train on.

    Attributes:
        name: Short, as in the cache.
        title: One line for the report.
        tasks: In order.
        streams: Name -> data.
        net: (tasks, width) -> a model with these heads; width 1 is the ordinary size.
        steps: Of training.
        batch: Examples of each stream in a step, at most.
        wide: The width at which a step on the plain sum takes as long as a step of gradsurg's default at width 1.
        primary: The one task that counts, where the others are auxiliary.
        unjudged: Tasks that are trained and shown, but have too few examples to be counted in Δm.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    streams: Mapping[str, Stream]
    net: Callable[[Sequence[str], float], Net]
    steps: int
    batch: int
    wide: float
    primary: str | None = None
    unjudged: tuple[str, ...] = ()

    @property
    def judged(self) -> tuple[str, ...]:
        """The tasks whose scores count."""
        if self.primary is not None:
            return (self.primary,)
        return tuple(task for task in self.tasks if task not in self.unjudged)

    def priors(self) -> dict[str, float]:
        """Return each task's loss under the best constant prediction, from its training targets."""
        targets = {task: target for stream in self.streams.values() for task, target in stream.train.targets.items()}
        return {name: task.prior(targets[name]) for name, task in self.tasks.items()}

    def losses(self, net: Net, parts: Mapping[str, Split], tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return task -> loss, in the order of `tasks`."""
        found: dict[str, Tensor] = {}
        for name, part in parts.items():
            here = [task for task in tasks if task in part.targets]
            outputs = net(name, part.inputs, here)
            found |= {task: self.tasks[task].loss(outputs[task], part.targets[task]) for task in here}
        return {task: found[task] for task in tasks}

    @torch.no_grad()
    def scores(self, net: Net, split: str, tasks: Sequence[str]) -> dict[str, list[float]]:
        """Return task -> its metrics on "valid" or "test"."""
        found: dict[str, list[float]] = {}
        for name, stream in self.streams.items():
            part: Split = getattr(stream, split)
            here = [task for task in tasks if task in part.targets]
            if here:
                outputs = net(name, part.inputs, here)
                for task in here:
                    metrics = self.tasks[task].metrics
                    found[task] = [metric.score(outputs[task], part.targets[task]) for metric in metrics]
        return {task: found[task] for task in tasks}


def batches(problem: Problem, tasks: Sequence[str], seed: int) -> Iterator[dict[str, Split]]:
    """Yield batches without end, each stream shuffled anew whenever it is used up; only streams with these tasks."""
    generator = torch.Generator().manual_seed(seed)
    wanted = {name: s.train for name, s in problem.streams.items() if set(s.tasks) & set(tasks)}
    queues = {name: torch.empty(0, dtype=torch.long) for name in wanted}
    while True:
        parts = {}
        for name, split in wanted.items():
            size = min(problem.batch, len(split.inputs))
            if len(queues[name]) < size:
                queues[name] = torch.randperm(len(split.inputs), generator=generator)
            parts[name] = split.rows(queues[name][:size])
            queues[name] = queues[name][size:]
        yield parts


def accuracy(output: Tensor, target: Tensor) -> float:
    """Return the percentage of labels found, (..., classes) against (...); positions without a label do not count."""
    labelled = target != ABSENT
    return 100 * (output.argmax(-1) == target)[labelled].float().mean().item()


def classes(name: str, count: int, title: str) -> Task:
    """Return a classification task, of examples or of positions."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=ABSENT)

    def prior(target: Tensor) -> float:
        return class_entropy(torch.bincount(target[target != ABSENT], minlength=count))

    return Task(name, count, loss, (Metric(f"{title}, accuracy %", True, accuracy),), prior)


def numbers(name: str, titles: Sequence[str]) -> Task:
    """Return a regression task on standardised targets (n, outputs); one error, in percent, for each output."""

    def rmse(k: int) -> Callable[[Tensor, Tensor], float]:
        return lambda output, target: 100 * mse_loss(output[:, k], target[:, k]).sqrt().item()

    metrics = tuple(Metric(f"{title}, RMSE % of σ", False, rmse(k)) for k, title in enumerate(titles))
    return Task(name, len(titles), mse_loss, metrics, target_variance)
