"""Write docs/methods/: one page a published method, out of its docstring and of gradsurg.methods().

    python docs/method_pages.py

The pages are committed, so that they can be read where the code is; a test holds them to what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # formulas.py is beside this file

from formulas import dollars

import gradsurg
from gradsurg.normalize import NORMALIZERS
from gradsurg.surgery import SURGERIES
from gradsurg.surgery.base import ElementwiseSurgery

FOLDER = Path(__file__).parent / "methods"
MARKS = ("When it fails", "What differs", "Args", "Source", "Example", "Raises")


def pages() -> dict[str, str]:
    """Return file name -> text of every page; a surgery and a normaliser of one name share theirs."""
    texts: dict[str, list[str]] = {}
    for method in gradsurg.methods():
        table: dict[str, type] = {**(SURGERIES if method.kind == "surgery" else NORMALIZERS)}
        texts.setdefault(f"{method.name}.md", []).append(_section(method, table[method.name]))
    return {name: f"# {name[:-3]}\n\n" + "\n".join(sections) for name, sections in texts.items()}


def _section(method: gradsurg.methods.Method, cls: Any) -> str:
    parts = _parts(inspect.getdoc(cls) or "")
    surgery = method.kind == "surgery"
    argument = "surgery" if surgery else "normalize"
    lines = [f"## As `{argument}=`", "", dollars(_summary(parts["text"])), ""]
    lines += [f'`{argument}="{method.name}"`, the class `gradsurg.{argument}.{cls.__name__}`. {method.paper}.', ""]
    if len(parts["text"].split("\n\n")) > 1:
        lines += [dollars(parts["text"].partition("\n\n")[2]), ""]
    if "What differs" in parts:
        lines += ["### What differs from the paper", "", dollars(_sentence(parts["What differs"])), ""]
    if surgery:
        lines += ["### What it guarantees", "", f"By itself: {method.promise}.", "", _on_top(cls), ""]
    if "When it fails" in parts:
        lines += ["### When it fails", "", dollars(_sentence(parts["When it fails"])), ""]
    if method.options:
        lines += ["### Options", "", *_options(method.options, parts.get("Args", "")), ""]
    lines += ["### Example", "", "```python", *_example(parts["Example"]), "```", ""]
    lines += ["In training:", "", "```python", *_training(method, cls, argument), "```", ""]
    if "Source" in parts:
        lines += ["### Source", "", dollars(parts["Source"]), ""]
    return "\n".join(lines)


def _parts(docstring: str) -> dict[str, str]:
    """Return mark -> text; "text" is what stands before the first mark, or between marked paragraphs."""
    found: dict[str, list[str]] = {"text": []}
    for paragraph in re.split(r"\n\n(?=\S)", docstring):
        mark = next((mark for mark in MARKS if paragraph.startswith(f"{mark}:")), None)
        found.setdefault(mark or "text", []).append(_body(paragraph[len(mark) + 1 :]) if mark else paragraph)
    return {mark: "\n\n".join(texts) for mark, texts in found.items()}


def _body(text: str) -> str:
    """Return a section without its indentation, or a sentence that begins on its mark's line."""
    return inspect.cleandoc(text) if text.startswith("\n") else text.strip()


def _summary(text: str) -> str:
    return text.partition("\n\n")[0]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _on_top(cls: Any) -> str:
    if cls.conflict_free:
        return 'The gradient needs no further guarantee. `guarantee="update"` extends the promise to the whole step.'
    extra = " It has no weights: `gradsurg.weights` refuses it." if issubclass(cls, ElementwiseSurgery) else ""
    return (
        '`guarantee="gradient"` or `"update"` adds what is missing: the least change by which no task is hurt.' + extra
    )


def _options(options: dict[str, Any], text: str) -> Iterator[str]:
    described = dict(re.findall(r"^(\w+): (.*(?:\n[ ]+.*)*)", text, flags=re.MULTILINE))
    yield from ("| option | default | |", "| --- | --- | --- |")
    for name, default in options.items():
        meaning = dollars(" ".join(described.get(name, "").split())).replace("|", r"\|")
        yield f"| `{name}` | `{default!r}` | {meaning} |"


def _example(text: str) -> Iterator[str]:
    """Turn a doctest into a script: the last expression is printed, with what it prints below it."""
    lines = [line.strip() for line in inspect.cleandoc(text).splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith((">>> ", "... ")):
            continue
        code, _, remark = line[4:].partition("  #")
        shown = following and not following.startswith((">>> ", "..."))
        if remark:
            yield f"#{remark.rstrip()}"
        yield from [f"print({code.rstrip()})", f"# {following}"] if shown else [code.rstrip()]
        if code.startswith(("import ", "from ")) and not following.startswith((">>> import ", ">>> from ")):
            yield ""


def _training(method: Any, cls: Any, argument: str) -> Iterator[str]:
    required = [field for field in dataclasses.fields(cls) if field.default is field.default_factory]
    own = method.name == "prior_loss"
    assert own or not required, method.name
    value = f"{cls.__name__}(values)" if own else f'"{method.name}"'
    yield from (
        "import torch",
        "import gradsurg",
        *([f"from gradsurg.{argument} import {cls.__name__}"] if own else []),
        "",
        *(['values = {"left": 2.3, "right": 0.07}'] if own else []),
        "w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))",
        f"optimizer = gradsurg.wrap(torch.optim.Adam([w], lr=0.01), {argument}={value})",
        'losses = {"left": (w - 2).square().sum(), "right": (3 * w[0] - w[1]).square()}',
        "optimizer.total(losses).backward()",
        "optimizer.step()",
    )


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
