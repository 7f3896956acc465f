"""The result file: how it was measured, one table over all problems, one of each problem, what failed."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality.cache import Cache
from benchmarks.quality.methods import SUM
from benchmarks.quality.metrics import half_width, spread
from benchmarks.quality.plots import plot
from benchmarks.quality.search import DECAYS, GRID, RATES
from benchmarks.quality.summary import Row, Summary, gather
from benchmarks.quality.timing import TIMES
from benchmarks.quality.train import CHECKPOINTS, EVERY
from benchmarks.record import RESULTS, conditions

__all__ = ["report"]

PICTURES = Path(__file__).parents[2] / "docs" / "pictures" / "quality"  # docs/when-it-helps.md shows them

HOW = """\
AdamW, cosine schedule. Every method has {trials} trials: learning rates {rates} × weight decays {decays}. Tuned static
weights spend half of theirs as the plain sum (each rate once, the largest with the large decay), the other half at the
best of these with each task in turn ten times as loud as the others; the longer search has all of the sum's trials and
twice as many with other weights, drawn (log-uniform, 0.1 to 10) once every task has had its turn. The trial is chosen
with the first seed and the best of {checkpoints} checkpoints of each run with every seed, both on validation; test is
only reported. Single-task runs have the same search and choose by their own task.

Δm is the mean relative change against the single-task run of the same seed, in percent: **lower is better, negative is
better than single-task runs**. "By task" gives each task one vote, "by metric" each metric. "Against the sum" is Δm by
task less the plain sum's with the same seed: mean ± half of the 95 % confidence interval (Student's t); bold where it
does not contain 0. With some forty methods and {problems} problems, about one interval in twenty is bold by chance.
"Rank" is the mean rank over metrics and seeds among the methods of that table. Conflicts are counted in every {every}th
step, from gradients computed separately by torch.autograd.grad: "gradient" is what was handed to the optimizer,
"update" what the shared parameters really did; a cosine below −0.0001 with any task counts. ± is the standard deviation
over seeds. "CPU ms" is the processor time of a step, one thread, in a run that shared its machine with other work.
"""


def report(cache: Cache, names: Sequence[str], seeds: int) -> str:
    """Write the result file and the plots; return the file's text."""
    summaries = [summary for summary in gather(cache, names, seeds) if SUM in summary.rows]
    if not summaries:
        return "the cache has no complete search of the plain sum yet: run python -m benchmarks.quality"
    how = HOW.format(
        trials=len(GRID),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        decays=", ".join(f"{decay:g}" for decay in DECAYS),
        checkpoints=CHECKPOINTS,
        problems=len(summaries),
        every=EVERY,
    )
    parts = [f"# Training quality\n\n{conditions()}; {len(cache)} runs\n\n{how}", _overview(summaries)]
    parts += [_one_problem(summary) for summary in summaries]
    parts += [_choices(summaries), _times(summaries), _failures(summaries)]
    text = "\n".join(part for part in parts if part)
    path = RESULTS / f"quality-{dt.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    drawn = plot(cache, summaries, PICTURES)
    return f"{text}\n{path}\n" + "\n".join(map(str, drawn))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _plus_minus(values: Sequence[float], digits: int = 1) -> str:
    mean, deviation = spread(values)
    if len(values) == 1 and math.isfinite(mean):
        return f"{mean:.{digits}f}"  # one seed has no spread, and "± 0" would claim one
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if math.isfinite(mean) else "failed"


def _difference(row: Row, base: Row) -> str:
    values = row.against(base)
    if row is base:
        return "0"
    if not all(map(math.isfinite, values)):
        return "failed"
    mean, half = fmean(values), half_width(values)
    text = f"{mean:+.1f} ± {half:.1f}" if math.isfinite(half) else f"{mean:+.1f}"
    return f"**{text}**" if abs(mean) > half else text


def _overview(summaries: Sequence[Summary]) -> str:
    """Δm by task against the plain sum on every problem, and the rank over all."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary.rows))
    lines = []
    for name in names:
        here = [summary for summary in summaries if name in summary.rows]
        row = here[0].rows[name]
        cells = [_difference(s.rows[name], s.rows[SUM]) + _fewer(s, name) if s in here else "" for s in summaries]
        ranks = [s.ranks[name] for s in here if name in s.ranks]
        rank = f"{fmean(ranks):.1f}" if len(ranks) == len(summaries) else ""
        lines.append([row.method.title, row.method.group, *cells, rank])
    head = ["method", "kind", *(s.problem.name for s in summaries), "mean rank"]
    seeds = max(len(s.rows[SUM].outcomes) for s in summaries)
    return f"## Against the plain sum: Δm by task, in points\n\nSeeds, where not said: {seeds}.\n\n" + _table(
        head, lines
    )


def _fewer(summary: Summary, name: str) -> str:
    """Return the number of seeds in brackets where it is less than the plain sum's."""
    count = len(summary.rows[name].outcomes)
    return f" ({count})" if count < len(summary.rows[SUM].outcomes) else ""


def _one_problem(summary: Summary) -> str:
    p = summary.problem
    titles = [metric.title for task in p.tasks.values() for metric in task.metrics]
    head = ["method", *titles, "Δm by task", "Δm by metric", "against the sum", "rank"]
    head += ["conflicts, gradient", "conflicts, update", "CPU ms", "seeds"]
    alone = [
        [_plus_minus([seed[k] for seed in summary.single[name]]) for k in range(len(task.metrics))]
        if name in summary.single
        else [""] * len(task.metrics)
        for name, task in p.tasks.items()
    ]
    count = max((len(found) for found in summary.single.values()), default=0)
    lines = [["single-task runs", *(cell for cells in alone for cell in cells), "0", "0", *[""] * 5, str(count)]]
    for name, row in summary.rows.items():
        scores = [
            _plus_minus([_of(outcome.test, task, k) for outcome in row.outcomes])
            for task in p.tasks
            for k in range(len(p.tasks[task].metrics))
        ]
        shares = [
            _plus_minus(row.per_hundred(level)) if row.per_hundred(level) else "" for level in ("gradient", "update")
        ]
        spent = [outcome.entry["cpu_ms"] for outcome in row.outcomes if "cpu_ms" in outcome.entry]
        lines.append(
            [
                row.method.title,
                *scores,
                _plus_minus(row.by_task),
                _plus_minus(row.by_metric),
                _difference(row, summary.rows[SUM]),
                f"{summary.ranks[name]:.1f}" if name in summary.ranks else "",
                *shares,
                f"{fmean(spent):.1f}" if spent else "",
                str(len(row.outcomes)),
            ]
        )
    counted = f"Δm counts {', '.join(p.judged)}." if set(p.judged) != set(p.tasks) else ""
    return f"## {p.name}: {p.title}\n\n{p.steps} steps. {counted}\n\n{_table(head, lines)}"


def _of(test: object, task: str, k: int) -> float:
    values = test.get(task) if isinstance(test, dict) else None
    value = values[k] if values else None
    return math.inf if value is None else float(value)


def _choices(summaries: Sequence[Summary]) -> str:
    """How often validation chose each learning rate and decay: a grid whose edge is chosen was too short."""
    lines = []
    for summary in summaries:
        chosen = [row.outcomes[0].trial for row in summary.rows.values()]
        rates = [str(sum(trial.rate == rate for trial in chosen)) for rate in RATES]
        decays = [str(sum(trial.decay == decay for trial in chosen)) for decay in DECAYS]
        lines.append([summary.problem.name, *rates, *decays])
    head = ["problem", *(f"rate {rate:g}" for rate in RATES), *(f"decay {decay:g}" for decay in DECAYS)]
    return "## What validation chose: number of methods\n\n" + _table(head, lines)


def _times(summaries: Sequence[Summary]) -> str:
    if not TIMES.exists():
        return ""
    kept = json.loads(TIMES.read_text(encoding="utf-8"))
    ms = kept["ms"]
    names = [name for summary in summaries for name in summary.rows]
    lines = []
    for name in dict.fromkeys(names):
        title = next(s.rows[name].method.title for s in summaries if name in s.rows)
        found = [ms.get(s.problem.name, {}).get(name) for s in summaries]
        bases = [ms.get(s.problem.name, {}).get(SUM) for s in summaries]
        cells = [f"{t:.2f} ({t / b:.1f} ×)" if t and b else "" for t, b in zip(found, bases, strict=True)]
        lines.append([title, *cells])
    head = ["method", *(s.problem.name for s in summaries)]
    how = f"Processor time: medians of steps, in turns in one process, one thread. {kept['conditions']}.\n\n"
    return "## Step time in ms (times that of the plain sum)\n\n" + how + _table(head, lines)


def _failures(summaries: Sequence[Summary]) -> str:
    found = [f"- {s.problem.name}, {where}: {error}" for s in summaries for where, error in s.failed]
    return (
        "## Runs that ended in an error (a lost trial for that method)\n\n" + "\n".join(found) + "\n" if found else ""
    )
