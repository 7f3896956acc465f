"""The movement of the parameters in one step, as numbers on the host or still on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DeferredMovement", "Movement", "catch_up", "joined", "stream_of"]


def joined(movements: Sequence[Movement]) -> Movement | None:
    """Return the movement of several sets of parameters taken together; None if there is none."""
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
    """The movement of the parameters in one step, d = before − after, or after − before if the optimizer maximises.

    Attributes:
        inner: ⟨d, g_i⟩, shape (m,), float64.
        square: ‖d‖².
        corrected: Whether d had to be projected.
        held: Whether d was set to 0, because no other movement satisfies every task within rounding.
    """

    inner: Tensor
    square: float
    corrected: bool = False
    held: bool = False


@dataclass(frozen=True)
class DeferredMovement:
    """The movements of several partitions of the parameters, on the device.

    Attributes:
        inner: ⟨d, g_i⟩, shape (partitions, m), float64.
        square: ‖d‖², shape (partitions,), float64.
        corrected: Bool, shape (partitions,).
        held: Bool, shape (partitions,).
        stream: The CUDA stream on which they are computed.
    """

    inner: Tensor
    square: Tensor
    corrected: Tensor
    held: Tensor
    stream: torch.cuda.Stream | None = None


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """Return the current stream of a device; None if the device has no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def catch_up(stream: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for this one: a report may be read on another stream than the step ran on."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
