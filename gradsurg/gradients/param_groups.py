"""Reads an optimizer's parameter groups: trained parameters, their names in reports, and the sign of a descent."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["parameter_names", "rates_of", "signs_of", "trained"]


def parameter_names(optimizers: Iterable[Optimizer]) -> dict[int, str]:
    """Return id of a parameter -> its name.

    An optimizer knows names if it was built from model.named_parameters() (torch 2.6 and later). Otherwise a parameter
    is "parameter k", with k its position among the parameters of all groups.
    """
    names: dict[int, str] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        known = group.get("param_names") or [None] * len(group["params"])
        # Names may come from the checkpoint of another model, so there may be too few or too many.
        for p, name in zip(group["params"], known, strict=False):
            names[id(p)] = name or f"parameter {len(names)}"
    return names


def signs_of(optimizer: Optimizer) -> dict[int, float]:
    """Return id(parameter) -> −1 if the optimizer maximises, else 1; a movement times its sign is a descent."""
    groups = ((group["params"], -1.0 if group.get("maximize") else 1.0) for group in optimizer.param_groups)
    return {id(p): sign for parameters, sign in groups for p in parameters}


def rates_of(optimizer: Optimizer) -> dict[int, float]:
    """Return id(parameter) -> learning rate of its group; 1 for all if rates say nothing about how far a step goes.

    That is so if one is missing, or if all are 0. A rate in a tensor on a device is not read, because reading it would
    wait for the device.
    """
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if not isinstance(rate, (int, float)) and not (isinstance(rate, Tensor) and rate.device.type == "cpu"):
            return dict.fromkeys((id(p) for each in optimizer.param_groups for p in each["params"]), 1.0)
        rates.update(dict.fromkeys(map(id, group["params"]), abs(float(rate))))
    return rates if any(rates.values()) else dict.fromkeys(rates, 1.0)


def trained(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer that require grad. Do not keep the list: trainers replace parameters."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
