"""Functions instead of losses: each task's forward pass runs just before its backward pass, and no graph is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.losses import Compute, check_scalar

__all__ = ["evaluate", "explain"]


def evaluate(name: str, compute: Compute) -> Tensor | None:
    """Return the loss that a function computes now; None where the task is absent from this step.

    Raises:
        ValueError: What it returns is no real scalar tensor.
    """
    with torch.enable_grad():
        loss = compute()
    loss = None if loss is None else check_scalar(f"losses[{name!r}]()", loss)
    return loss if loss is not None and loss.requires_grad else None


def explain(name: str, error: RuntimeError) -> BaseException:
    """Return what to raise where a function's backward pass found its graph used up."""
    if "backward through the graph a second time" not in str(error):
        return error
    return MultiTaskError(
        f"the function of {name!r} reads tensors that another function's backward pass went through already: compute "
        "them anew inside of each function, or pass retain_graph=True to keep what they share"
    )
