"""Reports in other forms: packed for keeping, as JSON for a file.

Both go over the fields of Report by themselves, so that a new field is kept and saved without a line here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.optimizer.report import Report

__all__ = ["Packed", "from_json", "to_json"]

NOTHING = torch.empty(0)
_MOVEMENT = "movement."
_LOSS = "losses."

Layout = tuple[tuple[str, torch.device, torch.Size, torch.dtype], ...]
_LAYOUTS: dict[Layout, Layout] = {}  # one object for all records of a kind: it would be most of what each takes


class Packed:
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
