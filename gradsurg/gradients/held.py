"""p.grad, taken away while backward passes run, and given back: as it was, or with their result added."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradsurg.gradients.rows import Row, added

__all__ = ["HeldGradients", "deposit"]


class HeldGradients:
    """What stood in p.grad of some parameters; p.grad is None from now on.

    Args:
        parameters: The parameters. The list itself is kept.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self._standing = [(p, p.grad) for p in parameters]
        for p, _ in self._standing:
            p.grad = None

    def standing(self) -> Row:
        """Return what stood in p.grad."""
        return Row((p, gradient) for p, gradient in self._standing if gradient is not None)

    def lift(self) -> Row:
        """Return what backward passes left in p.grad, and leave it empty."""
        lifted = [(p, p.grad) for p, _ in self._standing if p.grad is not None]
        for p, _ in lifted:
            p.grad = None
        return Row(lifted)

    @torch.no_grad()
    def sorted(self, gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Row:
        """Return copies of the parameters' gradients; those of other leaves go into their own .grad.

        Copies, because what torch.autograd.grad returns may be expanded, or one tensor for several leaves.
        """
        mine = {id(p) for p, _ in self._standing}
        row = Row()
        for leaf, gradient in gradients:
            if gradient is None:
                continue
            if id(leaf) in mine:
                row[leaf] = gradient.clone()
            else:
                deposit(leaf, gradient)
        return row

    def restore(self) -> None:
        """Set p.grad to what it was."""
        for p, gradient in self._standing:
            p.grad = gradient

    @torch.no_grad()
    def add(self, *results: Row) -> None:
        """Set p.grad to what it was plus the results, in place as autograd does it."""
        self.restore()
        for p, gradient in (pair for result in results for pair in result.items()):
            if p.grad is None:
                p.grad = gradient
            elif p.grad.is_sparse or gradient.is_sparse:
                p.grad = added(p.grad, gradient)
            else:
                p.grad.add_(gradient)


@torch.no_grad()
def deposit(leaf: Tensor, gradient: Tensor) -> None:
    """Add a gradient to what stands in a leaf's own .grad; the gradient itself is left alone."""
    leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad + gradient
