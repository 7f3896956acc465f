"""What the parameters did in one step, measured on the host or left on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DeferredMovement", "Movement", "catch_up", "joined", "stream_of"]


def joined(movements: Sequence[Movement]) -> Movement | None:
    """Return the movement of several sets of parameters taken together, or None where there is none."""
    if len(movements) <= 1:
        return movements[0] if movements else None
    return Movement(
        inner=torch.stack([movement.inner for movement in movements]).sum(0),
        square=sum(movement.square for movement in movements),
        corrected=any(movement.corrected for movement in movements),
        held=any(movement.held for movement in movements),
    )


@dataclass(frozen=True)
class Movement:
    """What the parameters did in one step, d = before − after (sign turned where the optimizer maximises).

    Attributes:
        inner: ⟨d, g_i⟩, shape (m,), float64.
        square: ‖d‖².
        corrected: Whether d had to be projected.
        held: Whether d was set to 0, because nothing else satisfies every task within rounding.
    """

    inner: Tensor
    square: float
    corrected: bool = False
    held: bool = False


@dataclass(frozen=True)
class DeferredMovement:
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


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that work on a device goes to now; None where there are none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def catch_up(stream: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for what this one has to do; who reads a report may be on another than the step."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
