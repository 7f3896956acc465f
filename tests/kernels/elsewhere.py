"""A stand-in for a device without kernels of ours: torch's own operations run there, and nothing may be mixed.

A tensor of it says that it is on torch's meta device, and holds its numbers on the CPU. As on a card, an operation that
is given a tensor of the CPU too is an error, unless that is a single number. `Elsewhere.reads` counts how often a
number was read back, which on a card means to wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["DEVICE", "Elsewhere", "There"]

DEVICE = torch.device("meta")
aten = torch.ops.aten
# These move numbers between devices; an index may be on the CPU.
MOVES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}


class There(Tensor):
    """A tensor of the stand-in."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        self = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        self.numbers = numbers
        return self

    def tolist(self) -> Any:
        """Read all numbers; torch's own method refuses subclasses."""
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} ran outside of Elsewhere")


# The library leaves parameters of foreign classes alone.
There.__module__ = "torch"


class Elsewhere(TorchDispatchMode):
    """While it is active, there is a device of the name "meta" that holds numbers."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        there = any(isinstance(t, There) for t in given)
        asked = kwargs.get("device")
        to_there = there if asked is None else torch.device(asked) == DEVICE
        if there and func not in MOVES:
            strangers = [t for t in given if not isinstance(t, There) and t.dim() > 0]
            if strangers:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} got one of the CPU")
        if there and (func in READS or (func is aten._to_copy.default and not to_there)):
            self.reads += 1
        if asked is not None and to_there:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        changed = {id(t.numbers): t for t in given if isinstance(t, There)}

        def outside(t: Any) -> Any:
            if not isinstance(t, Tensor) or isinstance(t, There):
                return t
            if not to_there:
                return t
            return changed[id(t)] if id(t) in changed else There(t)

        if func is aten.copy_.default:
            return args[0]
        return tree_map(outside, result)


def inside(t: Any) -> Any:
    return t.numbers if isinstance(t, There) else t
