"""gradsurg.weights and gradsurg.combine: the methods without an optimizer, for research and tests."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradsurg.errors import choose
from gradsurg.linalg.elementwise import elementwise_direction
from gradsurg.linalg.gramian import gramian
from gradsurg.normalize import Normalizer, Unscaled, resolve_normalizer
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.tolerances import ROUNDING_EXACT
from gradsurg.surgery import Surgery, resolve_surgery
from gradsurg.surgery.base import ElementwiseSurgery, check_gramian
from gradsurg.surgery.margin import Margin
from gradsurg.surgery.pipeline import GUARANTEES, Pipeline, settled
from gradsurg.surgery.pipeline_small import MOST, knows, solve
from gradsurg.surgery.priority import AUXILIARY, parse_levels

__all__ = ["combine", "make_pipeline", "numbers_of", "row_names", "weights"]


# The default margin. `is` tells it from every other margin, whatever its type, in 0.03 µs.
_NO_MARGIN = 0.0
_UNSCALED = Unscaled()
_NOT_DRAWN_FROM = torch.Generator()


def weights(
    gramian: Tensor,
    surgery: str | Surgery = "cone",
    *,
    normalize: str | Normalizer = "none",
    primary: int | Sequence[Any] | None = None,
    auxiliary: str = "protect",
    preferences: Tensor | Sequence[float] | Mapping[int, float] | None = None,
    guarantee: str = "none",
    margin: float | Sequence[float] | Mapping[int, float] = _NO_MARGIN,
    losses: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the weights w of u = Σ w_i g_i, from inner products alone.

    Args:
        gramian: G_ij = ⟨g_i, g_j⟩, shape (..., m, m), any floating dtype and device. The problem is solved in float64.
        surgery: A name or a Surgery.
        normalize: A name or a Normalizer. The default here is "none": the caller decides what the rows are.
        primary: Index of the primary row, or levels of indices such as [[0], [1, 2], [3]].
        auxiliary: "protect" or "help": what rows below the primary do (see gradsurg.wrap).
        preferences: r_i > 0, one per row, or a dict from row to number (1 for the others).
        guarantee: "gradient" projects whatever the surgery returns onto the dual cone; "none" does not.
        margin: τ in [0, 1), one number, one per row, or a dict from row to number (0 for the others): ask for
            ⟨u, g_i⟩ ≥ τ_i ‖g_i‖ ‖t‖ / √m, with t the plain sum, and not only for no conflict. If no direction of length
            ‖t‖ keeps all margins, all are scaled down by one common factor. Implies guarantee="gradient".
        losses: The m loss values, for the normalisers that need them.
        generator: Source of random choices, for methods that make any.

    Returns:
        Weights of shape (..., m), with the Gramian's dtype and device. No gradient flows through them.

    Raises:
        ValueError: For a wrong name, shape, dtype or value; the message lists what is valid.
        TypeError: For a Gramian that is no tensor.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
        >>> gradsurg.weights(G, surgery="cone").tolist()  # row 0 is protected from the louder row 1
        [2.0, 1.0]
        >>> gradsurg.weights(G, surgery="sum").tolist()
        [1.0, 1.0]
    """
    shape = _tensor("gramian", gramian, "(..., m, m)").shape
    # 1 µs in all, of the 4 µs that "sum" and "mean" may take.
    if (
        normalize == "none"
        and guarantee == "none"
        and margin is _NO_MARGIN
        and primary is None
        and preferences is None
        and auxiliary in AUXILIARY
        and len(shape) == 2
        and 0 < shape[0] == shape[1]
        and gramian.is_cpu
        and gramian.is_floating_point()
    ):
        return _weights_plainly(gramian, shape[0], surgery, generator)
    if len(shape) < 2 or shape[-1] != shape[-2] or not gramian.is_floating_point():
        raise ValueError(
            f"gramian has shape {tuple(shape)}, dtype {gramian.dtype}: it must be a floating (..., m, m) matrix"
        )
    m = shape[-1]
    if m == 0:
        raise ValueError("gramian has no rows: at least one task is needed")
    check_gramian(gramian)
    if guarantee == "update":
        raise ValueError("guarantee='update' needs an optimizer's update: use 'gradient' here, or gradsurg.wrap")
    levels = None if primary is None else _levels(primary, m)
    pipeline = make_pipeline(surgery, normalize, levels, auxiliary, guarantee, _margin(margin, m))
    with torch.no_grad():
        problem = Problem(
            gramian=gramian.detach().double(),
            preferences=numbers_of(preferences, m, gramian.device),
            tasks=row_names(m),
            losses=None if losses is None else losses.detach().double(),
            generator=generator,
        )
        return pipeline.weights(problem).to(gramian.dtype)


def combine(J: Tensor, surgery: str | Surgery = "cone", **options: Any) -> Tensor:
    """Return the direction u = Σ w_i g_i of the rows of J.

    Args:
        J: One gradient per row, shape (m, P) with m, P ≥ 1, any real floating dtype and device.
        surgery: A name or a Surgery.
        **options: As for `weights`.

    Returns:
        u, shape (P,), J's dtype. The Gramian and the sum are formed in float64.

    Raises:
        ValueError, TypeError: As for `weights`.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
        >>> gradsurg.combine(J, surgery="cone").tolist()  # the plain sum is (-1, 1) and hurts row 0
        [0.0, 1.0]
        >>> gradsurg.combine(J, surgery="sum", guarantee="gradient").tolist()
        [0.0, 1.0]
    """
    if _tensor("J", J, "(m, P)").ndim != 2 or not J.is_floating_point():
        raise ValueError(f"J has shape {tuple(J.shape)}, dtype {J.dtype}: it must be a real floating (m, P) matrix")
    surgery = _by_name(surgery) if type(surgery) is str else _resolved(surgery)
    # Conversions to the same dtype would take 3 µs.
    plain = J.dtype is torch.float64 and not J.requires_grad
    exact = J if plain else J.detach().double()
    if not options and isinstance(surgery, ElementwiseSurgery) and J.numel() > 0:
        u = _combine_plainly(exact, surgery)
        return u if plain else u.to(J.dtype)
    with torch.no_grad():
        G = gramian([[row] for row in exact], exact=True)
        if isinstance(surgery, ElementwiseSurgery) and J.shape[0] > 0:
            return _combine_elementwise(exact, G, surgery, **options).to(J.dtype)
        return (weights(G.to(J.device), surgery, **options) @ exact).to(J.dtype)


def _tensor(name: str, given: object, shape: str) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}: pass a tensor of shape {shape}")
    return given


def _weights_plainly(gramian: Tensor, m: int, surgery: str | Surgery, generator: torch.Generator | None) -> Tensor:
    """Ask the surgery alone about one Gramian on the CPU: no option calls for another stage of the pipeline."""
    dtype = gramian.dtype
    reads, known = _known(surgery, m)
    if known is not None and generator is None and (reads == "nothing" or 0.0 not in gramian.diagonal().tolist()):
        found = torch.frombuffer(array("d", known), dtype=torch.float64)
        return found if dtype is torch.float64 else found.to(dtype)
    check_gramian(gramian)
    surgery = _resolved(surgery)
    # The cone of few tasks, by the function that solves the default step: 8 tasks take 50 µs, tensor by tensor 110.
    if m <= MOST and knows(_UNSCALED, surgery) and isfinite(sum(map(sum, rows := gramian.tolist()))):
        numbers = solve(rows, [1.0] * m, _UNSCALED, surgery.conflict_free, ROUNDING_EXACT)[0]
        return torch.frombuffer(array("d", numbers), dtype=torch.float64).to(dtype)
    exact = gramian.detach().double()
    problem = Problem(exact, exact.new_ones(m), row_names(m), generator=generator)
    found, _ = surgery.weights(problem, {})
    return (settled(problem, found) if surgery.conflict_free else found).detach().to(dtype)


@functools.lru_cache(maxsize=64)
def _known(surgery: str | Surgery, m: int) -> tuple[str, array[float] | None]:
    """Return what the weights depend on, and those of m gradients that are not zero if no more is asked of them."""
    surgery = resolve_surgery(surgery)
    if surgery.reads == "products":
        return surgery.reads, None
    gramian = torch.eye(m, dtype=torch.float64)
    found, _ = surgery.weights(Problem(gramian, gramian.new_ones(m), row_names(m)), {})
    return surgery.reads, array("d", found.tolist())


def _combine_plainly(rows: Tensor, surgery: ElementwiseSurgery) -> Tensor:
    """Combine without options. That needs no Gramian, which takes ten times as long as sorting the columns."""
    m, size = rows.shape
    # One number of every row: if none of them is zero, no row is. To ask all numbers takes 7 µs.
    if 0.0 in (rows.diagonal() if m <= size else rows[:, 0]).tolist():
        rows = rows[rows.any(1)]
        if len(rows) == 0:
            return rows.new_zeros(rows.shape[1])
    return surgery.combine(rows, None, torch.Generator().manual_seed(0) if surgery.draws else _NOT_DRAWN_FROM)


def _combine_elementwise(
    exact: Tensor,
    G: Tensor,
    surgery: ElementwiseSurgery,
    *,
    normalize: str | Normalizer = "none",
    preferences: Tensor | Sequence[float] | Mapping[int, float] | None = None,
    guarantee: str = "none",
    losses: Tensor | None = None,
    generator: torch.Generator | None = None,
    **others: Any,
) -> Tensor:
    if others:
        raise ValueError(f"surgery={surgery.name!r} treats every number by itself and has no use for {sorted(others)}")
    scales = weights(G, "sum", normalize=normalize, guarantee=guarantee, losses=losses)
    # The call above has checked the name of the guarantee; scales are those without it.
    if guarantee != "none":
        scales = weights(G, "sum", normalize=normalize, losses=losses)
    pull = numbers_of(preferences, len(exact), torch.device("cpu"))
    rows, draws = [[row] for row in exact], [generator or torch.Generator().manual_seed(0)]
    found = elementwise_direction(
        surgery.combine, rows, [exact[0]], scales.tolist(), pull, draws, guarantee=guarantee == "gradient"
    )
    return found.direction[0]


def _resolved(surgery: str | Surgery) -> Surgery:
    return _by_name(surgery) if isinstance(surgery, str) else resolve_surgery(surgery)


_by_name = functools.lru_cache(maxsize=64)(resolve_surgery)


@functools.lru_cache(maxsize=64)
def make_pipeline(
    surgery: str | Surgery,
    normalize: str | Normalizer,
    levels: tuple[tuple[str, ...], ...] | None,
    auxiliary: str,
    guarantee: str,
    margin: Margin,
) -> Pipeline:
    """Return the pipeline of these options, checked."""
    return Pipeline(
        normalizer=resolve_normalizer(normalize),
        surgery=resolve_surgery(surgery),
        levels=levels,
        auxiliary=choose("auxiliary", auxiliary, AUXILIARY),
        guarantee=choose("guarantee", guarantee, GUARANTEES),
        margin=margin,
    )


@functools.lru_cache(maxsize=64)
def row_names(m: int) -> tuple[str, ...]:
    """Return what rows without names are called."""
    return tuple(map(str, range(m)))


def _levels(primary: int | Sequence[Any], m: int) -> tuple[tuple[str, ...], ...] | None:
    nested: list[Any] = [[primary]] if isinstance(primary, int) else list(primary)
    as_names: list[Any] = [[str(i) for i in item] if isinstance(item, Sequence) else str(item) for item in nested]
    levels = parse_levels(as_names)
    if not {name for level in levels or () for name in level} <= set(row_names(m)):
        raise ValueError(f"primary={primary!r}: the rows are 0 … {m - 1}")
    return levels


def _margin(value: object, m: int) -> Margin:
    # No margin: what follows takes 5 µs for 8 rows, of the 40 µs of a call.
    if isinstance(value, float) and value == 0:
        return ()
    numbers: list[Any] | None = None
    if isinstance(value, Mapping) and set(value) <= set(range(m)):
        numbers = [value.get(i, 0.0) for i in range(m)]
    elif isinstance(value, (Sequence, Tensor)) and len(value) == m:
        numbers = list(value)
    elif isinstance(value, Real):
        numbers = [value] * m
    if numbers is None or not all(0 <= float(number) < 1 for number in numbers):
        raise ValueError(f"margin={value!r}: pass a number in [0, 1), {m} of them, or a dict from row (0 … {m - 1})")
    return tuple((name, float(number)) for name, number in zip(row_names(m), numbers, strict=True) if float(number) > 0)


def numbers_of(value: Tensor | Sequence[float] | Mapping[int, float] | None, m: int, device: torch.device) -> Tensor:
    """Return preferences as m checked numbers."""
    if value is None:
        return torch.ones(m, dtype=torch.float64, device=device)
    if isinstance(value, Mapping):
        if not set(value) <= set(range(m)):
            raise ValueError(f"preferences={dict(value)!r}: the rows are 0 … {m - 1}")
        value = [value.get(i, 1.0) for i in range(m)]
    preferences = torch.as_tensor(value, dtype=torch.float64, device=device)
    if preferences.shape != (m,) or not bool(((preferences > 0) & preferences.isfinite()).all()):
        raise ValueError(f"preferences={value!r}: pass {m} positive finite numbers, one per row")
    return preferences
