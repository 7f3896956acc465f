"""Refuses hooks that step an optimizer during a backward pass, since they leave no gradients for surgery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from gradsurg.errors import MultiTaskError

__all__ = ["hooked_among", "refusing_steps_in_backward"]


def hooked_among(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that have a hook of register_post_accumulate_grad_hook."""
    # The attribute is private, and None without hooks. If torch drops it, the user gets torch's error instead of ours.
    return [p for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)]


@contextmanager
def refusing_steps_in_backward(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Raise a MultiTaskError if a hook of register_post_accumulate_grad_hook changes its parameter in this block.

    A hook that only reads is fine: it runs once per task and sees the task's gradient. A hook that steps uses up the
    first task's gradient before the second exists. torch notices this only if the next task's graph still needs the
    old numbers, and then reports an inplace operation.
    """
    versions = [(p, p._version) for p in hooked_among(parameters)]
    cause: BaseException | None = None
    try:
        yield
    except BaseException as error:
        cause = error
        raise
    finally:
        stepped = [p for p, version in versions if p._version != version]
        if stepped:
            raise MultiTaskError(
                f"a hook of register_post_accumulate_grad_hook changed {len(stepped)} of the optimizer's parameters "
                f"(the first of shape {tuple(stepped[0].shape)}) during backward, as an optimizer in the backward pass "
                "does: then only one task's gradient is known, so there can be no surgery. Remove the hook and call "
                "step() after backward. p.grad is as before, the parameters are as the hook left them."
            ) from cause
