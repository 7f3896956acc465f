"""Pages that are made from the library and from result files, so that they cannot say anything else.

Written to docs/generated/, which is not committed, each time the documentation is built.
"""

from __future__ import annotations

import re
from pathlib import Path

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
}


# Caption -> pages in order; patterns stand for pages of people who add one by adding a file.
TREES = {
    "Learn": ["start", "concepts", "choosing", "when-it-helps", "faq"],
    "Guides": ["compatibility", "many-gpus", "cost", "cheap-modes", "monitoring", "migrating", "guides/*"],
    "Gallery": ["gallery", "gallery/*", "examples/*"],
    "Reference": ["generated/methods", "api", "generated/benchmarks", "kernels"],
}


def make_pages(docs: Path) -> None:
    """Write the list of methods, the benchmarks, and the tables of contents of the pages that there are."""
    folder = docs / "generated"
    folder.mkdir(exist_ok=True)
    _write(folder / "methods.md", _methods(docs / "methods"))
    _write(folder / "benchmarks.md", _benchmarks(docs.parent / "benchmarks" / "results"))
    _write(folder / "toctrees.md", _toctrees(docs))


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
                lines.append(
                    f"| {_linked(method.name, pages)} | {_cell(method.promise)} | {options} | {_cell(method.paper)} |"
                )
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
