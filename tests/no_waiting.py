"""On the CPU, what would make a CUDA program wait for its device: noticed where gradsurg itself asks for it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurg

__all__ = ["WaitError", "no_waiting"]

HOME = str(Path(gradsurg.__file__).parent)
# Where the optimizer itself reads its step count, and where the interpreter stands in for the device.
OTHERS = (f"{Path(torch.__file__).parent / 'optim'}", f"{Path('site-packages') / 'triton'}")
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}
# tolist and numpy read memory without an operation that a mode could see; on the CPU, cpu() is none at all.
METHODS = ("tolist", "numpy", "cpu")


class WaitError(AssertionError):
    """The library read something back from the device."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "overloadpacket", func)
        by_mask = packet in BY_INDEX and any(t is not None and t.dtype == torch.bool for t in args[1])
        if packet in READS or by_mask:
            refuse(str(packet))
        return func(*args, **(kwargs or {}))


def refuse(what):
    """Raise where the innermost code that is neither torch's nor a test's is gradsurg's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(other in name for other in OTHERS):
            return
        if name.startswith(HOME):
            raise WaitError(f"{what} in {name}:{frame.f_lineno}")
        frame = frame.f_back


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise `WaitError` where gradsurg reads a number, a truth value, or a count that depends on numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            patch.setattr(torch.Tensor, method, _refusing(method, getattr(torch.Tensor, method)))
        with _Watch():
            yield


def _refusing(name, method):
    def asked(self, *args, **kwargs):
        refuse(name)
        return method(self, *args, **kwargs)

    return asked
