"""Tables of pointers and of work items on the device, for all launchers of this folder.

Gradients stay where autograd put them. A kernel gets a table of addresses, one row per parameter, and a table of items.
An item is a piece of one parameter, and the work of one program. The two tables are cached separately, because
addresses change when memory is allocated anew and sizes don't. Nothing here waits for the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.linalg.blocks import Block, flat_column
from gradsurg.linalg.buffers import may_be_kept
from gradsurg.linalg.kernels.dispatch import vector
from gradsurg.linalg.kernels.usual import Shape, usual_of

__all__ = ["FIELDS", "Launch", "Plan", "chunk_for", "constant", "device_of", "launches_for", "on_device", "plan"]

T = TypeVar("T")

# Fields of an item: parameter, first element, number of elements, slot of its partial sums, partition, sign.
FIELDS = 6
# The range of an item's size. Larger items have fewer partial sums: 36 float64 numbers beside 8 rows of 65 536 float32,
# at m = 8, are 0.01 % of the traffic. Smaller items keep a whole card busy with fewer parameters: the least size gives
# 1 M parameters 244 programs, and its partial sums are 0.2 % of the traffic.
CHUNK_LEAST, CHUNK_MOST = 4096, 65_536
# From here on the largest pieces still give each of 132 processors (an H100) eight programs.
CHUNK_TARGET_PROGRAMS = 1056
# The number of tables that are kept before the oldest one is dropped. A step needs six for its passes and a dozen
# constants, and a second model as many again.
KEPT = 128
# The most addresses in all tables that are made while CUDA graphs are captured: 1 MiB of pinned memory, enough for 40
# graphs of a model with 400 parameters and 8 tasks.
RESERVE = 131_072


@dataclass(frozen=True)
class Launch:
    """The items of one kernel launch, all of the same dtypes and alignment."""

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    items: Tensor  # int64 (n, FIELDS)

    @property
    def vector(self) -> int:
        """How many elements one thread loads at once."""
        return vector(self.dtypes, self.aligned)


@dataclass(frozen=True)
class Plan:
    """The tables of one pass over the gradients.

    Attributes:
        pointers: Addresses, int64 (parameters, width); 0 for a missing tensor.
        width: Number of addresses per parameter.
        launches: The items, one launch for each combination of dtypes and alignment.
        slots: Number of items of all launches.
        bounds: First slot of each partition and the end, int64 (partitions + 1,).
        partitions: Number of partitions.
        keep: The tensors that the addresses point to, some of them copies; they must outlive the launches.
    """

    pointers: Tensor
    width: int
    launches: tuple[Launch, ...]
    slots: int
    bounds: Tensor
    partitions: int
    keep: tuple[Block, ...]


def plan(
    lists: Sequence[Sequence[Tensor | None]],
    *,
    partitions: Sequence[int] | None = None,
    signs: Sequence[float] | None = None,
    roles: Sequence[int] | None = None,
) -> Plan:
    """Lay out one pass over parallel lists of tensors.

    Args:
        lists: `width` lists of one tensor or None per parameter, of equal shapes. Tensors that are contiguous, or
            dense with equal strides, are read in place; others are copied.
        partitions: The partition that each parameter belongs to, ascending from 0; None is one partition.
        signs: +1 or −1 per parameter; None is +1.
        roles: The number of each list's role; None is one role. Lists of one role share a dtype, and a launch has one
            dtype per role. A tensor whose dtype differs from the first one of its role is copied.

    Returns:
        The tables. A parameter without elements, or that no list has, has no items.
    """
    width = len(lists)
    roles = [0] * width if roles is None else roles
    device = device_of(lists)
    count = 1 + (partitions[-1] if partitions else 0)
    usual = usual_of(lists, roles)
    if usual is not None:
        key = (usual.dtypes, usual.sizes, None if partitions is None else tuple(partitions), signs and tuple(signs))
        launches, slots, bounds = _cached(
            (device, count, key), device, lambda: _items(usual.shapes(partitions, signs), count, device)
        )
        pointers = _pointers(usual.addresses(), width, device)
        return Plan(pointers, width, launches, slots, bounds, count, tuple(map(list, zip(*lists, strict=True))))
    columns, addresses, shapes = [], [], []
    for k, column in enumerate(zip(*lists, strict=True)):
        # The flat view of a[:, ::2] has a stride, but kernels read neighbours.
        flat = [None if t is None else t.contiguous() for t in flat_column(column)]
        flat, dtypes = _one_dtype_per_role(flat, roles)
        columns.append(flat)
        here = [0 if t is None else t.data_ptr() for t in flat]
        addresses.extend(here)
        aligned = all(address % 16 == 0 for address in here)
        size = next((t.numel() for t in flat if t is not None), 0)
        sign = 1 if signs is None else int(signs[k])
        shapes.append((dtypes, aligned, size, 0 if partitions is None else partitions[k], sign))
    launches, slots, bounds = _cached((device, count, tuple(shapes)), device, lambda: _items(shapes, count, device))
    return Plan(_pointers(addresses, width, device), width, launches, slots, bounds, count, tuple(columns))


def _pointers(addresses: list[int], width: int, device: torch.device) -> Tensor:
    return _cached(
        (device, width, tuple(addresses)), device, lambda: _upload(addresses, device).view(-1, width), fleeting=True
    )


def chunk_for(total: int) -> int:
    """Return how many elements an item holds; it depends on nothing else, so that sums are equal on every card."""
    chunk = CHUNK_LEAST
    while chunk < CHUNK_MOST and total >= 2 * chunk * CHUNK_TARGET_PROGRAMS:
        chunk *= 2
    return chunk


def launches_for(sizes: Sequence[int], chunk: int) -> list[tuple[int, int, int]]:
    """Return (parameter, first element, number of elements) of all items, in order."""
    return [(k, first, min(chunk, size - first)) for k, size in enumerate(sizes) for first in range(0, size, chunk)]


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the numbers as a 1-D tensor on the device, uploaded once; it must not be written to.

    torch.tensor(values, device="cuda") copies from memory that is not pinned, and so waits for everything launched.
    """
    return _cached((device, dtype, tuple(values)), device, lambda: _upload(list(values), device, dtype))


def device_of(lists: Sequence[Sequence[Tensor | None]]) -> torch.device:
    """Return the device of the first tensor; the CPU if there is none."""
    return next((t.device for one in lists for t in one if t is not None), torch.device("cpu"))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that launches kernels on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Autograd has a thread of its own for each device, and two optimizers may step at the same time.
_lock = threading.RLock()
_tables: OrderedDict[tuple[Hashable, int], object] = OrderedDict()
# Tables that captured CUDA graphs read. They are kept for good, since we can't know how long a graph lives.
_captured: list[object] = []
_reserve: list[Tensor] = []


def _cached(key: Hashable, device: torch.device, make: Callable[[], T], fleeting: bool = False) -> T:
    """Return the table that `make` made for this key on this stream; a `fleeting` one is made anew in a capture."""
    capturing = _is_capturing(device)
    # The upload runs on the current stream, and work on another one would not wait for it.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        return _found((key, stream), make, capturing, fleeting)


def _found(key: tuple[Hashable, int], make: Callable[[], T], capturing: bool, fleeting: bool) -> T:
    found = _tables.get(key)
    if capturing and not fleeting and found is None:
        # torch.cuda.graph waits for the device and captures on a stream of its own: what other streams uploaded is
        # there. Made anew, the items of one large model would take most of the reserve.
        found = next((table for (kind, _), table in _tables.items() if kind == key[0]), None)
        if found is not None:
            _tables[key] = found
    if found is not None and not (capturing and fleeting):
        _tables.move_to_end(key)
    elif capturing:
        # Nothing runs in a capture. The table is filled when the graph is replayed, so no other step may use it.
        found = make()
    else:
        found = make()
        if may_be_kept(torch.empty(0)):
            _tables[key] = found
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    if capturing:
        _captured.append(found)
    return found  # type: ignore[return-value]


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured; torch tells it for the current device only."""
    with on_device(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    if not _reserve:
        with torch.inference_mode(False):
            _reserve.append(torch.empty(RESERVE, dtype=torch.int64).pin_memory())
    capturing = _is_capturing(device)
    host = _from_reserve(host) if capturing else host.pin_memory()
    return host.to(device, non_blocking=True)


def _from_reserve(host: Tensor) -> Tensor:
    """Move the numbers to pinned memory that is never written again, because a replayed graph copies from there."""
    left = _reserve[0]
    # In units of an address, for numbers of any dtype.
    size = -(-host.numel() * host.itemsize // left.itemsize)
    if size > left.numel():
        raise MultiTaskError(
            f"the CUDA graphs captured so far and this one need more than {RESERVE} addresses of gradients: capture "
            "fewer graphs, or raise gradsurg.linalg.kernels.table.RESERVE before the first step"
        )
    taken, _reserve[0] = left[:size], left[size:]
    return taken.view(host.dtype)[: host.numel()].copy_(host)


def _items(shapes: Sequence[Shape], partitions: int, device: torch.device) -> tuple[tuple[Launch, ...], int, Tensor]:
    pieces = launches_for([shape[2] for shape in shapes], chunk_for(sum(shape[2] for shape in shapes)))
    items: dict[tuple[tuple[torch.dtype, ...], bool], list[int]] = {}
    counts = [0] * partitions
    for slot, (k, first, count) in enumerate(pieces):
        dtypes, aligned, _, partition, sign = shapes[k]
        items.setdefault((dtypes, aligned), []).extend((k, first, count, slot, partition, sign))
        counts[partition] += 1
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    launches = tuple(
        Launch(dtypes, aligned, _upload(values, device).view(-1, FIELDS)) for (dtypes, aligned), values in items.items()
    )
    return launches, len(pieces), _upload(bounds, device)


def _one_dtype_per_role(flat: Block, roles: Sequence[int]) -> tuple[Block, tuple[torch.dtype, ...]]:
    """Return the tensors in the widest dtype of their role, and these dtypes."""
    wide: dict[int, torch.dtype] = {}
    for t, role in zip(flat, roles, strict=True):
        if t is not None and t.dtype != (known := wide.setdefault(role, t.dtype)):
            wide[role] = torch.promote_types(known, t.dtype)
    # A kernel is compiled for one dtype per role: a role without a tensor here takes another role's.
    dtypes = tuple(wide.get(role, next(iter(wide.values()))) for role in range(max(roles) + 1)) if wide else ()
    if any(t is not None and t.dtype != wide[role] for t, role in zip(flat, roles, strict=True)):
        flat = [None if t is None else t.to(wide[role]) for t, role in zip(flat, roles, strict=True)]
    return flat, dtypes
