"""wrap() and unwrap(): any torch optimizer, made to take the task losses instead of their sum.

`wrap` gives the same object a subclass of its own class, so that schedulers, scalers and checkpoints go on seeing one
real optimizer, and nothing held in two places can go stale.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurg.distributed.modules import check_model, refuse_optimizer
from gradsurg.gradients.param_groups import trained
from gradsurg.guarantee.foreign import check_foreign
from gradsurg.normalize import Normalizer
from gradsurg.optimizer.backward import OneByOne
from gradsurg.optimizer.cheap.batched import Batched
from gradsurg.optimizer.cheap.reuse import Reused
from gradsurg.optimizer.cheap.rotation import ROWS
from gradsurg.optimizer.checkpoint import KEY
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.loading import check_group
from gradsurg.optimizer.optimizer import MultiTaskOptimizer
from gradsurg.optimizer.options import DEFAULT_GUARANTEE, WrapOptions, check_options, naming_the_nearest_option
from gradsurg.optimizer.proxies import find_wrapped
from gradsurg.optimizer.subclass import extend, restore_class, scheduler_patch
from gradsurg.surgery import Surgery

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["unwrap", "wrap"]

# Packages whose optimizers are proxies around others.
TRAINERS = ("accelerate", "lightning", "pytorch_lightning")


@overload
def wrap(optimizer: Optimizer, **options: Unpack[WrapOptions]) -> MultiTaskOptimizer: ...
@overload
def wrap(optimizer: Sequence[Optimizer], **options: Unpack[WrapOptions]) -> list[MultiTaskOptimizer]: ...
@naming_the_nearest_option
def wrap(
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    normalize: str | Normalizer = "norm",
    surgery: str | Surgery = "cone",
    primary: str | Sequence[Any] | None = None,
    auxiliary: str = "protect",
    preferences: Mapping[str, float] | None = None,
    guarantee: str = DEFAULT_GUARANTEE,
    margin: float | Mapping[str, float] = 0.0,
    granularity: str = "model",
    model: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    shared: nn.Module | Iterable[Tensor] | None = None,
    row_dtype: torch.dtype | None = None,
    nonfinite: str = "propagate",
    atomic: bool = False,
    backend: str = "auto",
    seed: int = 0,
    refresh_every: int = 1,
    rotate: int | None = None,
    batched: bool = False,
    check_sync_every: int = 0,
) -> MultiTaskOptimizer | list[MultiTaskOptimizer]:
    """Make any torch optimizer train on several losses, so that no update hurts a task to first order.

    The object itself is extended and returned, so schedulers, scalers and checkpoints that hold it stay right.

    Args:
        optimizer: An instance of any torch.optim.Optimizer, or a list of several that together train one model. Those
            share their rows, and total() may be called on any of them.
        normalize: How the task gradients are scaled before surgery: a name such as "norm" or "none", or a Normalizer.
            `gradsurg.methods()` lists all.
        surgery: How the task gradients are combined: a name such as "cone", "sum", "upgrad", "mgda" or "pcgrad", or a
            Surgery. `gradsurg.methods()` lists all.
        primary: A task's name, or levels of names such as [["main"], ["aux1", "aux2"], ["reg"]]. Tasks that are not
            named come last.
        auxiliary: What lower levels do. "protect": they only constrain the first level. "help": they also add what
            hurts no higher level; guarantees then cover the first level alone.
        preferences: Task name -> r_i > 0 (1 for the others), the weights of the sum that surgery starts from. Heads
            get their plain gradient. A task that is alone in a step gets its r_i on all parameters that it reaches.
        guarantee: "update" projects the movement that the optimizer really makes; "gradient" projects only what is
            written to p.grad; "none" trusts the surgery.
        margin: τ in [0, 1), or task name -> τ (0 for the others). The guarantee then asks for
            ⟨u, g_i⟩ ≥ τ_i ‖g_i‖ ‖t‖ / √m instead of 0, where t is the plain sum (for the update: the movement that the
            optimizer would have made). If no direction of length ‖t‖ satisfies all margins, all are scaled down by one
            common factor, reported as `report.margin_kept`.
        granularity: "model" treats all shared parameters together, "group" each parameter group by itself, "tensor"
            each parameter by itself.
        model: The DistributedDataParallel or fully_shard module, if several ranks train it and it cannot be found.
        tasks: The task names, if they are known beforehand.
        shared: The parameters that surgery treats. Default: those that at least two tasks of a step reached.
        row_dtype: A floating dtype such as torch.bfloat16 in which task gradients of shared parameters are stored.
        nonfinite: What happens to a task whose gradient has a NaN or an infinity. "propagate": it goes into p.grad,
            so that GradScaler sees it. "skip_task": this step goes without the task. "raise": an error. The last two
            also look at the loss.
        atomic: If the optimizer's own step raises half way, put back its state and parameter groups, all parameters and
            p.grad, so that the step can be tried again. Costs a copy of them in each step: 4 P numbers for Adam. If
            False, only the copies of parameters that guarantee="update" needs are put back.
        backend: "auto" uses the Triton kernels if the shared parameters are on one CUDA device and Triton is
            installed, and torch otherwise; `report.path` says which. "triton" is an error where the kernels cannot
            run; "torch" never uses them. With the kernels nothing waits for the device from the first backward pass
            to the end of step(), unless `gradsurg.methods()` says waits=True of the surgery or the normaliser, or
            there are more than 32 tasks.
        seed: Seed of the methods that draw random numbers.
        refresh_every: k finds new weights in every k-th step. Between, one backward pass of the sum weighted by the
            last weights has to do, without a guarantee.
        rotate: k runs the backward passes of only k tasks in each step, those that waited longest. The other tasks
            take part with moving averages of their gradients. Costs m more copies of the shared parameters.
        batched: Run the backward passes of all tasks through the shared part as one (torch's vmap). Faster if starting
            operations takes most of the time: small models, small batches. Costs m times the memory of one pass. If it
            cannot be done, one warning says why, and the passes run one by one.
        check_sync_every: k compares the parameters of all ranks in every k-th step, from the first on, before the step
            moves them. If they differ, all ranks raise an error that names the first. 0 is never. Costs one pass over
            the parameters, and 16 bytes on the wire per parameter tensor and rank.

    Returns:
        The same object, or a list of the same objects, now also a MultiTaskOptimizer.

    Raises:
        TypeError: Not an optimizer instance, already wrapped, or an option that does not exist.
        ValueError: A wrong name or value; the message lists the valid ones.

    Example:
        >>> import torch, gradsurg
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """
    given = cast(WrapOptions, {name: value for name, value in locals().items() if name != "optimizer"})
    several = isinstance(optimizer, (list, tuple))
    # Everything is checked before anything changes: a refused optimizer stays as it was.
    optimizers: list[Optimizer] = list(optimizer) if several else [optimizer]  # type: ignore[list-item, arg-type]
    if not optimizers:
        raise TypeError("wrap([]) has no optimizer: pass an optimizer, or a list of them")
    for each in optimizers:
        _check_optimizer(each)
    if len(set(map(id, optimizers))) < len(optimizers):
        raise TypeError("wrap() was given the same optimizer twice in a list: pass each once")
    checked = check_model(model)
    options = check_options(optimizers, given)
    brought = [check_group(each, options.pipeline, ROWS) for each in optimizers]
    if options.guarantee == "update":
        check_foreign(p for each in optimizers for p in trained(each))
    full = Batched() if options.batched else OneByOne()
    passes = full if options.refresh_every == 1 else Reused(options.refresh_every, full)
    engine = Engine(options, passes, checked)
    wrapped = []
    for each, (entry, averages) in zip(optimizers, brought, strict=True):
        # What a bare optimizer loaded from a checkpoint of a wrapped one goes on from there.
        each.param_groups[0].pop(KEY, None)
        each.param_groups[0].update(entry)
        wrapped.append(extend(each, engine))
        engine.rotation.replace_averages(each, averages)
    engine.session.ranks.know_early(engine.parameters())
    return wrapped if several else wrapped[0]


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Undo `wrap`: the same object with its own class again; state and parameter groups stay.

    Example:
        >>> import torch, gradsurg
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
        >>> type(gradsurg.unwrap(optimizer)) is torch.optim.SGD
        True
    """
    wrapped = find_wrapped(optimizer)
    engine = wrapped._gradsurg
    # Gradients in p.grad stay: the bare optimizer may step with them.
    engine.forget()
    engine.checkpoint.references.remove(weakref.ref(wrapped))
    for group in wrapped.param_groups:
        group.pop(KEY, None)
    return restore_class(wrapped)


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
    # Told by name: the package need not be installed.
    if type(optimizer).__module__.split(".")[0] == "opacus" or hasattr(optimizer, "original_optimizer"):
        raise TypeError(
            f"wrap() was given a {type(optimizer).__name__}, which replaces p.grad in step() by a noisy sum of "
            "gradients per sample: surgery would have no effect on it"
        )
    # torch's own step needs its hooks; Accelerate's class does not call torch's __init__.
    if type(optimizer).__module__.split(".")[0] in TRAINERS or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"wrap() was given a {type(optimizer).__name__}, a trainer's proxy around an optimizer: wrap the optimizer "
            "first and hand it to the trainer then, as in accelerator.prepare(gradsurg.wrap(optimizer)); "
            "gradsurg.total(proxy, losses) sees through the proxy"
        )
    if "step" in vars(optimizer) and not scheduler_patch(optimizer):
        raise TypeError(
            f"step() of this {type(optimizer).__name__} was replaced on the instance, so wrap() cannot get underneath "
            "it: wrap the optimizer before it is handed to whatever replaced step()"
        )
