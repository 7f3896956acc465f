"""Adam on Python floats, for normalisers that learn one number per task; a state dict keeps them to the bit."""

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

    Every task counts its own steps, so that a task that was absent goes on with its own memory. Adam's steps are about
    `rate` long whatever the scale of the loss. With plain gradient steps a first loss of 1e5 would throw a log-variance
    so far that exp(−s) underflows, and it would never come back.
    """
    gradient = gradient + decay * memory["value"]
    steps = memory["steps"] + 1
    first = BETAS[0] * memory["first"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * memory["second"] + (1 - BETAS[1]) * gradient * gradient
    # Both averages start at 0, which 1 − β^steps makes up for.
    length = sqrt(second / (1 - BETAS[1] ** steps)) + EPSILON
    value = memory["value"] - rate * first / (1 - BETAS[0] ** steps) / length
    return {"value": value, "first": first, "second": second, "steps": steps}
