"""Hooks that step an optimizer in the middle of a backward pass, which leave nothing to do surgery on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from gradsurg.errors import MultiTaskError

__all__ = ["hooked_among", "refusing_steps_in_backward"]


def hooked_among(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters with a hook of register_post_accumulate_grad_hook."""
    # The attribute is private, and None without hooks; without it, the error stays the one that torch has.
    return [p for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)]


def refusing_steps_in_backward(hooked: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Refuse hooks of register_post_accumulate_grad_hook that change their parameter, one of these, in this block.

    One that only looks is welcome: it runs once a task, and sees that task's gradient. One that steps has used up the
    first task's gradient before the second is there. torch notices only where the next task's graph still needs the
    old numbers, and says something about an inplace operation.

    Raises:
        MultiTaskError: A parameter with such a hook has changed.
    """
    return _refusing(hooked) if hooked else nullcontext()


@contextmanager
def _refusing(hooked: Sequence[Tensor]) -> Iterator[None]:
    versions = [(p, p._version) for p in hooked]
    try:
        yield
    except BaseException as error:
        _check(versions, error)
        raise
    _check(versions, None)


def _check(hooked: Sequence[tuple[Tensor, int]], cause: BaseException | None) -> None:
    stepped = [p for p, version in hooked if p._version != version]
    if stepped:
        raise MultiTaskError(
            f"a hook of register_post_accumulate_grad_hook changed {len(stepped)} of the optimizer's parameters (the "
            f"first of shape {tuple(stepped[0].shape)}) during backward, as an optimizer in the backward pass does: "
            "by then only one task's gradient is known, so there is no surgery, and no step that hurts nobody. Remove "
            "the hook and call step() after backward. p.grad is as before, the parameters are as the hook left them."
        ) from cause
