"""Checks of losses and options, for all normalisers, so that their errors read alike."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem

__all__ = ["check_number", "checked_values", "inverse", "losses_of", "per_block"]

# The least scale, in the largest. A row of length 0 constrains nothing, so cone and guarantee would not protect its
# task. 1e-30 vanishes in a float64 sum, and its square times the square of a gradient of 1e-12 does not underflow.
FLOOR = 1e-30


def losses_of(problem: Problem, method: str, *, positive: bool = False) -> Tensor:
    """Return the m losses, shape (m,), float64, finite, and positive if asked; `method` is named in messages.

    Raises:
        ValueError: There are none, one is not finite, or one is not positive; the message names task and value.
    """
    if problem.losses is None:
        raise ValueError(
            f"normalize={method!r} reads the values of the losses, and not all of {list(problem.tasks)} have one: hand "
            "them in with total(losses) or backward(losses) (task() and set_gradients() carry gradients only), "
            "with losses= in gradsurg.weights, or use normalize='norm', which needs none"
        )
    losses = problem.losses.detach().double().to(problem.gramian.device)
    m = len(problem.tasks)
    if losses.shape != (m,):
        raise ValueError(f"losses has shape {tuple(losses.shape)}: pass one number per task, {m} of them")
    for task, value in zip(problem.tasks, losses.tolist(), strict=True):
        if not isfinite(value):
            raise ValueError(f"normalize={method!r}: the loss of task {task!r} is {value!r}, and it must be finite")
        if positive and value <= 0:
            raise ValueError(
                f"normalize={method!r}: the loss of task {task!r} is {value!r}, and this method needs a positive one: "
                "add to the loss what it lacks (its lower bound), or use normalize='norm', which takes any loss"
            )
    return losses


def per_block(problem: Problem, scales: Tensor | Sequence[float]) -> Tensor:
    """Return m scales, nonnegative, as positive ones for every block, (..., m)."""
    scales = torch.as_tensor(scales, dtype=torch.float64, device=problem.gramian.device)
    return torch.maximum(scales, FLOOR * scales.max()).expand(problem.gramian.shape[:-1])


def inverse(values: Tensor) -> Tensor:
    """Return numbers proportional to 1 / values, the largest 1: the reciprocal of 1e-320 would overflow."""
    return values.min() / values


def check_number(
    option: str, value: object, *, above: float = -inf, at_least: float = -inf, below: float = inf, whole: bool = False
) -> None:
    """Raise a ValueError unless above < value < below and at_least ≤ value, and the value is whole if it must be."""
    if not (isinstance(value, numbers.Real) and above < float(value) < below and float(value) >= at_least):
        bounds = [f", above {above:g}"] * (above > -inf) + [f", at least {at_least:g}"] * (at_least > -inf)
        bounds += [f", below {below:g}"] * (below < inf)
        raise ValueError(f"{option}={value!r}: pass a finite number{''.join(bounds)}")
    if whole and not float(value).is_integer():
        raise ValueError(f"{option}={value!r}: pass a whole number")


def checked_values(option: str, values: object, *, above: float = -inf) -> dict[str, float]:
    """Return a copy of a mapping from task name to finite number, or raise a ValueError that names the task."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{option}={values!r}: pass a dict from task name to number, such as {{'depth': 0.5}}")
    for task, value in values.items():
        if not isinstance(task, str):
            raise ValueError(f"{option}[{task!r}]: the keys are task names, such as {{'depth': 0.5}}")
        check_number(f"{option}[{task!r}]", value, above=above)
    return {task: float(value) for task, value in values.items()}
