"""The library's own error, errors that list what is valid, and warnings at the user's line; for every room."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

__all__ = ["MultiTaskError", "choose", "unknown_name", "warn"]

T = TypeVar("T")
# torch's frames lie between the user's line and ours too: hooks around step(), autograd, torch.compiler.disable.
_OURS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__))


class MultiTaskError(RuntimeError):
    """A step on several losses is impossible; the message says why, and what to change.

    Parameters, p.grad and the optimizer's state are as before the call that raised it, and the next step works.

    Example:
        >>> import torch, gradsurg
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), nonfinite="raise")
        >>> try:
        ...     optimizer.total({"a": w.sum(), "b": w.sum() * float("nan")}).backward()
        ... except gradsurg.MultiTaskError as error:
        ...     print(str(error).partition(".")[0])
        the losses or gradients of 'b' are not finite
    """


def choose(argument: str, value: object, choices: Mapping[str, T], otherwise: str = "") -> T:
    """Return choices[value], or raise a ValueError that lists the valid names and the nearest one."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    valid = ", ".join(map(repr, choices))
    or_else = f", or {otherwise}" if otherwise else ""
    raise ValueError(f"{argument}={value!r} is not known: use one of {valid}{or_else}.{_nearest(value, choices)}")


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not the name of a task."""
    known = list(known)
    return ValueError(
        f"{argument} names the task {name!r}, but the tasks are {known}.{_nearest(str(name), known)} "
        "A task that comes later can be declared: wrap(..., tasks=[...])."
    )


def _nearest(value: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def warn(message: str) -> None:
    """Warn at the user's line that called gradsurg, past all frames of ours and of torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level += 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
