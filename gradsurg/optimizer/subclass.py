"""The class of a wrapped optimizer: a subclass of the one it had, made once per class; its step, copies and pickles."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from gradsurg.gradients.compile import outside_compilation
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.optimizer import MultiTaskOptimizer
from gradsurg.optimizer.step import after_step, before_step, enforce, take_back, watch

__all__ = ["extend", "inner_class", "patch_for_scheduler", "restore_class", "scheduler_patch"]

_EXTENDED: dict[type[Optimizer], type[MultiTaskOptimizer]] = {}
# The attribute that holds the Engine.
STATE = "_gradsurg"
# What torch.compile must not trace, besides step().
UNTRACED = ("total", "backward", "task", "set_gradients", "zero_grad")


def _extended_class(inner: type[Optimizer]) -> type[MultiTaskOptimizer]:
    """Return the class that `wrap` gives an optimizer of class `inner`, always the same one."""
    if inner in _EXTENDED:
        return _EXTENDED[inner]
    step = functools.wraps(_step)(Optimizer.profile_hook_step(_step))
    # Hooks registered on the optimizer run around the whole of our step: post hooks (EMA, logging) see the parameters
    # that the guarantee left, not those before it.
    step.hooked = True  # type: ignore[attr-defined]
    untraced = {name: outside_compilation(vars(MultiTaskOptimizer)[name]) for name in UNTRACED}
    namespace = {
        **untraced,
        "step": outside_compilation(step),
        "__reduce_ex__": _reduce,
        "__copy__": _copy,
        "__module__": inner.__module__,
        "__doc__": MultiTaskOptimizer.__doc__,
    }
    name, bases = f"MultiTask{inner.__name__}", (MultiTaskOptimizer, inner)
    usual = _grew_from_optimizer(inner)
    _EXTENDED[inner] = type(name, bases, namespace) if usual else _laid_out_like(inner, name, namespace)
    return _EXTENDED[inner]


def _grew_from_optimizer(inner: type) -> bool:
    """Tell whether instances are laid out in memory like those of torch's Optimizer, and ours."""
    while inner not in (Optimizer, object):
        inner = cast(type, inner.__base__)
    return inner is Optimizer


def _laid_out_like(inner: type[Optimizer], name: str, namespace: dict[str, Any]) -> type[MultiTaskOptimizer]:
    """Return the extended class if Python refuses the usual bases, as for class Lion(ABC, Optimizer).

    An object's class can be exchanged only if both classes lay out memory alike, and the first base decides how. So
    `inner` comes first among the bases, while methods are looked up in the usual order.
    """
    usual = type(name, (MultiTaskOptimizer, inner), {}).__mro__[1:]
    bases = (inner, MultiTaskOptimizer)

    class OursFirst(type(inner)):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            return [cls, *usual] if cls.__bases__ == bases else super().mro()

    return cast("type[MultiTaskOptimizer]", OursFirst(name, bases, namespace))


def inner_class(optimizer: MultiTaskOptimizer) -> type[Optimizer]:
    """Return the class that was wrapped; trainers may have put classes of their own on top."""
    mro = type(optimizer).__mro__
    return cast("type[Optimizer]", mro[mro.index(MultiTaskOptimizer) + 1])


def extend(optimizer: Optimizer, engine: Engine) -> MultiTaskOptimizer:
    """Give the optimizer the extended class, in place, and the engine that several optimizers may share."""
    patched = scheduler_patch(optimizer)
    # A scheduler's patch on the instance would hide the new class's step().
    vars(optimizer).pop("step", None)
    optimizer.__class__ = _extended_class(type(optimizer))
    wrapped = cast(MultiTaskOptimizer, optimizer)
    wrapped.__dict__[STATE] = engine
    engine.checkpoint.references.append(weakref.ref(wrapped))
    # A state dict that is taken before the first step has the entry too.
    engine.checkpoint.home()
    if patched:
        patch_for_scheduler(wrapped)
    return wrapped


def restore_class(wrapped: MultiTaskOptimizer) -> Optimizer:
    """Undo `extend`: the same object with the class that it came with."""
    patched = scheduler_patch(wrapped)
    del wrapped.__dict__[STATE]
    wrapped.__class__ = inner_class(wrapped)  # type: ignore[assignment]
    if patched:
        patch_for_scheduler(wrapped)
    return wrapped


def scheduler_patch(optimizer: Optimizer) -> bool:
    """Tell whether a learning-rate scheduler replaced step() on the instance."""
    return hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")


def patch_for_scheduler(optimizer: Optimizer) -> None:
    """Patch step() as LRScheduler.__init__ does, so that the scheduler notices steps and does not warn."""
    vars(optimizer).pop("step", None)
    # A strong reference would make a circle, and the optimizer would outlive its last user.
    owner = weakref.ref(optimizer)
    method = type(optimizer).step

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        instance = owner()
        assert instance is not None
        instance._opt_called = True  # type: ignore[attr-defined]
        return method(instance, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


def _step(self: MultiTaskOptimizer, closure: Callable[[], Any] | None = None, *more: Any, **named: Any) -> Any:
    """Do the surgery if it is pending, step the optimizer, then enforce the guarantee on the update."""
    engine = self._gradsurg
    attempt = before_step(engine, self, closure is not None)
    watched = None if closure is None else watch(engine, self, closure, attempt)
    arguments = () if watched is None and not more else (watched, *more)
    try:
        # torch wraps each class's step once to run hooks; ours runs them, so the inner one must not run them again.
        inner: Callable[..., Any] = inner_class(self).step
        inner = getattr(inner, "__wrapped__", inner) if getattr(inner, "hooked", False) else inner
        result = inner(self, *arguments, **named)
        enforce(engine, self, attempt)
    except BaseException as error:
        take_back(self, attempt, error)
        raise
    after_step(engine, self)
    # The optimizer was given another value, and handed it on.
    return result if attempt.search is None else attempt.value


def _reduce(self: MultiTaskOptimizer, protocol: Any) -> Any:
    # Averages of rotate= are as large as the rows, and live outside of the parameter groups.
    averages = self._gradsurg.rotation.averages_of(self)
    return _rebuild, (inner_class(self), self._gradsurg, averages), self.__getstate__()


def _copy(self: MultiTaskOptimizer) -> MultiTaskOptimizer:
    # Rows are never shared with a copy.
    copied = _rebuild(inner_class(self), copy.copy(self._gradsurg))
    copied.__setstate__(self.__getstate__())
    return copied


def _rebuild(
    inner: type[Optimizer], engine: Engine, averages: Mapping[str, Sequence[Tensor | None]] | None = None
) -> MultiTaskOptimizer:
    """Unpickle: the dynamic class cannot be named in a pickle, its base can."""
    extended = _extended_class(inner)
    optimizer = extended.__new__(extended)
    optimizer.__dict__[STATE] = engine
    engine.checkpoint.references.append(weakref.ref(optimizer))
    if averages:
        engine.rotation.set_averages(optimizer, averages)
    return optimizer
