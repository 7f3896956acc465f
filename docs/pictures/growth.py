"""Draw docs/pictures/growth.svg from the newest result file of `python -m benchmarks.cpu`.

python docs/pictures/growth.py [FOLDER]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent.parent / "benchmarks" / "results"
CURVE = re.compile(r"Over (\w+), (.+?): slope (\S+)\n\n\|.*\n\|.*\n((?:\| .*\n?)+)")

Curve = tuple[str, str, str, list[tuple[float, float]]]


def curves(text: str) -> list[Curve]:
    """Return (what grows, what stays, slope, points) for each curve of a result file, as it was measured last."""
    found: dict[str, Curve] = {}
    for variable, fixed, slope, rows in CURVE.findall(text):
        cells = [row.strip("| ").split("|") for row in rows.strip().splitlines()]
        found[variable] = (variable, fixed, slope, [(float(x), float(y)) for x, y in cells])
    return list(found.values())


def draw(found: list[Curve]) -> Figure:
    """Return one panel a curve, both axes logarithmic."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (variable, fixed, slope, points) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found, strict=True
    ):
        axes.loglog(*zip(*points, strict=True), "o-", color="#0072B2")
        axes.set_xlabel(variable)
        axes.set_ylabel("surgery, ms")
        axes.set_title(f"{fixed}\nslope {slope}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure


def main(folder: Path) -> None:
    """Write the picture."""
    newest = max(RESULTS.glob("cpu-*.md"))
    with rc_context({"svg.hashsalt": "growth", "svg.fonttype": "path"}):
        figure = draw(curves(newest.read_text(encoding="utf-8")))
        figure.savefig(folder / "growth.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
