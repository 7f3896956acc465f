"""Reports in other forms, for History: packed in memory, as JSON for a file, and as a table for a spreadsheet.

The first two go over the fields of Report by themselves, so that a new field is kept and saved without a line here.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.optimizer.report import Report

__all__ = ["PackedReport", "from_json", "replacing", "to_json", "write_csv"]

# Stands in a packed report for each tensor.
NOTHING = torch.empty(0)

Layout = tuple[tuple[torch.device, torch.Size, torch.dtype], ...]

# One object for all records of a kind: a layout of its own would be most of what each record takes.
_LAYOUTS: dict[Layout, Layout] = {}


class PackedReport:
    """A report whose numbers are copied into one tensor per device, without waiting for the device.

    They are copied because losses may be views of a large tensor, and because a CUDA graph overwrites its outputs in
    the next step.
    """

    def __init__(self, report: Report) -> None:
        tensors: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return NOTHING

        self._skeleton = _mapped(report, take)
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            # Apple's GPUs have no float64.
            widest = torch.float32 if tensor.device.type == "mps" else torch.float64
            by_device.setdefault(tensor.device, []).append(tensor.detach().reshape(-1).to(widest))
        layout = tuple((t.device, t.shape, t.dtype) for t in tensors)
        self._layout = _LAYOUTS.setdefault(layout, layout)
        self.numbers = {device: torch.cat(parts) for device, parts in by_device.items()}

    @property
    def nbytes(self) -> int:
        """About what this takes in memory; 2 KiB for the objects was measured with three tasks."""
        return 2048 + sum(numbers.nbytes for numbers in self.numbers.values())

    @property
    def step(self) -> int:
        """The report's step."""
        return self._skeleton.step

    @property
    def devices(self) -> list[torch.device]:
        """The devices other than the CPU on which numbers still are."""
        return [device for device, numbers in self.numbers.items() if numbers.device.type != "cpu"]

    def report(self) -> Report:
        """Return the report again, on the CPU."""
        on_cpu = {device: numbers.cpu() for device, numbers in self.numbers.items()}
        starts = dict.fromkeys(on_cpu, 0)
        tensors = []
        for device, shape, dtype in self._layout:
            start, starts[device] = starts[device], starts[device] + shape.numel()
            tensors.append(on_cpu[device][start : starts[device]].reshape(shape).to(dtype))
        remaining = iter(tensors)
        return _mapped(self._skeleton, lambda _: next(remaining))


def _mapped(report: Report, change: Callable[[Tensor], Tensor]) -> Report:
    """Return the report with every tensor changed, always in the same order."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict):
            return {name: mapped(each) for name, each in value.items()}
        if isinstance(value, Report | Movement):
            return dataclasses.replace(
                value, **{f.name: mapped(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return value

    return cast(Report, mapped(report))


def to_json(report: Report) -> dict[str, Any]:
    """Return nested dicts, lists, strings and numbers; NaN and infinities, which JSON lacks, become None."""
    entry: dict[str, Any] = _plain(report)
    # It is the sum of the gramians, which from_json adds up again.
    if report.gramians is not None:
        del entry["gramian"]
    return entry


def from_json(entry: object) -> Report:
    """Undo to_json; infinities come back as NaN, and keys of later versions are left out.

    Raises:
        ValueError: The entry is no dict, or a field that every report has is missing.
    """
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    values = _parsed(Report, entry)
    try:
        if values.get("movement") is not None:
            values["movement"] = Movement(**_parsed(Movement, values["movement"]))
        if "gramian" not in values and values.get("gramians") is not None:
            values["gramian"] = values["gramians"].sum(0)
        report = Report(**values)
    except TypeError as error:
        raise ValueError(f"no report: {str(error).partition(') ')[2] or error}") from None
    m = len(report.tasks)
    for name in ("gramian", "scales", "weights", "products"):
        if (shape := tuple(getattr(report, name).shape))[-1:] != (m,):
            raise ValueError(f"{name} has shape {shape}, and there are {m} tasks")
    return report


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _parsed(cls: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for a dataclass; its annotations tell which lists are tensors."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in entry:
            continue
        value, kind = entry[field.name], str(field.type)
        try:
            # A field that may be None keeps it; in a list of numbers None stands for NaN.
            values[field.name] = None if value is None and "None" in kind else _of_kind(kind, value)
        except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
            raise ValueError(f"{field.name} is {value!r:.60}, and must be {kind}") from None
    return values


def _of_kind(kind: str, value: Any) -> Any:
    """Return the value of a field from JSON; `kind` is its annotation."""
    if kind.startswith("Tensor"):
        return torch.tensor(_with_nan(value), dtype=torch.float64)
    if kind == "dict[str, Tensor]":
        return {name: torch.tensor(_with_nan(each), dtype=torch.float64) for name, each in value.items()}
    if kind == "float":
        return float(_with_nan(value))
    if kind.startswith("tuple"):
        right = isinstance(value, list) and all(isinstance(each, str) for each in value)
        value = tuple(value) if right else value
    else:
        right = kind not in PLAIN or type(value) is PLAIN[kind]
    if not right:
        raise TypeError
    return value


# Annotations of fields that JSON keeps as they are.
PLAIN = {"int": int, "bool": bool, "str": str}


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a new file beside an old one, and put it in the old one's place when all is written."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Half a surrogate pair, which a task's name may have, becomes the escape that JSON has for it.
        with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    """Write a table with a row per step and task; a cell is empty if there is no number.

    A task's name that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    rows = [row for report in reports for row in _rows(report)]
    # Cosines come last: there are more of them whenever a new task appears.
    columns = dict.fromkeys(name for row in rows for name in row)
    last = [name for name in columns if name.startswith(_COSINE)]
    with replacing(path) as file:
        writer = csv.DictWriter(file, [*(name for name in columns if name not in last), *last])
        writer.writeheader()
        writer.writerows(rows)


# Begins the columns of cosines; the other task's name follows.
_COSINE = "cos:"
# A cell that begins with one of these is run, as in =HYPERLINK(...), when a spreadsheet opens the file.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name


def _rows(report: Report) -> Iterator[dict[str, object]]:
    movement, unknown = report.movement, [None] * len(report.tasks)
    of_step = {
        "length_direction": float(report.square.clamp(min=0).sqrt()),
        "length_update": None if movement is None else float(movement.square) ** 0.5,
        "corrected": None if movement is None else int(movement.corrected),
        "held": None if movement is None else int(movement.held),
        "stationary": int(report.stationary),
        "blocks": len(report.blocks),
    }
    of_tasks: dict[str, Sequence[object]] = {
        "loss": [float(report.losses[name]) if name in report.losses else None for name in report.tasks],
        "norm": report.norms.tolist(),
        "preference": unknown if report.preferences is None else report.preferences.tolist(),
        "scale": report.scales.mean(0).tolist(),
        "weight": report.weights.mean(0).tolist(),
        "cos_direction": report.direction_cosines.tolist(),
        "cos_update": unknown if report.update_cosines is None else report.update_cosines.tolist(),
        "finite": [int(name not in report.nonfinite) for name in report.tasks],
    }
    cosines = dict(zip((_COSINE + name for name in report.tasks), report.cosines.tolist(), strict=True))
    for k, name in enumerate(report.tasks):
        own = {title: column[k] for title, column in (of_tasks | cosines).items()}
        yield {"step": report.step, "task": _cell(name), **own, **of_step}
    for name in report.nonfinite:
        # It was left out of the step.
        if name not in report.tasks:
            yield {"step": report.step, "task": _cell(name), "finite": 0, **of_step}
