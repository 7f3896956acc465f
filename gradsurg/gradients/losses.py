"""Checks losses and gradients that users hand in, and computes the values of losses. For optimizer/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurg.errors import unknown_name
from gradsurg.gradients.rows import Row, laid_out

__all__ = [
    "Computations",
    "Compute",
    "Losses",
    "check_row",
    "check_scalar",
    "detached",
    "of_one_stack",
    "parse_losses",
    "seed_of",
    "task_name",
    "value_of",
]

# The nodes that lead from a part of a tensor to the whole, which may be weighted, and those that make it of several.
PARTS = {"UnbindBackward0", "SelectBackward0", "SplitBackward0", "MulBackward0", "DivBackward0"}
WHOLES = {"StackBackward0", "CatBackward0"}
Losses = Mapping[str, "Tensor | None"] | Iterable["Tensor | None"]
Compute = Callable[[], "Tensor | None"]
Computations = Mapping[str, "Tensor | Compute | None"] | Iterable["Tensor | Compute | None"]


def parse_losses(
    losses: Losses | Computations, tasks: Sequence[str] | None, *, functions: bool = False, empty: bool = False
) -> dict[str, Tensor | Compute | None]:
    """Return name -> loss from a dict or a sequence.

    Args:
        losses: A dict from names to losses, or losses in order.
        tasks: The declared names; None accepts any names.
        functions: Whether a function that computes a loss later is allowed.
        empty: Whether there may be no task at all, since other ranks may have some.

    Raises:
        ValueError: No task at all, a name that was not declared, two tasks of one name, or a loss that is not a
            real scalar tensor; the message names the task.
    """
    given: object = losses
    # A set has no order, by which losses without names are told apart.
    if isinstance(given, (Tensor, str, set, frozenset)) or not isinstance(given, (Mapping, Iterable)):
        raise ValueError(
            f"losses is a {type(losses).__name__}: pass one loss per task, as a dict {{'name': loss, …}} or a list"
        )
    if not isinstance(losses, (Mapping, Sequence)):
        losses = list(losses)
    if isinstance(losses, Mapping):
        pairs = [(task_name("losses", name), loss) for name, loss in losses.items()]
    else:
        if tasks is not None and len(tasks) != len(losses):
            raise ValueError(f"losses has {len(losses)} entries, but {len(tasks)} tasks are declared: {list(tasks)}")
        pairs = list(zip(tasks or map(str, range(len(losses))), losses, strict=True))
    result: dict[str, Tensor | Compute | None] = {}
    for name, loss in pairs:
        if name in result:
            raise ValueError(f"losses has two tasks named {name!r}: names must differ")
        if tasks is not None and name not in tasks:
            raise unknown_name("losses", name, tasks)
        if loss is None or (functions and callable(loss)):
            result[name] = loss
        else:
            result[name] = check_scalar(f"losses[{name!r}]", loss)
    if all(loss is None for loss in result.values()) and not empty:
        raise ValueError(
            f"losses has no task to train on (given: {list(result)}): at least one must be a tensor that requires grad"
        )
    return result


def of_one_stack(losses: Iterable[object]) -> bool:
    """Whether a loss is a part of a tensor that torch.stack or torch.cat made of several, perhaps weighted since."""
    for loss in losses:
        node: Any = loss.grad_fn if isinstance(loss, Tensor) else None
        while type(node).__name__ in PARTS:
            # The other operand of a product may be a constant.
            node = next((after for after, _ in node.next_functions if after is not None), None)
        if type(node).__name__ in WHOLES:
            return True
    return False


def task_name(label: str, name: object) -> str:
    """Return a task's name as text, as reports and state dicts keep it; the label begins the error's message.

    Raises:
        ValueError: The name is None.
    """
    if name is None:
        raise ValueError(f"{label} has a task named None: name it by a string, such as 'depth'")
    return str(name)


def check_scalar(label: str, loss: object) -> Tensor:
    """Return the loss if it is a real scalar tensor, or raise a ValueError that begins with the label."""
    if callable(loss):
        raise ValueError(
            f"{label} is a function: functions go into optimizer.backward(losses), without features= and without "
            "refresh_every=. Pass the loss that it returns"
        )
    if isinstance(loss, (list, tuple)):
        raise ValueError(f"{label} is a {type(loss).__name__} of {len(loss)}: pass their sum, as in sum({label})")
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{label} is a {type(loss).__name__}, which carries no gradient: pass the tensor itself, or None if "
            "the task has no loss in this step"
        )
    if loss.numel() != 1:
        raise ValueError(f"{label} has shape {tuple(loss.shape)}: reduce it to a scalar, e.g. with .mean()")
    if loss.is_complex():
        raise ValueError(f"{label} is complex ({loss.dtype}): a loss must be real, e.g. take .abs() or .real")
    # A loss that was computed in parallel is a DTensor; it becomes the number that every rank has.
    return loss.full_tensor() if hasattr(loss, "full_tensor") else loss


def value_of(
    losses: Mapping[str, Tensor | None],
    preferences: Mapping[str, float],
    plain: Tensor | None,
    elsewhere: Callable[[], torch.device],
) -> Tensor:
    """Return Σ r_i L_i (+ the plain loss), detached, float32 at least; on the first loss's device, or `elsewhere`."""
    terms = [(loss.detach(), preferences.get(name, 1.0)) for name, loss in losses.items() if loss is not None]
    if plain is not None:
        terms.append((plain.detach(), 1.0))
    if not terms:
        return torch.zeros((), device=elsewhere())
    device, total = terms[0][0].device, None
    for loss, preference in terms:
        wide = loss
        # The three calls take 10 µs per task.
        if loss.dtype != torch.float32 or loss.dim() or loss.device != device:
            wide = loss.reshape(()).to(device=device, dtype=torch.promote_types(loss.dtype, torch.float32))
        if preference != 1:
            wide = wide * preference
        total = wide if total is None else total + wide
    assert total is not None
    return total


def detached(loss: Tensor) -> Tensor:
    """Return a loss without its graph, as a tensor without dimensions."""
    alone = loss.detach()
    return alone.reshape(()) if alone.dim() else alone


def seed_of(gradient: Tensor | None, loss: Tensor) -> Tensor:
    """Return the gradient from which a loss's backward pass starts: one, or that of a scaled total."""
    if gradient is None:
        return torch.ones_like(loss)
    # The usual case; the two calls below take 12 µs.
    if gradient.shape == loss.shape and gradient.dtype == loss.dtype and gradient.device == loss.device:
        return gradient
    return gradient.to(device=loss.device, dtype=loss.dtype).reshape(loss.shape)


def check_row(name: str, tensors: Sequence[Tensor | None], parameters: list[Tensor]) -> Row:
    """Return a task's gradients as a row of copies, or raise a ValueError that names task and position."""
    given: object = tensors
    if not isinstance(given, Sequence) or len(given) != len(parameters):
        count = f"a list of {len(given)}" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        raise ValueError(
            f"gradients[{name!r}] is {count} for {len(parameters)} shared parameters: pass one tensor, "
            "or None, per parameter (those of shared=, else all that the optimizer trains)"
        )
    row = Row()
    for i, (g, p) in enumerate(zip(tensors, parameters, strict=True)):
        if g is None:
            continue
        if not isinstance(g, Tensor):
            raise ValueError(f"gradients[{name!r}][{i}] is a {type(g).__name__}: pass a tensor, or None")
        if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise ValueError(
                f"gradients[{name!r}][{i}] is {tuple(g.shape)} {g.dtype} on {g.device}, its parameter {tuple(p.shape)} "
                f"{p.dtype} on {p.device}: they must agree"
            )
        row[p] = laid_out(p, g.detach().clone())
    return row
