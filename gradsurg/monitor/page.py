"""A history as one self-contained HTML page, with pictures and a verdict in plain language, for the command line."""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradsurg.monitor import plot
from gradsurg.monitor.history import History
from gradsurg.monitor.verdict import verdict
from gradsurg.optimizer.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["main", "page"]

PICTURES: list[tuple[Callable[..., Axes], dict[str, Any], str]] = [
    (plot.conflict_matrix, {}, "Darker is more often in conflict: the two gradients are more than 90° apart."),
    (plot.conflicts, {}, "The same over time, for the pairs that conflict most."),
    (plot.angles, {"of": "update"}, "What the parameters really did, against what each task wanted."),
    (plot.angles, {"of": "direction"}, "What was handed to the optimizer, against what each task wanted."),
    (plot.weights, {}, "What each raw gradient was multiplied by; a plain sum has 1 for all."),
    (plot.norms, {}, "How loud each task is before normalisation."),
    (plot.layers, {}, "Where in the model tasks conflict."),
    (plot.losses, {}, "As handed over, batch by batch."),
]

# What XML forbids, in a picture or a page: names of tasks may have any character.
UNPRINTABLE = re.compile("[^\\t\\n\\r -\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #555; --back: #fff; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #aaa; --back: #16181c; --line: #3a3d44 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto;
  max-width: 70rem; padding: 1rem 1.2rem 3rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 1.4rem 0 .3rem }
p.about, figcaption { color: var(--soft); font-size: .9rem } ul { margin: .2rem 0; padding-left: 1.2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.2rem }
figure { margin: 0 } figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px }
"""


def main(arguments: Sequence[str], made_by: str) -> int:
    """Write the page that the command line after `report` asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gradsurg report",
        description="Make one self-contained page of a history: which tasks fight, when, how much surgery changed.",
    )
    parser.add_argument("history", type=Path, help="a .jsonl file that History.save() wrote")
    parser.add_argument("-o", "--output", type=Path, help="the page; by default the history's name with .html")
    options = parser.parse_args(arguments)
    output: Path = options.output or options.history.with_suffix(".html")
    if importlib.util.find_spec("matplotlib") is None:
        parser.exit(1, 'The report needs matplotlib: pip install "gradsurg[plot]"\n')
    try:
        reports = History.load(options.history).reports
        output.write_text(page(reports, options.history.name, made_by), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for heading, sentences in verdict(reports).items():
        print(f"{heading}\n" + "".join(f"  {sentence}\n" for sentence in sentences), end="")
    print(f"page: {output}")
    return 0


def page(reports: Sequence[Report], name: str, made_by: str) -> str:
    """Return the page as HTML that loads no other file, titled by the history's name.

    Raises:
        ValueError: No step of several tasks that share parameters is among them.
    """
    reports, name = list(map(_printable, reports)), _printed(name)
    found = verdict(reports)
    sections = "".join(
        f"<h2>{html.escape(heading)}</h2><ul>{''.join(f'<li>{html.escape(s)}</li>' for s in sentences)}</ul>"
        for heading, sentences in found.items()
    )
    pictures = "".join(_pictures(reports))
    about = f"{len(reports)} recorded steps, {reports[0].step} to {reports[-1].step}"
    made = f"{made_by}, {time.strftime('%Y-%m-%d')}"
    title = html.escape(f"Tasks and conflicts: {name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{title}</h1><p class="about">{html.escape(about)} · {html.escape(made)}</p>{sections}'
        f'<h2>At the last recorded step</h2><div class="wide">{reports[-1]._repr_html_()}</div>'
        f'<h2>Pictures</h2><div class="pictures">{pictures}</div></body></html>\n'
    )


def _printed(name: str) -> str:
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", name)


def _printable(report: Report) -> Report:
    """Return the report with names that a page and its pictures can show."""
    losses = {_printed(name): loss for name, loss in report.losses.items()}
    tasks, nonfinite = tuple(map(_printed, report.tasks)), tuple(map(_printed, report.nonfinite))
    fresh = None if report.fresh is None else tuple(map(_printed, report.fresh))
    return replace(report, losses=losses, tasks=tasks, nonfinite=nonfinite, fresh=fresh)


def _pictures(reports: Sequence[Report]) -> list[str]:
    figures = []
    for number, (draw, options, caption) in enumerate(PICTURES):
        try:
            ax = draw(reports, **options)
        # The reports lack what this picture shows, such as blocks or a measured update.
        except ValueError:
            continue
        # Each picture has a number of its own, for the ids inside of it.
        figures.append(f"<figure>{_svg(ax, f'p{number}-')}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return figures


def _svg(ax: Axes, prefix: str) -> str:
    """Return the figure as an <svg> whose ids begin with the prefix: pictures on one page must not share clip paths."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A salt gives a picture the same ids in every run; letters as paths need no font on the reader's machine.
    with rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        cast(Any, ax.figure).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
