"""Numbers that a normaliser learns, one per task: Adam on plain floats, so that a state dict keeps them to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

__all__ = ["descended", "unlearned"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def unlearned(value: float) -> dict[str, Any]:
    """Return the memory of a number that no step has touched."""
    return {"value": value, "first": 0.0, "second": 0.0, "steps": 0}


def descended(memory: Mapping[str, Any], gradient: float, *, rate: float, decay: float = 0.0) -> dict[str, Any]:
    """Return the memory after one step of Adam (Kingma & Ba 2015, algorithm 1), decay added to the gradient.

    Every task counts its own steps, so one that was away goes on where it was. Adam, because its steps are about
    `rate` long whatever the scale of the loss: a plain gradient step on a log-variance would be thrown to where
    exp(−s) underflows by a first loss of 1e5, and never come back.
    """
    gradient = gradient + decay * memory["value"]
    steps = memory["steps"] + 1
    first = BETAS[0] * memory["first"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * memory["second"] + (1 - BETAS[1]) * gradient * gradient
    length = sqrt(second / (1 - BETAS[1] ** steps)) + EPSILON
    value = memory["value"] - rate * first / (1 - BETAS[0] ** steps) / length
    return {"value": value, "first": first, "second": second, "steps": steps}
