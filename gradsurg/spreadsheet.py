"""A history as a table: one row for each step and task."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.optimizer.report import Report

__all__ = ["read_csv", "write_csv"]

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
        return _parsed(rows)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}, step {rows[0]['step']}: {error}") from None


def _parsed(rows: Sequence[Mapping[str, str]]) -> Report:
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
