"""The rows of a step: for each task, one gradient tensor per parameter. For every room above."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from gradsurg.linalg.packing import GradientTable
from gradsurg.linalg.sparse import added

__all__ = ["ByParameter", "HeldGradients", "Row", "TaskRows", "added", "deposit", "is_finite", "laid_out"]

V = TypeVar("V")


class ByParameter(Generic[V]):
    """A dict from tensors to values, by the tensors' identity, in the order of insertion.

    A real dict would call Tensor.__hash__, which is Python code, and compare tensors, which gives tensors. The keys are
    kept alive, so that no id can come to mean another tensor.
    """

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[Tensor, V]] = ()) -> None:
        self._pairs = {id(pair[0]): pair for pair in pairs}

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Tensor]:
        return (pair[0] for pair in self._pairs.values())

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._pairs

    def __getitem__(self, parameter: Tensor) -> V:
        pair = self._pairs.get(id(parameter))
        if pair is None:
            raise KeyError(f"no entry for the parameter of shape {tuple(parameter.shape)}")
        return pair[1]

    def __setitem__(self, parameter: Tensor, value: V) -> None:
        self._pairs[id(parameter)] = (parameter, value)

    def get(self, parameter: Tensor) -> V | None:
        """Return the value, or None if there is none."""
        pair = self._pairs.get(id(parameter))
        return None if pair is None else pair[1]

    def pop(self, parameter: Tensor) -> V | None:
        """Remove an entry and return its value, or None if there is none."""
        pair = self._pairs.pop(id(parameter), None)
        return None if pair is None else pair[1]

    def items(self) -> Collection[tuple[Tensor, V]]:
        """Return the pairs (parameter, value)."""
        return self._pairs.values()

    def values(self) -> list[V]:
        """Return the values."""
        return [pair[1] for pair in self._pairs.values()]

    def at(self, parameters: Iterable[Tensor]) -> list[V | None]:
        """Return the value of each of these parameters, or None if there is none."""
        find = self._pairs.get
        return [pair[1] if (pair := find(key)) else None for key in map(id, parameters)]

    def ids(self) -> Collection[int]:
        """Return id(parameter) of each entry."""
        return self._pairs.keys()

    def update(self, other: ByParameter[V]) -> None:
        """Take over all entries of another."""
        self._pairs.update(other._pairs)

    def copy(self) -> ByParameter[V]:
        """Return another with the same entries."""
        return ByParameter(self._pairs.values())


if TYPE_CHECKING:
    Row = ByParameter[Tensor]
else:
    # Calling ByParameter[Tensor] takes twice as long as calling ByParameter, and a step makes thirty rows.
    Row = ByParameter


class TaskRows:
    """The task gradients gathered since the last step, in the order in which the tasks first came.

    Gradients of the same task add up, as they do in `p.grad`. A task's row lacks the parameters that its backward
    passes did not reach; this tells shared from task-specific parameters.

    Args:
        dtype: The dtype in which gradients of shared parameters are stored (row_dtype); None keeps theirs. A parameter
            that only one task reached keeps its gradient to the bit, and so do complex and sparse ones.

        declared: The parameters that count as shared, if the user said so. All others keep their gradients to the bit.

    Attributes:
        overflowed: Tasks of which a finite gradient became infinite in that dtype.
        blank: Zeros of parameters that no task reached, but for which compiled code returned a gradient.
    """

    def __init__(self, dtype: torch.dtype | None = None, declared: Sequence[Tensor] | None = None) -> None:
        self.dtype = dtype
        self.overflowed: set[str] = set()
        self._declared = None if declared is None else frozenset(map(id, declared))
        self.blank: Row | None = None
        self._rows: dict[str, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def add(self, name: str, gradients: Row | Mapping[Tensor, Tensor], standing: Row | None = None) -> None:
        """Add a task's gradients to its row, which owns them now; what is `standing` in p.grad is not changed."""
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = gradients if isinstance(gradients, ByParameter) else Row(gradients.items())
        else:
            for parameter, gradient in gradients.items():
                before = row.get(parameter)
                in_p_grad = standing is not None and standing.get(parameter) is before
                # A sum of two narrow gradients may not fit into their dtype either.
                if before is not None and before.dtype == self.dtype:
                    before = before.to(parameter.dtype)
                row[parameter] = added(before, gradient, in_place=not in_p_grad)
        if self.dtype is not None:
            self._narrow(row)

    def merge(self, other: TaskRows, standing: Row | None = None) -> None:
        """Add all rows of `other`, which must not be used afterwards; see `add`."""
        self.overflowed |= other.overflowed
        for name in other:
            self.add(name, other[name], standing)
        if other.blank is not None:
            self.leave_blank(other.blank)

    def leave_blank(self, zeros: Row) -> None:
        """Remember zeros of parameters that no task reached."""
        self.blank = self.blank or Row()
        self.blank.update(zeros)

    def drop(self, name: str) -> Row:
        """Take a task's row out and return it."""
        return self._rows.pop(name)

    def nonfinite(self) -> list[str]:
        """Return the tasks that have a NaN or an infinity."""
        return [name for name, row in self._rows.items() if not all(map(is_finite, row.values()))]

    def shared(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters that at least two tasks reached."""
        once: set[int] = set()
        twice: set[int] = set()
        for row in self._rows.values():
            twice.update(once.intersection(row.ids()))
            once.update(row.ids())
        return [p for p in parameters if id(p) in twice]

    def split(self, parameters: Sequence[Tensor], declared: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Row]:
        """Return the shared parameters, and the plain gradients of all others that a task reached.

        Args:
            parameters: What is trained.
            declared: Those that count as shared if a task reached them; None is those that at least two tasks reached.
        """
        if declared is None:
            shared = self.shared(parameters)
        else:
            members = set(map(id, declared))
            shared = [p for p in parameters if id(p) in members and self.of(p)]
        members = set(map(id, shared))
        own = Row()
        for p in parameters:
            if id(p) not in members and (gradients := self.of(p)):
                own[p] = functools.reduce(added, gradients)
        own.update(self.untouched())
        return shared, own

    def untouched(self) -> Row:
        """Return the zeros that compiled code returned for parameters that no task reached."""
        return Row() if self.blank is None else Row((p, zeros) for p, zeros in self.blank.items() if not self.of(p))

    def table(self, parameters: Sequence[Tensor]) -> GradientTable:
        """Return m lists of one gradient (or None) per parameter."""
        return GradientTable(row.at(parameters) for row in self._rows.values())

    def of(self, parameter: Tensor) -> list[Tensor]:
        """Return the gradients of one parameter, one per task that reached it."""
        return [row[parameter] for row in self._rows.values() if parameter in row]

    def _narrow(self, row: Row) -> None:
        """Convert the gradients of this row's parameters that are shared by now, in all rows."""
        assert self.dtype is not None
        for parameter in row if self._declared is None else [p for p in row if id(p) in self._declared]:
            holders = [(name, other) for name, other in self._rows.items() if parameter in other]
            if len(holders) < 2 or not parameter.is_floating_point():
                continue
            for name, holder in holders:
                wide = holder[parameter]
                if wide.is_sparse or wide.dtype == self.dtype:
                    continue
                holder[parameter] = narrow = wide.to(self.dtype)
                # bfloat16 has the range of float32, so nothing is read then.
                if torch.finfo(self.dtype).max < torch.finfo(wide.dtype).max / 2 and _overflows(wide, narrow):
                    self.overflowed.add(name)


def _overflows(wide: Tensor, narrow: Tensor) -> bool:
    return bool((narrow.isinf() & wide.isfinite()).any())


def is_finite(gradient: Tensor) -> bool:
    """Whether a gradient has neither NaN nor infinity."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(torch.isfinite(values).all())


class HeldGradients:
    """Takes away what stands in p.grad of some parameters, and can put it back; p.grad is None meanwhile."""

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
                row[leaf] = laid_out(leaf, gradient.clone())
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
            p.grad = laid_out(p, added(p.grad, gradient, in_place=True))


@torch.no_grad()
def deposit(leaf: Tensor, gradient: Tensor) -> None:
    """Add a gradient to what stands in a leaf's own .grad; the gradient itself is left alone."""
    leaf.grad = laid_out(leaf, gradient.clone() if leaf.grad is None else leaf.grad + gradient)


def laid_out(p: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the strides that autograd gives p.grad: those of p if it is dense, else contiguous ones.

    Fused optimizers read p and p.grad in the order of the memory, whatever their strides say.
    """
    if type(gradient) is not Tensor or gradient.layout is not torch.strided or gradient.stride() == p.stride():
        return gradient
    like = torch.empty_like(p, dtype=gradient.dtype, requires_grad=False)
    return like.copy_(gradient) if like.stride() == p.stride() else gradient.contiguous()
