"""torch.compile: what goes wrong where a compiled graph is kept for several backward passes, and what is done about it.

Compiled backward code may overwrite the activations that it reads ("donated buffers"), which is right for a graph that
runs once and ruins it for the tasks that come after the first. torch refuses that only where it notices: the compiled
code found in the on-disk cache may be of the wrong kind, because the flag is no part of the cache's key. Then the
other tasks' gradients are wrong and nobody says so.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError

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
# Compiled graphs that were seen to leave alone what they keep. By class: torch makes one for every compilation.
_SOUND: weakref.WeakSet[type] = weakref.WeakSet()


def prepare_compile() -> None:
    """Make torch.compile fit for several backward passes through one graph; call it once, before anything else.

    It switches donated buffers off, gives this program's compiled code a key of its own in the on-disk cache, where
    code compiled with them may lie, and forgets what this process compiled so far. A second call changes nothing.

    It fails to help where code was compiled ahead of time and is loaded past torch.compile; a step through such a
    graph is refused, like every step through a graph that turns out not to keep what it should.

    Example:
        >>> import gradsurg
        >>> gradsurg.prepare_compile()
    """
    if _is_prepared():
        return
    import torch._dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    if hasattr(functorch, "donated_buffer"):  # since torch 2.6
        functorch.donated_buffer = False
        tags = _tags()
        if tags is None:  # this option is part of the cache's key, and rules out what the donation is for
            inductor.inplace_buffers = False  # type: ignore[attr-defined, unused-ignore]
        else:
            tags.cache_key_tag = f"{tags.cache_key_tag}{TAG}"
    torch._dynamo.reset()  # type: ignore[no-untyped-call, unused-ignore]


def anything_compiled() -> bool:
    """Return whether torch.compile made any function with a backward pass in this process so far."""
    return bool(_compiled_functions())


@functools.cache
def outside_compilation(function: F) -> F:
    """Return the function, left alone by torch.compile; not for use at import, which it makes slow.

    Tracing it would gain nothing, since every backward pass breaks the graph, and took a minute for one small model.
    What autograd calls needs it too: a compiled training step traces that, and compiled autograd all of it.
    """
    reason = (
        "gradsurg runs backward passes of its own, which cannot be traced: return the losses from the compiled "
        "function, and call total(), backward(), task() and step() outside of it"
    )
    known = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
    return cast(F, torch.compiler.disable(function, **({"reason": reason} if known else {})))


class Watch:
    """Sees to it that a backward pass leaves alone what its compiled graph keeps for the next.

    Built before the first backward pass, it takes a checksum of every tensor that a compiled graph saved, and `check`
    compares after the pass. Each compiled graph is watched once, and where nothing was compiled this costs nothing. To
    repeat the first backward pass after the last and compare would miss a graph that overwrites only what the first
    loss has no need of.

    Args:
        losses: What backward passes will start from.
    """

    def __init__(self, losses: Iterable[Tensor]) -> None:
        self._nodes: dict[Tensor, list[Any]] = {}
        self._sums: dict[Any, Tensor] = {}
        if all(function in _SOUND for function in _compiled_functions()):
            return
        for loss in losses:
            self._nodes[loss] = [node for node in _compiled_nodes(loss) if _function_of(node) not in _SOUND]
            for node in self._nodes[loss]:
                if node not in self._sums:
                    self._sums[node] = _checksums(node)

    def check(self, loss: Tensor, label: str) -> None:
        """Compare after the backward pass of a loss whose graph was kept.

        Raises:
            MultiTaskError: It overwrote something.
        """
        if not self._nodes:
            return
        for node in self._nodes.get(loss, ()):
            if not torch.equal(_checksums(node), self._sums[node]):
                raise MultiTaskError(
                    f"the compiled backward pass of {label} overwrote what its graph keeps for the losses that share "
                    f"it, so that their gradients would be wrong; p.grad is as before. {ADVICE}"
                )
        for node in self._nodes.get(loss, ()):
            _SOUND.add(_function_of(node))


class _Advising:  # a function that yields takes three times as long, once a task
    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, MultiTaskError):
            return
        if "donated buffer" in str(error):
            raise MultiTaskError(
                "torch.compile compiled this backward pass for a graph that runs once, as after a plain backward() or "
                f"from the on-disk cache, but tasks share the graph; p.grad is as before. {ADVICE}"
            ) from error


_ADVISING = _Advising()


def advise() -> AbstractContextManager[None]:
    """Turn torch's refusal of a kept graph in this block, whose own advice can give wrong gradients, into ours."""
    return _ADVISING


@contextmanager
def noticing_kept_graphs(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Refuse, at the end, backward passes of compiled code inside this block that kept their graph unprepared.

    They are somebody else's, so that there is no loss to give to `Watch` beforehand.

    Raises:
        MultiTaskError: There was one.
    """
    if _is_prepared():
        yield
        return
    kept = []

    def notice(_: Tensor) -> None:
        if graph_is_kept():
            kept.append(True)

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
    """Return whether the backward pass in progress was told to retain its graph."""
    # Private and present since torch 1.x; without it, keeping the graph costs memory but is never wrong.
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())


def in_compiled_autograd() -> bool:
    """Return whether the backward pass in progress is one that compiled autograd captured."""
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
    if "torch._functorch.aot_autograd" not in sys.modules:  # imported by the first compilation, and not by torch
        return []
    return [cls for cls in torch.autograd.Function.__subclasses__() if cls.__name__ == "CompiledFunction"]


def _compiled_nodes(loss: Tensor) -> list[Any]:
    """Return the nodes of compiled code in the graph of a loss."""
    nodes, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CompiledFunctionBackward":
            nodes.append(node)
        ahead.extend(following for following, _ in node.next_functions)
    return nodes


def _function_of(node: Any) -> type:
    return cast(type, getattr(type(node), "_forward_cls", type(node)))


def _checksums(node: Any) -> Tensor:
    """Return the sum of all bytes of each tensor that a node saved, exact, on the first one's device."""
    saved = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())]
    sums = [t.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for t in saved if isinstance(t, Tensor)]
    return torch.stack([each.to(sums[0].device) for each in sums]) if sums else torch.zeros(0)
