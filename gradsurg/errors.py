"""The library's own error, errors that list what is valid, and warnings at the user's line; for every room."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

__all__ = ["MultiTaskError", "choose", "unknown_name", "warn"]

T = TypeVar("T")
# What other libraries call a method that is here under another name.
OTHER_NAMES = {"dualproj": "cone", "gem": "cone", "ew": "sum", "uw": "uncertainty", "rlw": "random", "gls": "loss"}
OTHER_NAMES |= {"imtl": "imtlg", "linearscalarization": "sum", "scalarization": "sum", "unitnorm": "norm"}
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
    if isinstance(value, type):
        built = f"{argument}={value.__name__}()"
        raise ValueError(
            f"{argument} is the class {value.__name__}, not {otherwise or 'a name'}: build it, as in {built}"
        )
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
    if not isinstance(value, str):
        return ""
    # "UPGrad" and "Nash_MTL" are other libraries' spellings.
    spelt = {_letters(name): name for name in known}
    alike = _letters(value)
    near = [alike] if alike in spelt else difflib.get_close_matches(OTHER_NAMES.get(alike, alike), list(spelt), n=1)
    return f" Did you mean {spelt[near[0]]!r}?" if near else ""


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower() or name


def warn(message: str) -> None:
    """Warn at the user's line that called gradsurg, past all frames of ours and of torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level += 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
