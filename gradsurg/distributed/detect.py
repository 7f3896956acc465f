"""Finding out how the parameters are spread over ranks, at the start of every run.

The layouts are imported only if there are several ranks: some builds of torch come without torch.distributed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsurg.distributed.collectives import Group, fingerprint
from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.distributed.modules import modules_of, refuse_fsdp1
from gradsurg.errors import MultiTaskError

__all__ = ["Ranks", "several_ranks"]


def several_ranks() -> bool:
    """Whether torch.distributed is initialised with more than one rank."""
    return _is_initialized() and torch.distributed.get_world_size() > 1


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Ranks:
    """Finds the layout, and keeps it while the parameters stay the same objects.

    The `model=` of wrap() is held weakly; if it is None, the process is searched. `options` returns those that have to
    be the same on all ranks, as text.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        whole_rows: bool = False,
        options: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._whole_rows, self._options = whole_rows, options
        self._model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)
        self._layout: Layout | None = None
        self._key: tuple[int, ...] = ()
        self._group: Any = None
        self._early: list[Any] = []

    def know_early(self, parameters: Sequence[Tensor]) -> None:
        """Register hooks before the first forward pass, if this torch has no other way."""
        if several_ranks():
            from gradsurg.distributed import ddp_reducer as reducer

            if not hasattr(torch._C._distributed_c10d.Reducer, reducer.RESET):
                self._early = self._replicas(parameters)

    def layout(self, of: Callable[[], Sequence[Tensor]]) -> Layout:
        """Return how the parameters are spread that `of` returns; it is not called in one process.

        Raises:
            MultiTaskError: There are several ranks, and nothing keeps their parameters equal, or it is not supported.
        """
        parameters = of() if _is_initialized() else ()
        if not parameters or (not several_ranks() and not _is_sharded(parameters)):
            self._layout, self._key = None, ()
            return ALONE
        key, group = tuple(map(id, parameters)), torch.distributed.group.WORLD
        gone = any(not replica.alive for replica in getattr(self._layout, "replicas", ()))
        if self._layout is None or key != self._key or group is not self._group or gone:
            # This searches the process, so only if something is new: parameters, the group, or a module is gone.
            layout = self._find(parameters)
            _compare_options(layout.group, self._options())
            self._layout, self._key, self._group = layout, key, group
        return self._layout

    def _find(self, parameters: Sequence[Tensor]) -> Layout:
        if _is_sharded(parameters):
            from gradsurg.distributed.fsdp import ShardedLayout

            return ShardedLayout(parameters, self._model(), self._options())
        from gradsurg.distributed.ddp import DDPLayout, DDPWholeLayout

        replicas = self._early or self._replicas(parameters)
        if not replicas:
            refuse_fsdp1(parameters, self._model())
            inside = "" if self._model() is None else " inside the module given as model="
            raise MultiTaskError(
                f"{torch.distributed.get_world_size()} ranks are initialised, but no DistributedDataParallel module"
                f"{inside} owns these parameters, and they are not sharded: every rank would train alone. Build "
                "DistributedDataParallel(model) (and pass it as wrap(..., model=ddp) if it cannot be found), or "
                "fully_shard(model) before the optimizer."
            )
        # Two groups would need two sums, and no rank of one knows what those of the other do.
        groups = {id(replica.module.process_group): replica.module.process_group for replica in replicas}
        if len(groups) > 1:
            raise MultiTaskError(
                f"{len(replicas)} DistributedDataParallel modules own these parameters, in {len(groups)} process "
                "groups: build them with one and the same process_group"
            )
        ids = {id(p) for p in parameters}
        for replica in replicas:
            for name, p in replica.ignored().items():
                if id(p) in ids:
                    raise MultiTaskError(
                        f"DistributedDataParallel was told to ignore the parameter {name!r}, but this optimizer trains "
                        "it: ranks would disagree about the tasks. Leave it to another optimizer."
                    )
        (group,) = groups.values()
        kind = DDPWholeLayout if self._whole_rows else DDPLayout
        return kind(parameters, replicas, Group(group, parameters[0].device), self._options())

    def _replicas(self, parameters: Sequence[Tensor]) -> list[Any]:
        from torch.nn.parallel import DistributedDataParallel

        from gradsurg.distributed.ddp_reducer import Replica

        position = {id(p): k for k, p in enumerate(parameters)}

        def first(module: nn.Module) -> int:
            return min((position.get(id(p), len(position)) for p in module.parameters()), default=len(position))

        # In the order of their parameters: that of the garbage collector differs from rank to rank.
        found = modules_of(DistributedDataParallel, parameters, self._model())
        return [Replica(module) for module in sorted(found, key=first)]


def _compare_options(group: Group | None, options: Mapping[str, str]) -> None:
    """Raise an error on all ranks if their options differ: these decide which questions the ranks ask each other."""
    if group is not None and group.size > 1:
        heard = group.gather(torch.tensor(fingerprint(sorted(options.items()))))
        if bool((heard != heard[0]).any()):
            group.refuse_other_options(options, ())


def _is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether there are DTensors; a single rank may have them too, on a mesh of its own."""
    if not _is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in parameters)
