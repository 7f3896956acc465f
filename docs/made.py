"""Pages that are made from the library and from result files, so that they cannot say anything else.

Written to docs/generated/, which is not committed, each time the documentation is built.
"""

from __future__ import annotations

import re
from pathlib import Path

from formulas import dollars

import gradsurg

__all__ = ["make_pages"]

MEASURED = {
    "demo": "The main job: plain sum against gradsurg",
    "conflicts": "Conflicts of the update, by optimizer",
    "parts": "What each part does",
    "solvers": "The small solver against TorchJD's",
    "methods": "Time of every method's weights",
    "quality": "Training quality",
    "cheap": "Cheap modes",
    "conflict_table": "Conflicts left by each method",
    "toy": "The toy problem of the CAGrad and Nash-MTL papers",
    "cpu": "Cost of a step on the CPU",
    "gpu": "The CUDA path",
}


WAYS = ["gradient", "update", "gradient, batched", "update, batched"]  # guarantee=, with batched=True or without

# Caption -> pages in order; patterns stand for pages of people who add one by adding a file.
TREES = {
    "Learn": ["start", "concepts", "choosing", "when-it-helps", "measured", "faq"],
    "Guides": ["compatibility", "many-gpus", "cost", "cheap-modes", "monitoring", "migrating", "guides/*"],
    "Gallery": ["gallery", "gallery/*", "examples/*"],
    "Reference": ["generated/methods", "api", "generated/benchmarks", "kernels", "glossary"],
}


def make_pages(docs: Path) -> None:
    """Write the list of methods, the benchmarks, and the tables of contents of the pages that there are."""
    folder = docs / "generated"
    folder.mkdir(exist_ok=True)
    _write(folder / "methods.md", _methods(docs / "methods"))
    _write(folder / "benchmarks.md", _benchmarks(docs.parent / "benchmarks" / "results"))
    _write(folder / "toctrees.md", _toctrees(docs))
    _write(folder / "cost-of-steps.md", _cost_of_steps(_newest(docs, "cpu")))
    _write(folder / "cost-in-memory.md", _cost_in_memory(_newest(docs, "cpu")))
    for name in ("parts", "conflicts"):
        *_, last = re.split(r"^(?=\d{4}-\d\d-\d\d, commit )", _newest(docs, name), flags=re.MULTILINE)
        _write(folder / f"last-{name}.md", last)


def _newest(docs: Path, name: str) -> str:
    """Return the text of a benchmark's newest result file."""
    return max((docs.parent / "benchmarks" / "results").glob(f"{name}-*.md")).read_text(encoding="utf-8")


def _toctrees(docs: Path) -> str:
    lines: list[str] = []
    for caption, patterns in TREES.items():
        found = [sorted(docs.glob(f"{pattern}.md")) for pattern in patterns]
        pages = [page.relative_to(docs).with_suffix("").as_posix() for each in found for page in each]
        if pages:
            lines += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    # Only where something changed: Sphinx reads again what is newer than the last build.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _methods(pages: Path) -> str:
    lines = [
        "# Methods",
        "",
        "Made from `gradsurg.methods()`. Pass a name as `surgery=` or `normalize=`; for other values of its options,",
        "an instance of the class of that name from `gradsurg.surgery` or `gradsurg.normalize`.",
    ]
    for kind, heading, promise in (
        ("surgery", "Surgeries", "what it promises of the gradient"),
        ("normalizer", "Normalisers", "what it does"),
    ):
        lines += ["", f"## {heading}", "", f"| name | {promise} | options | source |", "| --- | --- | --- | --- |"]
        for method in gradsurg.methods():
            if method.kind == kind:
                options = ", ".join(f"`{name}={value!r}`" for name, value in method.options.items())
                cells = [_linked(method.name, pages), _cell(dollars(method.promise)), options, _cell(method.paper)]
                lines.append(f"| {' | '.join(cells)} |")
    listed = [f"../methods/{page.stem}" for page in sorted(pages.glob("*.md"))]
    if listed:
        lines += ["", "```{toctree}", ":hidden:", "", *listed, "```"]
    return "\n".join([*lines, ""])


def _linked(name: str, pages: Path) -> str:
    return f"[`{name}`](../methods/{name}.md)" if (pages / f"{name}.md").exists() else f"`{name}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _benchmarks(results: Path) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Each section is a result file in `benchmarks/results/`, as the script of that name in `benchmarks/` wrote it:",
        "first what it was measured on, then the table. Newest first.",
    ]
    files = sorted(results.glob("*.md"), key=lambda path: path.stem[-10:], reverse=True)
    for path in files:
        name, date = re.fullmatch(r"(.+?)(?:-(\d{4}-\d\d-\d\d))?", path.stem).groups()  # type: ignore[union-attr]
        title = MEASURED.get(name, name.replace("_", " ").replace("-", " ").capitalize())
        text = re.sub(r"^#+ ", "### ", path.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)
        lines += ["", f"## {title}" + (f" ({date})" if date else ""), "", f"`python -m benchmarks.{name}`", "", text]
    return "\n".join(lines) + "\n"


def _cost_of_steps(text: str) -> str:
    """Return the table of whole steps, as multiples of plain passes, of the last measurement of each workload."""
    found: dict[tuple[str, str], tuple[list[str], str]] = {}
    for workload, m, part in re.findall(r"(\w+), m = (\d+): zero_grad(.*?)(?=\w+, m = \d+: |\Z)", text, re.M | re.S):
        ratios = dict(re.findall(r"^\| ([^|]+?) \| [\d.]+ \| ([\d.]+) \|", part, re.M))
        ours = re.findall(r"^gradsurg, guarantee ([\w, ]+): ([\d.]+) × plain \(allowed ([\d.]+)\)", part, re.M)
        bare = re.search(r"no surgery: ([\d.]+) × plain", part)
        peer = re.search(r"the fastest peer \((.*)\) takes", part)
        if not peer or not bare or [which for which, *_ in ours] != WAYS:
            raise ValueError(f"{workload}, m = {m}: no verdicts in the newest result file of benchmarks.cpu")
        cells = [*(ratio for _, ratio, _ in ours), ours[0][2], bare[1], ratios[peer[1]]]
        found[workload, m] = (cells, peer[1])
    lines = [
        f"| | m | {' | '.join(WAYS)} | aim | passes alone | fastest other library | which |",
        f"| --- |{' --: |' * (len(WAYS) + 4)} --- |",
    ]
    lines += [f"| {w} | {m} | {' | '.join(cells)} | {peer} |" for (w, m), (cells, peer) in found.items()]
    return "\n".join([*lines, ""])


def _cost_in_memory(text: str) -> str:
    """Return the table of peak memory, in copies of the parameters, one column per number of tasks."""
    found: dict[str, dict[str, str]] = {}
    for m, contender, copies in re.findall(r"^\| m = (\d+), (.+?) \| (.+?) \|$", text, re.M):
        found.setdefault(contender, {})[m] = copies
    columns = list(dict.fromkeys(m for row in found.values() for m in row))
    lines = [f"| | {' | '.join(f'{m} tasks' for m in columns)} |", f"| --- |{' --: |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(row.get(m, '') for m in columns)} |" for name, row in found.items()]
    return "\n".join([*lines, ""])
