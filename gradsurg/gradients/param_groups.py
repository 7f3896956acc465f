"""What parameters are called in reports."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

__all__ = ["parameter_names"]


def parameter_names(optimizers: Iterable[Optimizer]) -> dict[int, str]:
    """Return id of a parameter -> its name.

    An optimizer knows names where it was built from model.named_parameters() (torch 2.6 and later); otherwise a
    parameter is "parameter k", k its place among the parameters of all groups.
    """
    names: dict[int, str] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        known = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], known, strict=False):  # names may come from a checkpoint of another model
            names[id(p)] = name or f"parameter {len(names)}"
    return names
