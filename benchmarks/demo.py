"""The main job's table, kept: what `python -m gradsurg` trains by default, plain sum against gradsurg, three seeds.

Also draws the picture of README.md. Seconds a step mean little on a machine that does other work.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.record import conditions, record
from gradsurg.demo.digits import Data, Job, compare, conflicts
from gradsurg.demo.table import plot, table

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "digits.png"


def main() -> None:
    runs = compare(Job(), Data.digits(), range(3), bar=False)
    plot(runs, PICTURE, "Adam on overlaid digits: plain sum against gradsurg (norm · cone · update)")
    counts = [
        f"{name}: {sum(int(conflicts(run.update).sum()) for run in each)} of {sum(len(run.update) for run in each)}"
        " updates raised some task's loss to first order"
        for name, each in runs.items()
    ]
    text = "\n".join([table(runs), "", "; ".join(counts)])
    print(f"\n{text}\n\n{conditions()}\n{record('demo', text)}")


if __name__ == "__main__":
    main()
