"""Parameters of a tensor class that is not torch's: on a manifold, quantised. Only their optimizer may move them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradsurg.errors import warn
from gradsurg.linalg.movement import inner_update

__all__ = ["check_foreign", "is_foreign"]


def is_foreign(parameter: Tensor) -> bool:
    """Tell whether a parameter's class comes from elsewhere: a sum with a gradient may leave what it stands for."""
    return type(parameter).__module__.partition(".")[0] != "torch"


@torch.no_grad()
def check_foreign(parameters: Iterable[Tensor]) -> None:
    """Warn that the guarantee leaves foreign parameters alone; refuse those whose movement cannot be measured.

    Raises:
        TypeError: A parameter cannot be subtracted from its copy.
    """
    foreign = [p for p in parameters if is_foreign(p)]
    for p in foreign:
        old = p.detach()
        try:
            inner_update([[torch.zeros(p.shape, device=p.device)]], [old.clone()], [old], [1.0])
        except Exception as error:
            raise TypeError(
                f"guarantee='update' has to subtract a parameter from its copy, which {type(p).__name__} of shape "
                f"{tuple(p.shape)} does not do ({type(error).__name__}: {error}). Use guarantee='gradient'."
            ) from error
    if foreign:
        names = sorted({type(p).__name__ for p in foreign})
        warn(
            f"guarantee='update' leaves parameters of class {', '.join(names)} as their optimizer moves them, because "
            "adding a gradient to such a tensor may break what it stands for. Their movement counts; a conflict is "
            "mended by the other parameters, or the step is taken back."
        )
