"""What a step did, left as it is until somebody reads it: on a device, its tensors stay there till then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.guarantee.movement import joined
from gradsurg.optimizer.report import Report

__all__ = ["LaterMovement", "LaterReport", "catch_up", "settled", "stream_of"]


@dataclass(frozen=True)
class LaterMovement:
    """A Movement of several blocks, on the device.

    Attributes:
        inner: ⟨d, g_i⟩, shape (blocks, m), float64.
        square: ‖d‖², shape (blocks,), float64.
        corrected: Bool, shape (blocks,).
        held: Bool, shape (blocks,).
        stream: Which they are made on, on a CUDA device.
    """

    inner: Tensor
    square: Tensor
    corrected: Tensor
    held: Tensor
    stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class LaterReport:
    """A report that is made when it is read, which then waits for the device, if there is one.

    Attributes:
        step: As in the report.
        make: Makes it, but for the movement.
        movements: What the optimizers that share it did since.
    """

    step: int
    make: Callable[[], Report]
    movements: tuple[LaterMovement | Movement, ...] = ()

    def with_movement(self, movement: object) -> LaterReport:
        """Return the report of a step that has also done this."""
        assert isinstance(movement, (LaterMovement, Movement))
        return replace(self, movements=(*self.movements, movement))

    def read(self) -> Report:
        """Return the report, on the CPU."""
        report = self.make()
        return replace(report, movement=_joined(self.movements)) if self.movements else report


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that work on a device goes to now; None where there are none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def catch_up(stream: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for what this one has to do; who reads a report may be on another than the step."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def settled(report: Report | LaterReport) -> Report:
    """Return the report itself, waiting for the device where it is still there."""
    return report.read() if isinstance(report, LaterReport) else report


def _joined(movements: Sequence[LaterMovement | Movement]) -> Movement | None:
    there = [movement for movement in movements if isinstance(movement, LaterMovement)]
    if not there:  # one judgement makes all of them, on a device or not
        return joined([movement for movement in movements if isinstance(movement, Movement)])
    for movement in there:
        catch_up(movement.stream)
    return Movement(
        inner=torch.cat([movement.inner for movement in there]).sum(0).cpu(),
        square=float(torch.cat([movement.square for movement in there]).sum()),
        corrected=bool(torch.cat([movement.corrected for movement in there]).any()),
        held=bool(torch.cat([movement.held for movement in there]).any()),
    )
