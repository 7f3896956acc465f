"""torch.compile: makes compiled graphs safe for several backward passes, and refuses those that are not.

Compiled backward code may overwrite the activations that it reads ("donated buffers"). That is right for a graph that
runs once, and ruins the graph for the second task. torch does not always refuse it: the flag is not part of the key of
the on-disk cache, so the compiled code found there may be of the wrong kind. The other tasks' gradients are then wrong
without any error.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.graph import walk

__all__ = [
    "Watch",
    "advise",
    "anything_compiled",
    "graph_is_kept",
    "in_compiled_autograd",
    "noticing_kept_graphs",
    "outside_compilation",
    "prepare_compile",
]

F = TypeVar("F", bound=Callable[..., Any])
TAG = "gradsurg"
ADVICE = (
    "Call gradsurg.prepare_compile() once, at the start of the program. Do not set "
    "torch._functorch.config.donated_buffer instead: with a warm on-disk cache the gradients are then silently wrong."
)
# Compiled graphs that were seen not to overwrite what they keep, by class: torch makes one class per compilation.
_SOUND: weakref.WeakSet[type] = weakref.WeakSet()


def prepare_compile() -> None:
    """Make torch.compile safe for several backward passes through one graph; call it once, before anything else.

    It switches off donated buffers and forgets what this process has compiled so far. It also gives this program's code
    its own key in the on-disk cache, which may hold code with donated buffers. A second call changes nothing.

    When it fails: code that was compiled ahead of time and is loaded without torch.compile stays as it is. A step
    through such a graph is refused if the graph overwrites what it should keep.

    Example:
        >>> import gradsurg
        >>> gradsurg.prepare_compile()
    """
    if _is_prepared():
        return
    import torch._dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    # Since torch 2.6.
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False
        tags = _tags()
        if tags is None:
            # This option is part of the cache's key, and rules out the only use of donated buffers.
            inductor.inplace_buffers = False  # type: ignore[attr-defined, unused-ignore]
        else:
            tags.cache_key_tag = f"{tags.cache_key_tag}{TAG}"
    torch._dynamo.reset()  # type: ignore[no-untyped-call, unused-ignore]


def anything_compiled() -> bool:
    """Whether torch.compile has made a function with a backward pass in this process."""
    return bool(_compiled_functions())


@functools.cache
def outside_compilation(function: F) -> F:
    """Return the function, excluded from torch.compile. Not for use at import, which it would slow down.

    Tracing our functions would gain nothing, since every backward pass breaks the graph; it took a minute for one small
    model. Functions that autograd calls need this too: compiled autograd traces them.
    """
    reason = (
        "gradsurg runs backward passes of its own, which cannot be traced: return the losses from the compiled "
        "function, and call total(), backward(), task() and step() outside of it"
    )
    # Since torch 2.7.
    known = "reason" in inspect.signature(torch.compiler.disable).parameters
    return cast(F, torch.compiler.disable(function, **({"reason": reason} if known else {})))


class Watch:
    """Refuses a backward pass that overwrites what its compiled graph keeps for the next one.

    It is built before the first backward pass, and takes a checksum of every tensor that a compiled graph saved;
    `check` compares after each pass. Each compiled graph is watched once, and a program that compiles nothing pays
    nothing. Repeating the first backward pass after the last one would not be enough: it would miss a graph that
    overwrites only what the first loss does not need.
    """

    def __init__(self, losses: Iterable[Tensor]) -> None:
        self._nodes: dict[Tensor, list[Any]] = {}
        self._sums: dict[Any, Tensor] = {}
        if all(function in _SOUND for function in _compiled_functions()):
            return
        for loss in losses:
            compiled = (node for node in walk([loss.grad_fn])[0] if type(node).__name__ == "CompiledFunctionBackward")
            self._nodes[loss] = [node for node in compiled if _function_of(node) not in _SOUND]
            for node in self._nodes[loss]:
                if node not in self._sums:
                    self._sums[node] = _checksums(node)

    @property
    def active(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._nodes)

    def check(self, loss: Tensor, label: str) -> None:
        """Raise a MultiTaskError if the backward pass of a loss overwrote something that its graph keeps."""
        for node in self._nodes.get(loss, ()):
            now, before = _checksums(node), self._sums[node]
            if bool(((now != before) & (now >= 0) & (before >= 0)).any()):
                raise MultiTaskError(
                    f"the compiled backward pass of {label} overwrote what its graph keeps for the losses that share "
                    f"it, so that their gradients would be wrong; p.grad is as before. {ADVICE}"
                )
        for node in self._nodes.get(loss, ()):
            _SOUND.add(_function_of(node))


@contextmanager
def advise() -> Iterator[None]:
    """Replace torch's error about a kept graph in this block, whose advice can give wrong gradients, by ours."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MultiTaskError) or "donated buffer" not in str(error):
            raise
        raise MultiTaskError(
            "torch.compile compiled this backward pass for a graph that runs once, as after a plain backward() or from "
            f"the on-disk cache, but tasks share the graph; p.grad is as before. {ADVICE}"
        ) from error


@contextmanager
def noticing_kept_graphs(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Raise a MultiTaskError if the user's backward passes in this block kept a compiled graph unprepared.

    We don't know their losses beforehand, so `Watch` can't be used.
    """
    if _is_prepared():
        yield
        return
    kept = []

    def notice(_: Tensor) -> None:
        if graph_is_kept():
            kept.append(True)

    # A hook on each parameter runs inside of every backward pass that reaches it, where the flag can be read.
    hooks = [p.register_hook(notice) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if kept and anything_compiled():
        raise MultiTaskError(
            "backward(retain_graph=True) ran inside `with optimizer.task(...)`, and this program compiles: compiled "
            f"code may overwrite what the graph keeps for the next task, unnoticed; p.grad is as before. {ADVICE}"
        )


def graph_is_kept() -> bool:
    """Whether the backward pass in progress was told to retain its graph."""
    # Private, but present since torch 1.x. Without it we keep the graph, which costs memory but is never wrong.
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())


def in_compiled_autograd() -> bool:
    """Whether compiled autograd captured the backward pass in progress."""
    return bool(getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False))


def _is_prepared() -> bool:
    from torch._functorch import config as functorch

    if not hasattr(functorch, "donated_buffer"):
        return True
    if functorch.donated_buffer:
        return False
    tags = _tags()
    if tags is not None:
        return TAG in tags.cache_key_tag
    from torch._inductor import config as inductor

    return not inductor.inplace_buffers


def _tags() -> Any:
    """Return the module whose cache_key_tag becomes part of every key of the on-disk caches; None in older torch."""
    config = getattr(torch.compiler, "config", None)
    return config if hasattr(config, "cache_key_tag") else None


def _compiled_functions() -> list[type]:
    # The first compilation imports this module; torch itself does not.
    if "torch._functorch.aot_autograd" not in sys.modules:
        return []
    return [cls for cls in torch.autograd.Function.__subclasses__() if cls.__name__ == "CompiledFunction"]


def _function_of(node: Any) -> type:
    return cast(type, getattr(type(node), "_forward_cls", type(node)))


def _checksums(node: Any) -> Tensor:
    """Return the exact sum of all bytes of each tensor that a node saved, on the first one's device; −1 if unreadable.

    FSDP2 frees the memory of gathered parameters between passes, behind tensors that keep their shape: to read one
    would end the process.
    """
    saved = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())]
    sums = [
        t.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
        if _has_memory(t)
        else torch.tensor(-1, device=t.device)
        for t in saved
        if isinstance(t, Tensor)
    ]
    return torch.stack([each.to(sums[0].device) for each in sums]) if sums else torch.zeros(0)


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage reaches as far as the tensor's last number."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= needed
