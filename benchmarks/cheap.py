"""The cheap modes: time, peak memory and conflicts of each, for 2, 4 and 8 tasks, against one plain backward pass.

A transformer of about 5 M parameters reads scikit-learn's 8×8 digits as 64 tokens; up to eight heads read its output.
Time: processor time of one thread, so that other work on the machine counts little; forward, backward (with surgery)
and step apart, all modes in turn in every round, medians over rounds; a round of refresh_every=10 and of rotate= is a
whole cycle of theirs. Memory: peak resident size of a process of its own, above
that of the plain step, in copies of the parameters. Conflicts: of 100 steps of AdamW with a smaller transformer, how
many have cos(·, g_i) < -1e-4 for some task's gradient g_i over the shared parameters, computed with
torch.autograd.grad on the same batch; "gradient" is of what stands in p.grad, "update" of what the parameters did.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradsurg
from benchmarks.record import conditions, peak_bytes, record

CYCLE = 10  # refresh_every, and the steps over which the modes that change from step to step are averaged
SPACE = {"5 M": (256, 6), "small": (48, 2)}  # width and depth
BATCH = 4


@dataclass(frozen=True)
class Mode:
    """One way of doing a step."""

    options: dict[str, Any] | None = None  # None: no wrapping, the plain sum
    way: str = "losses"  # "losses", "features", "functions", "one by one"
    cycle: int = 1


PLAIN = "plain sum, one backward"
MODES = {
    PLAIN: Mode(),
    "m plain backward passes": Mode(way="one by one"),
    "default": Mode({}),
    'guarantee="gradient"': Mode({"guarantee": "gradient"}),
    "row_dtype=torch.bfloat16": Mode({"row_dtype": torch.bfloat16}),
    "features=": Mode({}, way="features"),
    f"refresh_every={CYCLE}": Mode({"refresh_every": CYCLE}, cycle=CYCLE),
    "rotate=1": Mode({"rotate": 1}, cycle=8),
    "rotate=2": Mode({"rotate": 2}, cycle=4),
    "functions": Mode({}, way="functions"),
}


class Reader(nn.Module):
    """A transformer over 64 pixels, and one head per task: what digit, its properties, the ink, the pixels."""

    def __init__(self, m: int, size: str) -> None:
        super().__init__()
        width, depth = SPACE[size]
        self.embed, self.place = nn.Linear(1, width), nn.Parameter(torch.randn(64, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.names = list(TASKS)[:m]
        self.heads = nn.ModuleDict({name: nn.Linear(width, TASKS[name][0]) for name in self.names})

    def represent(self, images: Tensor) -> Tensor:
        h: Tensor = self.encoder(self.embed(images.unsqueeze(-1)) + self.place)
        return h

    def loss(self, name: str, h: Tensor, images: Tensor, digits: Tensor) -> Tensor:
        _, target = TASKS[name]
        out: Tensor = self.heads[name](h if name == "pixels" else h.mean(1))
        y = target(images, digits)
        if y.dtype == torch.long:
            return nn.functional.cross_entropy(out, y)
        return (out.squeeze(-1) - y).square().mean()

    @property
    def shared(self) -> list[Tensor]:
        mine = set(map(id, self.heads.parameters()))
        return [p for p in self.parameters() if id(p) not in mine]


Target = Callable[[Tensor, Tensor], Tensor]
TASKS: dict[str, tuple[int, Target]] = {
    "digit": (10, lambda x, d: d),
    "pixels": (1, lambda x, d: x.roll(1, 1)),
    "odd": (2, lambda x, d: d % 2),
    "ink": (1, lambda x, d: x.mean(1)),
    "large": (2, lambda x, d: (d > 4).long()),
    "upper": (1, lambda x, d: x[:, :32].mean(1)),
    "third": (3, lambda x, d: d % 3),
    "left": (1, lambda x, d: x.view(-1, 8, 8)[:, :, :4].mean((1, 2))),
}


def batches(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches of images and digits without end."""
    data = load_digits()
    images, digits = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[index], digits[index]


@dataclass
class Trainer:
    """A model, its optimizer and the mode that it is trained in."""

    mode: Mode
    m: int
    size: str
    watch: bool = False
    handed: Tensor | None = None  # what stood in p.grad of the shared parameters before the step, where `watch` is set
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "backward": [], "step": []})

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Reader(self.m, self.size)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        if self.mode.options is not None:
            self.optimizer = gradsurg.wrap(self.optimizer, **self.mode.options)

    def _compute(self, name: str, images: Tensor, digits: Tensor) -> Tensor:
        return self.model.loss(name, self.model.represent(images), images, digits)

    def step(self, images: Tensor, digits: Tensor) -> None:
        """Do one step and take its times."""
        model, way, optimizer = self.model, self.mode.way, self.optimizer
        optimizer.zero_grad()
        begin = time.process_time()
        losses: dict[str, Any] = {}
        if way == "functions":
            losses = {name: functools.partial(self._compute, name, images, digits) for name in model.names}
        else:
            h = model.represent(images)
            losses = {name: model.loss(name, h, images, digits) for name in model.names}
        forward = time.process_time()
        if way == "functions":
            optimizer.backward(losses)
        elif way == "one by one":
            for i, loss in enumerate(losses.values()):
                loss.backward(retain_graph=i < len(losses) - 1)
        elif self.mode.options is None:
            torch.stack(list(losses.values())).sum().backward()
        elif way == "features":
            optimizer.total(losses, features=h).backward()
        else:
            optimizer.total(losses).backward()
        backward = time.process_time()
        if self.watch:
            self.handed = _flat([p.grad for p in self.model.shared])
        stepping = time.process_time()
        optimizer.step()
        done = time.process_time()
        for what, value in (("forward", forward - begin), ("backward", backward - forward), ("step", done - stepping)):
            self.seconds[what].append(value)


def measure_time(modes: dict[str, Mode], m: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return, per mode, backward time over one plain backward's, and whole-step time over the plain whole step's."""
    trainers = {name: Trainer(mode, m, "5 M") for name, mode in ({PLAIN: MODES[PLAIN]} | modes).items()}
    data = batches()
    for trainer in trainers.values():
        # The first steps touch fresh memory, fill the averages and find weights; a round of refresh_every is whole.
        for _ in range(CYCLE if "refresh_every" in (trainer.mode.options or {}) else 2):
            trainer.step(*next(data))
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for _ in range(rounds):
        means = {}
        for name, trainer in trainers.items():
            for times in trainer.seconds.values():
                times.clear()
            for _ in range(trainer.mode.cycle):
                trainer.step(*next(data))
            means[name] = {what: statistics.mean(times) for what, times in trainer.seconds.items()}
        plain = means[PLAIN]
        for name, mean in means.items():
            # Forward passes inside of functions are no part of a backward pass: one of them is the plain step's.
            whole = sum(mean.values()) / sum(plain.values())
            extra = plain["forward"] if trainers[name].mode.way == "functions" else 0.0
            ratios[name].append(((mean["backward"] - extra) / plain["backward"], whole))
    return {
        name: (statistics.median(b for b, _ in values), statistics.median(w for _, w in values))
        for name, values in ratios.items()
    }


def peak(name: str, m: int) -> int:
    """Return the peak resident bytes of a process that trains in one mode."""
    command = [sys.executable, "-m", "benchmarks.cheap", "--peak", name, "--tasks", str(m)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak(name: str, m: int) -> int:
    """Train for a few steps and return this process's peak resident bytes."""
    trainer, data = Trainer(MODES[name], m, "5 M"), batches()
    for _ in range(3):
        trainer.step(*next(data))
    return peak_bytes()


def measure_conflicts(name: str, m: int, steps: int = 100) -> tuple[float, float, float]:
    """Return how many of 100 steps conflict with some task, by p.grad and by the movement, and its worst cosine."""
    trainer, data = Trainer(MODES[name], m, "small", watch=True), batches(1)
    shared = trainer.model.shared
    counts, worst = [0, 0], 1.0
    for _ in range(steps):
        images, digits = next(data)
        h = trainer.model.represent(images)
        rows = torch.stack(
            [
                _flat(torch.autograd.grad(trainer.model.loss(t, h, images, digits), shared, retain_graph=True))
                for t in trainer.model.names
            ]
        )
        before = _flat(shared)
        trainer.step(images, digits)
        assert trainer.handed is not None
        for k, v in enumerate((trainer.handed, before - _flat(shared))):
            cosines = (rows @ v) / (rows.norm(dim=1) * v.norm()).clamp(min=1e-30)
            counts[k] += bool(cosines.min() < -1e-4)
        worst = min(worst, float(cosines.min()))
    return 100 * counts[0] / steps, 100 * counts[1] / steps, worst


def _flat(tensors: Any) -> Tensor:
    return torch.cat([torch.as_tensor(t).detach().double().flatten() for t in tensors])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["time", "memory", "conflicts"], nargs="+", default=[])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(own_peak(given.peak, given.tasks[0]))
        return
    wanted = given.only or ["time", "memory", "conflicts"]
    titles = {
        "time": ["backward / plain", "step / plain"],
        "memory": ["memory, copies of P"],
        "conflicts": ["conflicts per 100 steps, gradient", "update", "worst cos, update"],
    }
    for m in given.tasks:
        numbers = sum(p.numel() for p in Reader(m, "5 M").parameters())
        cells: dict[str, list[str]] = {name: [] for name in given.modes}
        if "time" in wanted:
            pairs = measure_time({name: MODES[name] for name in given.modes}, m, given.rounds)
            for name in given.modes:
                cells[name] += [f"{x:.2f}" for x in pairs[name]]
        if "memory" in wanted:
            base = peak(PLAIN, m)
            for name in given.modes:
                cells[name].append(f"{(peak(name, m) - base) / (4 * numbers):+.1f}")
        if "conflicts" in wanted:
            for name in given.modes:
                gradient, update, worst = measure_conflicts(name, m)
                cells[name] += [f"{gradient:.0f}", f"{update:.0f}", f"{worst:.1g}"]
        head = [f"{m} tasks, {numbers / 1e6:.1f} M parameters", *(title for what in wanted for title in titles[what])]
        lines = [f"| {' | '.join(head)} |", f"| --- |{' --: |' * (len(head) - 1)}"]
        lines += [f"| {' | '.join([name, *values])} |" for name, values in cells.items()]
        print("\n".join(["", *lines]), flush=True)
        path = record("cheap", "\n".join(lines))
    print(f"\n{conditions()}\n{path}")


if __name__ == "__main__":
    main()
