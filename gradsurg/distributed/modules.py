"""Finding the modules that synchronise an optimizer's parameters, and refusing those that gradsurg cannot work with."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsurg.errors import MultiTaskError

__all__ = ["check_model", "modules_of", "refuse_fsdp1", "refuse_optimizer"]


def modules_of(kind: type, parameters: Iterable[Tensor], model: nn.Module | None) -> list[Any]:
    """Return the modules of a kind that own some of the parameters: inside `model`, or else anywhere in the process.

    The process is searched through the garbage collector's list, which takes 50 ms per million objects; callers keep
    the result.
    """
    if model is not None:
        # A compiled module holds the original as a submodule, so modules() also finds a DDP module inside it.
        return [module for module in model.modules() if issubclass(type(module), kind)]
    ids = {id(p) for p in parameters}
    # By type(): isinstance() asks proxies for their __class__, and some proxies import a package to answer.
    candidates = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    return [module for module in candidates if any(id(p) in ids for p in module.parameters())]


def refuse_optimizer(optimizer: object) -> None:
    """Refuse optimizers that shard themselves (ZeRO)."""
    # By name: DeepSpeed need not be installed, and ZeRO's module is not imported for nothing.
    for each in type(optimizer).__mro__:
        if each.__name__ == "ZeroRedundancyOptimizer" or each.__module__.split(".")[0] == "deepspeed":
            raise TypeError(
                f"wrap() was given a {type(optimizer).__name__}: {each.__name__} keeps a part of the optimizer's state "
                "on each rank, and its step() trains only that part, so the update cannot be held to what the tasks "
                "want. Shard parameters, gradients and state together with FSDP2 instead: "
                "torch.distributed.fsdp.fully_shard(model), then wrap(torch.optim.AdamW(model.parameters()))"
            )


def refuse_fsdp1(parameters: Sequence[Tensor], model: nn.Module | None) -> None:
    """Refuse FSDP1, whose flat parameters are gone after one backward pass."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(getattr(p, "_is_flat_param", False) for p in parameters) or modules_of(
        FullyShardedDataParallel, parameters, model
    ):
        raise MultiTaskError(
            "the parameters belong to FullyShardedDataParallel (FSDP1), which frees them after the first backward pass "
            "of a step, and surgery makes one per task: use FSDP2, torch.distributed.fsdp.fully_shard(model), on every "
            "block and then on the model"
        )


def check_model(model: object) -> nn.Module | None:
    """Return `model=` if a synchronised module can be found in it; refuse anything else."""
    if model is None:
        return None
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: pass the module that trains on several ranks, "
            "DistributedDataParallel(model) or one that fully_shard was applied to, or leave it out"
        )
    if torch.distributed.is_available():
        refuse_fsdp1((), model)
    return model
