"""wrap() and unwrap(): any torch optimizer, made to take the task losses instead of their sum.

`wrap` gives the same object a subclass of its own class, so that schedulers, scalers and checkpoints go on seeing one
real optimizer, and nothing held in two places can go stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch.optim import Optimizer

from gradsurg.distributed.modules import check_model, refuse_optimizer
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.optimizer import MultiTaskOptimizer, find_wrapped
from gradsurg.optimizer.options import options_from
from gradsurg.optimizer.subclass import extend, restore_class, scheduler_patch

__all__ = ["unwrap", "wrap"]


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
            preferences: Task name -> r_i > 0 (default 1): the weight in the sum that surgery starts from. Heads
                get their plain gradient; but a task alone in a step gets its r_i on all that it reaches.
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
            batched: True: run all tasks' backward passes through the shared part as one (torch's vmap). Faster where
                starting operations is what takes time: small models, small batches. Costs m times the memory of a pass.
                Where it cannot be done, one warning says why, and the passes run one by one.

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
    engine = Engine(options_from(options, optimizers), model)
    wrapped = [extend(each, engine) for each in optimizers]
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
    engine.forget()
    engine.optimizers.remove(wrapped)
    for group in wrapped.param_groups:
        group.pop("gradsurg", None)
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
    if "step" in vars(optimizer) and not scheduler_patch(optimizer):
        raise TypeError(
            f"step() of this {type(optimizer).__name__} was replaced on the instance, so wrap() cannot get underneath "
            "it: wrap the optimizer before it is handed to whatever replaced step()"
        )
