"""wrap() and MultiTaskOptimizer: any torch optimizer, made to take the task losses instead of their sum.

`wrap` gives the same object a subclass of its own class, so that schedulers, scalers and checkpoints go on seeing one
real optimizer, and nothing held in two places can go stale.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.capture import Total, at_end_of_backward
from gradsurg.compiled import outside_compilation
from gradsurg.distributed import check_model, refuse_optimizer
from gradsurg.features import check_features
from gradsurg.incoming import bring, entering, receive
from gradsurg.losses import Computations, Losses, check_scalar, parse_losses, value_of
from gradsurg.memory import KEY, sealed, unsealed
from gradsurg.report import Report
from gradsurg.settings import settings_from
from gradsurg.stepping import after_step, before_step, take_back, watch
from gradsurg.surgeon import Surgeon

__all__ = ["MultiTaskOptimizer", "backward", "find_wrapped", "report", "total", "unwrap", "wrap"]

_EXTENDED: dict[type[Optimizer], type[MultiTaskOptimizer]] = {}
STATE = "_gradsurg"  # the attribute that holds the Surgeon
UNTRACED = ("total", "backward", "task", "set_gradients", "zero_grad")  # besides step


class MultiTaskOptimizer(Optimizer):
    """What `wrap` makes of an optimizer: itself, with four more ways for gradients to come in.

    Never built directly. The wrapped object stays an instance of its own class, with its state, parameter groups and
    hooks; what is added is listed here.
    """

    _gradsurg: Surgeon

    def total(
        self, losses: Losses, *, plain: Tensor | None = None, features: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the preference-weighted sum Σ r_i L_i, a scalar whose backward() does the surgery.

        Each task's backward pass runs when backward() reaches this node; the surgery runs when all of that backward
        pass is done, so `(total + penalty).backward()` adds the penalty's gradient untouched.

        Args:
            losses: Task name -> scalar loss, or a sequence of losses. None, or a loss that does not require grad, is
                a task absent from this step.
            plain: A loss that takes no part in surgery, such as a penalty: its gradient is added as it is.
            features: The tensor, or tensors, that the shared part of the model returned and the heads read. Surgery
                is then done on ∂L_i/∂features, and one backward pass runs through what lies before them: the cost of
                a plain step. What is promised holds for the features, not for the parameters; see docs/cheap-modes.md.

        Returns:
            A scalar on the first loss's device, float32 at least. Under no_grad, a plain number.

        Raises:
            ValueError: No task at all; a loss that is not a real scalar; a name that is not declared; features that
                the losses do not depend on, or that are no result of the model.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
            >>> optimizer.total({"a": w[0] ** 2, "b": (w[1] - 3) ** 2}).backward()
            >>> optimizer.step()
        """
        surgeon = self._gradsurg
        parsed = parse_losses(losses, surgeon.settings.tasks)
        plain = None if plain is None else check_scalar("plain", plain)
        value = value_of(parsed, surgeon.settings.preferences, plain)
        trainable = [t for t in (*parsed.values(), plain) if t is not None and t.requires_grad]
        if not torch.is_grad_enabled() or not trainable:
            return value
        given = None if features is None else check_features(features, surgeon.settings)
        surgeon.introduce(parsed)
        surgeon.lay_out()
        surgeon.unrun += 1
        # On the loss's device: only then does autograd make later work wait for the streams of these backward passes.
        anchor = torch.zeros((), device=trainable[0].device, requires_grad=True)
        run = functools.partial(_run_nested, surgeon, parsed, plain, given)
        return cast(Tensor, Total.apply(anchor, run, value))  # type: ignore[no-untyped-call]

    def backward(
        self,
        losses: Losses | Computations,
        *,
        plain: Tensor | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Do what total(losses).backward() does, without nesting one backward pass in another.

        The reference form, and the safe choice with several devices or side streams. It also takes functions instead
        of losses: each is called just before its backward pass, so that only one task's graph exists at a time. A
        function that returns None is a task absent from this step.

        Args:
            losses: As for `total`; any of them may be a function of no arguments that computes the loss.
            plain: As for `total`.
            features: As for `total`.
            retain_graph: Keep the graph of the losses for another backward pass.

        Raises:
            ValueError: As for `total`; also where no loss requires grad.

        Example:
            >>> import torch, gradsurg
            >>> trunk, heads = torch.nn.Linear(3, 4), torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(2))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1))
            >>> x = torch.ones(5, 3)
            >>> def loss(task):
            ...     return (heads[task](torch.tanh(trunk(x))) - task).square().mean()
            >>> optimizer.backward({"zero": lambda: loss(0), "one": lambda: loss(1)})
            >>> optimizer.step()
        """
        surgeon = self._gradsurg
        functions = features is None and surgeon.settings.refresh_every == 1
        parsed = parse_losses(losses, surgeon.settings.tasks, functions=functions)
        plain = None if plain is None else check_scalar("plain", plain)
        given = None if features is None else check_features(features, surgeon.settings)
        if not any(callable(loss) or (loss is not None and loss.requires_grad) for loss in (*parsed.values(), plain)):
            raise ValueError(f"no loss of {list(parsed)} requires grad: there is nothing to run backward through")
        bring(surgeon, parsed, plain, given, retain_graph=retain_graph)

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Send ordinary backward calls, any number, to one task's row.

        For separate loaders, alternating tasks, or code that calls backward itself. Surgery is redone at each exit,
        so that p.grad is final before unscaling and clipping; with `tasks=[...]` declared in wrap it is done once,
        at the exit of the last of them. Where the block raises, nothing of it is kept.

        Args:
            name: The task.

        Raises:
            ValueError: The name is not among the declared tasks.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
            >>> for name, loss in {"a": w.sum(), "b": (2 * w[0] - w[1])}.items():
            ...     with optimizer.task(name):
            ...         loss.backward()
            >>> optimizer.step()
        """
        surgeon = self._gradsurg
        with entering(surgeon, name):
            yield

    def set_gradients(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Use gradients that were computed elsewhere as one step's rows.

        Args:
            gradients: Task name -> one tensor or None per shared parameter: those given as `shared=` to wrap, in that
                order, else all parameters of the optimizer that require grad, in the order of its groups. The tensors
                are copied.

        Raises:
            ValueError: A wrong number of tensors, or a wrong shape or dtype; the message names task and position.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), normalize="none")
            >>> optimizer.set_gradients({"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([-2.0, 1.0])]})
            >>> w.grad.tolist()
            [0.0, 1.0]
        """
        receive(self._gradsurg, gradients)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Only gather rows inside this block; surgery waits for a backward outside of it, or for step().

        Without it every micro-batch redoes the surgery on the rows accumulated so far, which is never wrong but costs
        its time again.
        """
        surgeon = self._gradsurg
        surgeon.deferring += 1
        try:
            yield
        finally:
            surgeon.deferring -= 1

    @property
    def report(self) -> Report | None:
        """What the last surgery and step did; None before the first."""
        return self._gradsurg.report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and rows alike; see torch.optim.Optimizer.zero_grad."""
        if not self._gradsurg.stepped:  # else other optimizers have yet to step, and be judged by the same rows
            self._gradsurg.forget()
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state dict, with the averages of rotate= in it; see torch.optim.Optimizer."""
        return sealed(super().state_dict(), **self._gradsurg.rotation.packed(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, of this or of a bare optimizer; see torch.optim.Optimizer."""
        super().load_state_dict(self._gradsurg.rotation.unpack_from(self, unsealed(state_dict), KEY))

    def __reduce_ex__(self, protocol: Any) -> Any:
        averages = self._gradsurg.rotation.pack(self)
        return _rebuild, (_inner_class(self), self._gradsurg, averages), self.__getstate__()

    def __copy__(self) -> MultiTaskOptimizer:
        copied = _rebuild(_inner_class(self), Surgeon(self._gradsurg.settings))  # rows are never shared with a copy
        copied.__setstate__(self.__getstate__())
        return copied


def _step(self: MultiTaskOptimizer, closure: Callable[[], Any] | None = None) -> Any:
    """Do the surgery if it is pending, step the optimizer, then hold the update to the guarantee."""
    surgeon = self._gradsurg
    before = before_step(surgeon, self, closure is not None)
    arguments = () if closure is None else (watch(surgeon, closure),)
    try:
        result = _inner_step(_inner_class(self))(self, *arguments)
    except BaseException:
        take_back(surgeon, self, before)
        raise
    after_step(surgeon, self, before)
    return result


@overload
def wrap(optimizer: Optimizer, **options: Any) -> MultiTaskOptimizer: ...
@overload
def wrap(optimizer: Sequence[Optimizer], **options: Any) -> list[MultiTaskOptimizer]: ...
def wrap(optimizer: Optimizer | Sequence[Optimizer], **options: Any) -> MultiTaskOptimizer | list[MultiTaskOptimizer]:
    """Make any torch optimizer train on several losses, so that no update hurts a task to first order.

    The object itself is extended and returned: schedulers, scalers and checkpoints that hold it stay right.

    Args:
        optimizer: An instance of any torch.optim.Optimizer, or several that together train one model; these share
            their rows, and total() may be called on either.
        **options: All keyword-only, each checked:

            normalize: "norm" (default), "none", … or a Normalizer: what the rows are scaled by before surgery.
            surgery: "cone" (default), "sum", "upgrad", "mgda", "pcgrad", … or a Surgery.
            primary: A task's name, or levels [["main"], ["aux1", "aux2"], ["reg"]]; the tasks not named come last.
            auxiliary: "protect" (default): lower levels only constrain the first. "help": they add what does not hurt
                a higher level; guarantees then cover the first level alone.
            preferences: Task name -> r_i > 0 (default 1): the weight in the sum that surgery starts from.
            guarantee: "update" (default) projects the parameters' real movement, whatever the optimizer makes of the
                gradient; "gradient" projects only what is written to p.grad; "none" trusts the surgery.
            margin: τ in [0, 1), or task name -> τ (0 for the others): guarantees hold to ⟨u, g_i⟩ ≥ τ_i ‖g_i‖ ‖t‖ / √m
                and not only to 0, t the plain sum; in the update t is what the optimizer would have done. Of margins
                that no direction as long as t can keep, as large a share as one can: `report.margin_kept`.
            granularity: "model" (default), "group" or "tensor": one Gramian, one a parameter group, one a parameter.
            model: Where several ranks train it: the DistributedDataParallel or fully_shard module, if it cannot be
                found by itself.
            tasks: The task names, where they are known beforehand.
            shared: The parameters that surgery treats; by default those that at least two tasks of a step reached.
            row_dtype: E.g. torch.bfloat16: store the task gradients of shared parameters in less memory.
            nonfinite: "propagate" (default): NaN goes into p.grad, where GradScaler sees it; "skip_task" leaves such
                a task out of the step; "raise".
            atomic: True: where the optimizer's own step raises half way, its state and all parameters are put back, so
                that the step can be tried again. Costs a copy of both each step: 3 P for Adam. By default the copy of
                the parameters that guarantee="update" needs is all that is put back.
            backend: "auto" (default): Triton's kernels where the shared parameters are on one CUDA device and Triton is
                installed, torch elsewhere; report.path says which. "torch"; "triton": an error where it cannot run.
                With the kernels nothing waits for the device from the first backward to the end of step(), but where
                gradsurg.methods() says waits=True of the surgery or the normaliser, or there are more than 32 tasks.
            seed: For the methods that draw random numbers.
            refresh_every: k: find new weights in every k-th step; between, one backward pass of the sum weighted by
                the last ones, without a guarantee. 1 by default.
            rotate: k: run the backward passes of k tasks a step, those that waited longest; the others take part
                with moving averages of their gradients. Costs m more copies of the shared parameters. None by default.

    Returns:
        The same object (or a list of the same objects), now also a MultiTaskOptimizer.

    Raises:
        TypeError: Not an optimizer instance, or already wrapped.
        ValueError: A wrong name or value; the message lists the valid ones.

    Example:
        >>> import torch, gradsurg
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """
    several = isinstance(optimizer, (list, tuple))
    optimizers: list[Optimizer] = list(optimizer) if several else [optimizer]  # type: ignore[list-item, arg-type]
    if not optimizers:
        raise TypeError("wrap([]) has no optimizer: pass an optimizer, or a list of them")
    for each in optimizers:
        _check_optimizer(each)
    if len(set(map(id, optimizers))) < len(optimizers):
        raise TypeError("wrap() was given the same optimizer twice in a list: pass each once")
    model = check_model(options.pop("model", None))
    surgeon = Surgeon(settings_from(options, optimizers), model)
    wrapped = [_extend(each, surgeon) for each in optimizers]
    surgeon.traffic.ranks.know_early(surgeon.parameters())
    return wrapped if several else wrapped[0]


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Undo `wrap`: the same object with its own class again; state and parameter groups stay.

    Example:
        >>> import torch, gradsurg
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
        >>> type(gradsurg.unwrap(optimizer)) is torch.optim.SGD
        True
    """
    wrapped = find_wrapped(optimizer)
    surgeon = wrapped._gradsurg
    surgeon.forget()
    surgeon.optimizers.remove(wrapped)
    patched = _scheduler_patch(wrapped)
    del wrapped.__dict__[STATE]
    wrapped.__class__ = _inner_class(wrapped)  # type: ignore[assignment]
    for group in wrapped.param_groups:
        group.pop("gradsurg", None)
    if patched:
        _patch_for_scheduler(wrapped)
    return wrapped


def total(optimizer: Any, losses: Losses, **options: Any) -> Tensor:
    """Call optimizer.total(losses, ...), seeing through the proxies that trainers put around an optimizer."""
    return find_wrapped(optimizer).total(losses, **options)


def backward(optimizer: Any, losses: Losses | Computations, **options: Any) -> None:
    """Call optimizer.backward(losses, ...), seeing through the proxies that trainers put around an optimizer."""
    find_wrapped(optimizer).backward(losses, **options)


def report(optimizer: Any) -> Report | None:
    """Return optimizer.report, seeing through the proxies that trainers put around an optimizer."""
    return find_wrapped(optimizer).report


def _run_nested(
    surgeon: Surgeon,
    losses: dict[str, Tensor | None],
    plain: Tensor | None,
    features: list[Tensor] | None,
    gradient: Tensor,
    keep: bool,
) -> None:
    bring(surgeon, losses, plain, features, gradient, retain_graph=keep, finish=at_end_of_backward)


def find_wrapped(optimizer: Any) -> MultiTaskOptimizer:
    """Follow `.optimizer` and `._optimizer` to the wrapped optimizer (Accelerate, Lightning)."""
    seen: list[Any] = []
    while optimizer is not None and optimizer not in seen:
        if isinstance(optimizer, MultiTaskOptimizer):
            return optimizer
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    raise TypeError(
        f"{type(seen[0]).__name__ if seen else None} is not a wrapped optimizer, nor a proxy around one: call "
        "gradsurg.wrap(optimizer) before handing it to the trainer"
    )


def _check_optimizer(optimizer: object) -> None:
    refuse_optimizer(optimizer)
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        raise TypeError(
            f"wrap() was given the class {optimizer.__name__}: build it first, as in "
            f"wrap({optimizer.__name__}(model.parameters(), lr=...))"
        )
    if isinstance(optimizer, MultiTaskOptimizer):
        raise TypeError("this optimizer is wrapped already: gradsurg.unwrap() it to wrap it with other options")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"wrap() was given a {type(optimizer).__name__}: pass an instance of torch.optim.Optimizer, such as "
            "torch.optim.AdamW(model.parameters(), lr=3e-4)"
        )
    if "step" in vars(optimizer) and not _scheduler_patch(optimizer):
        raise TypeError(
            f"step() of this {type(optimizer).__name__} was replaced on the instance, so wrap() cannot get underneath "
            "it: wrap the optimizer before it is handed to whatever replaced step()"
        )


def _extended_class(inner: type[Optimizer]) -> type[MultiTaskOptimizer]:
    """Return the class that `wrap` gives an optimizer; the same one for the same class, always."""
    if inner not in _EXTENDED:
        _EXTENDED[inner] = _extend_class(inner)
    return _EXTENDED[inner]


def _extend_class(inner: type[Optimizer]) -> type[MultiTaskOptimizer]:
    step = functools.wraps(_step)(Optimizer.profile_hook_step(_step))
    # Hooks registered on the optimizer run around the whole of our step: post hooks (EMA, logging) see the parameters
    # that the guarantee left, not those before it.
    step.hooked = True  # type: ignore[attr-defined]
    untraced = {name: outside_compilation(vars(MultiTaskOptimizer)[name]) for name in UNTRACED}
    return type(
        f"MultiTask{inner.__name__}",
        (MultiTaskOptimizer, inner),
        {
            **untraced,
            "step": outside_compilation(step),
            "__module__": inner.__module__,
            "__doc__": MultiTaskOptimizer.__doc__,
        },
    )


def _inner_class(optimizer: MultiTaskOptimizer) -> type[Optimizer]:
    """Return the class that was wrapped; trainers may have put classes of their own on top."""
    mro = type(optimizer).__mro__
    return cast("type[Optimizer]", mro[mro.index(MultiTaskOptimizer) + 1])


def _inner_step(inner: type[Optimizer]) -> Callable[..., Any]:
    step: Callable[..., Any] = inner.step
    # torch wraps each class's step once to run hooks; ours runs them, so the inner one must not run them again.
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def _extend(optimizer: Optimizer, surgeon: Surgeon) -> MultiTaskOptimizer:
    patched = _scheduler_patch(optimizer)
    vars(optimizer).pop("step", None)
    optimizer.__class__ = _extended_class(type(optimizer))
    wrapped = cast(MultiTaskOptimizer, optimizer)
    wrapped.__dict__[STATE] = surgeon
    surgeon.optimizers.append(wrapped)
    surgeon.memory.touch()
    if patched:
        _patch_for_scheduler(wrapped)
    return wrapped


def _scheduler_patch(optimizer: Optimizer) -> bool:
    return hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")


def _patch_for_scheduler(optimizer: Optimizer) -> None:
    """Do to step() what LRScheduler.__init__ did to the one it saw, so that it notices steps and does not warn."""
    vars(optimizer).pop("step", None)
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


def _rebuild(
    inner: type[Optimizer], surgeon: Surgeon, averages: Mapping[str, Sequence[Tensor | None]] | None = None
) -> MultiTaskOptimizer:
    """Unpickle: the dynamic class cannot be named in a pickle, its base can."""
    extended = _extended_class(inner)
    optimizer = extended.__new__(extended)
    optimizer.__dict__[STATE] = surgeon
    surgeon.optimizers.append(optimizer)
    if averages:
        surgeon.rotation.receive(optimizer, averages)
    return optimizer
