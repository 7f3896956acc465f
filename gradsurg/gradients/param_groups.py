"""What parameters are called in reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    pass

__all__ = ["parameter_names", "signs_of", "trained"]


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


def signs_of(optimizer: Optimizer) -> dict[int, float]:
    """Return by id(parameter) what turns its movement into a descent: −1 where the optimizer maximises, else 1."""
    signs: dict[int, float] = {}
    for group in optimizer.param_groups:
        signs.update(dict.fromkeys(map(id, group["params"]), -1.0 if group.get("maximize") else 1.0))
    return signs


def trained(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer that require grad; never to be kept: trainers replace them."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
