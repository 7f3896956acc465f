"""DTensors: the numbers of a tensor that are on this rank. For the rest of gradients/ and for distributed/."""

from __future__ import annotations

from torch import Tensor

__all__ = ["local_of", "on_every_rank", "version_of"]


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, and any other tensor as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    shard: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return shard


def version_of(tensor: Tensor) -> int:
    """Return a number that changes with every write to the tensor."""
    # Asked for every p.grad in every step, so the usual case comes first.
    if type(tensor) is Tensor:
        return tensor._version
    # torch._foreach_mul_ (clipping) changes the version of the shard only.
    return tensor._version if not hasattr(tensor, "to_local") else tensor._version + local_of(tensor)._version


def on_every_rank(tensor: Tensor) -> bool:
    """Whether every rank holds some of the tensor's numbers; ⌈n / ranks⌉ on each may leave none for the last."""
    if tensor.numel() == 0:
        return False
    for d, placement in enumerate(getattr(tensor, "placements", ())):
        if not placement.is_replicate():
            size, ranks = tensor.shape[getattr(placement, "dim", 0)], tensor.device_mesh.size(d)  # type: ignore[attr-defined]
            if -(-size // ranks) * (ranks - 1) >= size:
                return False
    return True
