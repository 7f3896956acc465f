"""Reports in other forms: packed for keeping, as JSON for a file.

Both go over the fields of Report by themselves, so that a new field is kept and saved without a line here.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.optimizer.report import Report

__all__ = ["PackedReport", "from_json", "read_csv", "to_json", "write_csv"]


NOTHING = torch.empty(0)


_MOVEMENT = "movement."


_LOSS = "losses."


Layout = tuple[tuple[str, torch.device, torch.Size, torch.dtype], ...]


_LAYOUTS: dict[Layout, Layout] = {}  # one object for all records of a kind: it would be most of what each takes


class PackedReport:
    """A report whose numbers are copied into one tensor a device, without waiting for the device.

    Copies, because losses may be views of something large, and a CUDA graph writes its outputs over the last step's.
    """

    def __init__(self, report: Report) -> None:
        tensors = _tensors(report)
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors.values():
            by_device.setdefault(tensor.device, []).append(tensor.detach().reshape(-1).to(_widest(tensor.device)))
        layout = tuple((name, t.device, t.shape, t.dtype) for name, t in tensors.items())
        self._layout = _LAYOUTS.setdefault(layout, layout)
        self._skeleton = _replaced(report, lambda name: NOTHING)
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
        """Where numbers still lie that are not on the CPU."""
        return [device for device, numbers in self.numbers.items() if numbers.device.type != "cpu"]

    def report(self) -> Report:
        """Return the report again, on the CPU."""
        on_cpu = {device: numbers.cpu() for device, numbers in self.numbers.items()}
        starts = dict.fromkeys(on_cpu, 0)
        tensors: dict[str, Tensor] = {}
        for name, device, shape, dtype in self._layout:
            start, starts[device] = starts[device], starts[device] + shape.numel()
            tensors[name] = on_cpu[device][start : starts[device]].reshape(shape).to(dtype)
        return _replaced(self._skeleton, tensors.__getitem__)


def to_json(report: Report) -> dict[str, Any]:
    """Return nested dicts, lists, strings and numbers; NaN and infinities, which JSON lacks, become None."""
    return {
        field.name: _plain(getattr(report, field.name))
        for field in dataclasses.fields(report)
        if not (field.name == "gramian" and report.gramians is not None)  # the sum of gramians
    }


def from_json(entry: Mapping[str, Any]) -> Report:
    """Undo to_json, but for infinities, which come back as NaN; keys of later versions are left out.

    Raises:
        ValueError: What a report cannot do without is missing.
    """
    values = _parsed(Report, entry)
    if values.get("movement") is not None:
        values["movement"] = Movement(**_parsed(Movement, values["movement"]))
    if "gramian" not in values and values.get("gramians") is not None:
        values["gramian"] = values["gramians"].sum(0)
    try:
        return Report(**values)
    except TypeError as error:
        raise ValueError(f"no report: {str(error).partition(') ')[2] or error}") from None


def _tensors(report: Report) -> dict[str, Tensor]:
    found = {_LOSS + name: loss for name, loss in report.losses.items()}
    found |= {f.name: value for f in dataclasses.fields(report) if isinstance(value := getattr(report, f.name), Tensor)}
    if report.movement is not None:
        values = {_MOVEMENT + f.name: getattr(report.movement, f.name) for f in dataclasses.fields(report.movement)}
        found |= {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return found


def _replaced(report: Report, by: Callable[[str], Tensor]) -> Report:
    changes: dict[str, Any] = {
        f.name: by(f.name) for f in dataclasses.fields(report) if isinstance(getattr(report, f.name), Tensor)
    }
    changes["losses"] = {name: by(_LOSS + name) for name in report.losses}
    movement = report.movement
    if movement is not None:
        of_movement: dict[str, Any] = {
            f.name: by(_MOVEMENT + f.name)
            for f in dataclasses.fields(movement)
            if isinstance(getattr(movement, f.name), Tensor)
        }
        changes["movement"] = dataclasses.replace(movement, **of_movement)
    return dataclasses.replace(report, **changes)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


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
    """Return arguments for a dataclass of ours, its annotations saying which lists are tensors."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in entry:
            continue
        value, kind = entry[field.name], str(field.type)
        if value is None and "None" in kind:
            pass
        elif kind.startswith("Tensor"):
            value = torch.tensor(_with_nan(value), dtype=torch.float64)
        elif kind == "dict[str, Tensor]":
            value = {name: torch.tensor(_with_nan(each), dtype=torch.float64) for name, each in value.items()}
        elif kind == "float":
            value = _with_nan(value)
        elif kind.startswith("tuple") and value is not None:
            value = tuple(value)
        values[field.name] = value
    return values


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


_COSINE = "cos:"  # followed by the other task's name


_OF_A_STEP = ["length_direction", "length_update", "corrected", "held", "stationary", "blocks"]


_OF_A_TASK = ["loss", "norm", "preference", "scale", "weight", "cos_direction", "cos_update", "finite"]


_COLUMNS = ["step", "task", *_OF_A_TASK, *_OF_A_STEP]


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    """Write the table; a cell is empty where there is no number."""
    names = list(dict.fromkeys(name for report in reports for name in report.tasks))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, *(_COSINE + name for name in names)])
        writer.writeheader()
        for report in reports:
            writer.writerows(_rows(report))


def read_csv(path: Path) -> Iterator[Report]:
    """Yield the reports of a table that `write_csv` wrote.

    Raises:
        ValueError: A column is missing, or a cell is not what it should be.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no history, the columns {missing} are missing")
        # Two records of one step, after a run went back to a checkpoint, differ in that a task comes again.
        group: list[dict[str, str]] = []
        for row in reader:
            if group and (row["step"] != group[0]["step"] or any(row["task"] == other["task"] for other in group)):
                yield _report(path, group)
                group = []
            group.append(row)
        if group:
            yield _report(path, group)


def _rows(report: Report) -> Iterator[dict[str, object]]:
    m, movement = len(report.tasks), report.movement
    update = [None] * m if report.update_cosines is None else report.update_cosines.tolist()
    preferences = [None] * m if report.preferences is None else report.preferences.tolist()
    shared = {
        "step": report.step,
        "length_direction": float(report.square.clamp(min=0).sqrt()),
        "length_update": None if movement is None else float(movement.square) ** 0.5,
        "corrected": None if movement is None else int(movement.corrected),
        "held": None if movement is None else int(movement.held),
        "stationary": int(report.stationary),
        "blocks": len(report.blocks),
    }
    columns = (report.norms, report.scales.mean(0), report.weights.mean(0), report.direction_cosines)
    per_task = zip(*(column.tolist() for column in columns), update, preferences, report.cosines.tolist(), strict=True)
    for name, (norm, scale, weight, direction, moved, preference, cosines) in zip(report.tasks, per_task, strict=True):
        own = {
            "task": name,
            "loss": float(report.losses[name]) if name in report.losses else None,
            "norm": norm,
            "preference": preference,
            "scale": scale,
            "weight": weight,
            "cos_direction": direction,
            "cos_update": moved,
            "finite": int(name not in report.nonfinite),
        }
        between = {_COSINE + other: cosine for other, cosine in zip(report.tasks, cosines, strict=True)}
        yield {**shared, **own, **between}
    for name in report.nonfinite:  # left out of the step
        if name not in report.tasks:
            yield {**shared, "task": name, "finite": 0}


def _report(path: Path, rows: Sequence[Mapping[str, str]]) -> Report:
    try:
        return _parsed_rows(rows)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}, step {rows[0]['step']}: {error}") from None


def _parsed_rows(rows: Sequence[Mapping[str, str]]) -> Report:
    first = rows[0]
    present = [row for row in rows if row["norm"]]
    tasks = tuple(row["task"] for row in present)

    def column(name: str) -> Tensor:
        return torch.tensor([_number(row[name]) for row in present], dtype=torch.float64)

    norms = column("norm")
    cosines = torch.stack([column(_COSINE + name) for name in tasks])
    gramian = cosines * norms[:, None] * norms
    gramian.diagonal().copy_(norms.square())  # also where a zero norm has no cosine with itself
    one_block = int(first["blocks"]) == 1 and bool(first["preference"])
    length, moved = _number(first["length_direction"]), _number(first["length_update"])
    movement = None
    if first["length_update"]:
        inner = column("cos_update") * norms * moved
        movement = Movement(inner, moved**2, corrected=first["corrected"] == "1", held=first["held"] == "1")
    return Report(
        step=int(first["step"]),
        tasks=tasks,
        losses={row["task"]: torch.tensor(_number(row["loss"]), dtype=torch.float64) for row in present if row["loss"]},
        gramian=gramian,
        scales=column("scale").unsqueeze(0),
        weights=column("weight").unsqueeze(0),
        products=column("cos_direction") * norms * length,
        square=torch.tensor(length**2, dtype=torch.float64),
        stationary=first["stationary"] == "1",
        nonfinite=tuple(row["task"] for row in rows if row["finite"] == "0"),
        movement=movement,
        preferences=column("preference") if one_block else None,
        gramians=gramian.unsqueeze(0) if one_block else None,
    )


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan
