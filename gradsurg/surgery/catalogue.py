"""gradsurg.methods(): the list of surgeries and normalisers, made from their tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gradsurg.normalize import NORMALIZERS
from gradsurg.surgery import SURGERIES

__all__ = ["Method", "methods"]


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: What to pass as surgery= or normalize=.
        kind: "surgery" or "normalizer".
        paper: Who published it, and when.
        promise: What holds on every instance, in one line; of a normaliser, what it does.
        waits: Whether a step on a CUDA device waits once for the host to find the weights (or scales).
        options: Name -> default of each option; an instance with others is passed in the name's place.
    """

    name: str
    kind: str
    paper: str
    promise: str
    waits: bool
    options: dict[str, Any]


def methods() -> list[Method]:
    """Return every method: surgeries first, then normalisers, in the order of the registries.

    Example:
        >>> import gradsurg
        >>> next(method for method in gradsurg.methods() if method.name == "cagrad").options
        {'c': 0.5}
    """
    return [
        *(_method(cls, "surgery", cls.promise) for cls in SURGERIES.values()),
        *(_method(cls, "normalizer", (cls.__doc__ or "").partition("\n")[0]) for cls in NORMALIZERS.values()),
    ]


def _method(cls: Any, kind: str, promise: str) -> Method:
    # Every registered method can be built without arguments, since a name stands for that.
    options = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
    return Method(cls.name, kind, cls.paper, promise, cls.waits, options)
