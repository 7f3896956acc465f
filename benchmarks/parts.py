"""What each part does for the main job: normalisation, surgery and guarantee, switched on one after the other.

gradsurg.demo.digits's job at its defaults, three seeds, mean ± standard deviation.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.record import conditions, record
from gradsurg.demo.digits import TASKS, Data, Job, Run, train
from gradsurg.demo.table import percent, spread

SEEDS = range(3)
VARIANTS: dict[str, dict[str, str] | None] = {
    "plain sum": None,
    "normalisation": {"surgery": "sum", "guarantee": "none"},
    "surgery": {"normalize": "none", "guarantee": "none"},
    "surgery, guarantee": {"normalize": "none"},
    "normalisation, surgery": {"guarantee": "none"},
    "normalisation, surgery, guarantee": {},
}


def measure(options: dict[str, str] | None, data: Data) -> list[Run]:
    job = Job(options=options or {})
    return [train(replace(job, seed=seed), data, wrapped=options is not None) for seed in SEEDS]


def main() -> None:
    data = Data.digits()
    titles = [*TASKS.values(), "conflicts per 100 steps, gradient", "conflicts per 100 steps, update"]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' --: |' * len(titles)}"]
    for name, options in VARIANTS.items():
        runs = measure(options, data)
        cells = [spread([run.scores[task] for run in runs]) for task in TASKS]
        cells += [spread([percent(run.gradient) for run in runs]), spread([percent(run.update) for run in runs])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print("\n".join(["", *lines]), flush=True)
    print(f"\n{conditions()}\n{record('parts', chr(10).join(lines))}")


if __name__ == "__main__":
    main()
