"""Errors that teach: what was given, what would have been right."""

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
# Between the user's line and ours lie torch's frames too: hooks around step(), autograd, torch.compiler.disable.
_OURS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__))


class MultiTaskError(RuntimeError):
    """A step of several losses that cannot be done; the message says why and what to change.

    Parameters, p.grad and the optimizer's state are as before the call that raised it, and the next step works.

    Example:
        >>> import torch, gradsurg
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), nonfinite="raise")
        >>> try:
        ...     optimizer.total({"a": w.sum(), "b": w.sum() * float("nan")}).backward()
        ... except gradsurg.MultiTaskError as error:
        ...     print(str(error).partition(".")[0])
        the gradients of 'b' are not finite
    """


def choose(argument: str, value: object, choices: Mapping[str, T], otherwise: str = "") -> T:
    """Return choices[value], or raise a ValueError that lists the valid names and the nearest one."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    valid = ", ".join(repr(name) for name in choices)
    near = difflib.get_close_matches(value, list(choices), n=1) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    or_else = f", or {otherwise}" if otherwise else ""
    raise ValueError(f"{argument}={value!r} is not known: use one of {valid}{or_else}.{hint}")


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """Return the error for a task name that nobody has."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(
        f"{argument} names the task {name!r}, but the tasks are {known}.{hint} "
        "A task that comes later can be declared: wrap(..., tasks=[...])."
    )


def warn(message: str) -> None:
    """Warn at the line that called gradsurg, however many frames of ours and of torch lie between."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level += 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
