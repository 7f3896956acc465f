"""The functions of the package that see through the proxies which trainers put around a wrapped optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradsurg.gradients.losses import Computations, Losses
from gradsurg.optimizer.optimizer import MultiTaskOptimizer
from gradsurg.optimizer.report import Report

__all__ = ["backward", "find_wrapped", "report", "total"]


def total(optimizer: Any, losses: Losses, **options: Any) -> Tensor:
    """Call optimizer.total(losses, ...), seeing through the proxies that trainers put around an optimizer.

    Args:
        optimizer: A wrapped optimizer, or what Accelerate, Lightning and the like made of it.
        losses: As for `MultiTaskOptimizer.total`.
        **options: As for `MultiTaskOptimizer.total`.

    Raises:
        TypeError: There is no wrapped optimizer behind it.
        ValueError: As for `MultiTaskOptimizer.total`.

    Example:
        >>> import torch, gradsurg
        >>> class Proxy:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> proxy = Proxy(gradsurg.wrap(torch.optim.SGD([w], lr=0.1)))
        >>> gradsurg.total(proxy, {"a": w[0] ** 2, "b": (w[1] - 3) ** 2}).backward()
        >>> gradsurg.report(proxy).tasks
        ('a', 'b')
    """
    return find_wrapped(optimizer).total(losses, **options)


def backward(optimizer: Any, losses: Losses | Computations, **options: Any) -> None:
    """Call optimizer.backward(losses, ...), seeing through the proxies that trainers put around an optimizer.

    Arguments, errors and example are those of `gradsurg.total`; the `.backward()` at the end is not needed.
    """
    find_wrapped(optimizer).backward(losses, **options)


def report(optimizer: Any) -> Report | None:
    """Return optimizer.report, seeing through the proxies that trainers put around an optimizer.

    Raises:
        TypeError: There is no wrapped optimizer behind it.

    Example: see `gradsurg.total`.
    """
    return find_wrapped(optimizer).report


def find_wrapped(optimizer: Any) -> MultiTaskOptimizer:
    """Follow `.optimizer` and `._optimizer` to the wrapped optimizer (Accelerate, Lightning)."""
    seen: list[Any] = []
    while optimizer is not None and optimizer not in seen:
        if isinstance(optimizer, MultiTaskOptimizer):
            return optimizer
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    raise TypeError(
        f"{type(seen[0]).__name__ if seen else None} is not a wrapped optimizer, nor a proxy around one: call "
        "gradsurg.wrap(optimizer) before handing it to the trainer"
    )
