"""Checks what a state dict says of the surgery, before anything of it is loaded. For optimizer.py and wrap()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.errors import warn
from gradsurg.gradients.rows import is_finite
from gradsurg.optimizer.checkpoint import FRESH, KEY, METHODS, unreadable, unsealed
from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import ElementwiseSurgery
from gradsurg.surgery.pipeline import Pipeline

__all__ = ["check_group", "checked"]

# Tasks of one trial: some surgeries look at all pairs.
TOGETHER = 32


def checked(
    optimizer: Optimizer, state_dict: dict[str, Any], inside: str, pipeline: Pipeline
) -> tuple[dict[str, Any], Any]:
    """Return a state dict whose entry can be used, and the averages `inside` its sealed piece, or None; see unsealed.

    State of other methods than those of the pipeline is dropped with a warning.

    Raises:
        ValueError: The entry has another version, or is none; the message says what is wrong, and what to do.
    """
    state_dict, averages = unsealed(state_dict, inside)
    _check_averages(averages, [p for group in optimizer.param_groups for p in group["params"]])
    for group in _first_groups(state_dict):
        if KEY in group:
            group[KEY] = _checked_entry(group[KEY], pipeline)
    return state_dict, averages


def check_group(optimizer: Optimizer, pipeline: Pipeline, inside: str) -> tuple[dict[str, Any], Any]:
    """Check what an optimizer brings to wrap(), because it loaded the checkpoint of a wrapped one; change nothing.

    Returns:
        What its first group has to hold under KEY (nothing, or the entry), and the averages or None; see `checked`.
    """
    clean, averages = checked(optimizer, {"param_groups": optimizer.param_groups[:1]}, inside, pipeline)
    group = clean["param_groups"][0]
    return {key: group[key] for key in (KEY,) if key in group}, averages


def _check_averages(averages: object, parameters: Sequence[Tensor]) -> None:
    """Raise a ValueError unless these are averages of gradients of the parameters, or None."""
    if averages is None:
        return
    if not isinstance(averages, dict):
        raise unreadable(f"its averages are a {type(averages).__name__}, not a dict")
    for name, tensors in averages.items():
        if not isinstance(name, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != len(parameters):
            raise unreadable(
                f"the averages of {name!r} are not one per parameter, of which there are {len(parameters)}"
            )
        for t, p in zip(tensors, parameters, strict=True):
            if t is not None and not (
                isinstance(t, Tensor)
                and t.shape == p.shape
                and t.is_complex() == p.is_complex()
                and (t.is_complex() or t.is_floating_point())
                and is_finite(t)
            ):
                raise unreadable(f"an average of {name!r} is no finite gradient of its parameter, {tuple(p.shape)}")


def _first_groups(state_dict: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the first parameter group, which `unsealed` has copied; it may lie deeper."""
    if groups := state_dict.get("param_groups"):
        yield groups[0]
        return
    for inner in state_dict.values():
        if isinstance(inner, dict):
            yield from _first_groups(inner)


# -- the entry ------------------------------------------------------------------------------------------------------


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _maps_to(kind: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and kind(each) for name, each in value.items())


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)


def _is_state(value: object) -> bool:
    return _maps_to(lambda each: isinstance(each, dict), value) and {*value} <= {"normalize", "surgery"}  # type: ignore[misc]


def _has(value: object, **parts: Callable[[object], bool]) -> bool:
    return value == {} or (isinstance(value, dict) and all(k in value and kind(value[k]) for k, kind in parts.items()))


def _counts(value: object) -> bool:
    return _maps_to(_is_count, value)


# Key of the entry -> what it must be, and the function that tells.
PARTS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "step": ("a count", _is_count),
    "state": ("a dict with dicts for 'normalize' and 'surgery'", _is_state),
    "skipped": ("a dict from task to count", _counts),
    "tasks": ("a list of different names", _is_names),
    "rotate": ("a dict with counts for 'last' and 'counts'", lambda v: _has(v, last=_counts, counts=_counts)),
    "refresh": (
        "a dict with finite 'weights' and their 'age'",
        lambda v: _has(v, weights=lambda each: _maps_to(_is_number, each), age=_is_count),
    ),
    METHODS: ("a dict of names", lambda v: _maps_to(lambda each: isinstance(each, str), v)),
}


def _checked_entry(entry: object, pipeline: Pipeline) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise unreadable(f"it is a {type(entry).__name__}, not a dict")
    version = entry.get("version")
    if type(version) is not int or version != FRESH["version"]:
        raise unreadable(
            f"its version is {version!r}, and this gradsurg reads version {FRESH['version']} (a newer gradsurg may "
            "have written it)"
        )
    if missing := FRESH.keys() - entry.keys():
        raise unreadable(f"it lacks {', '.join(map(repr, sorted(missing)))}")
    # Everyone's types are checked here; only the methods know what their own state must hold.
    for key, (what, holds) in PARTS.items():
        if key in entry and not holds(entry[key]):
            raise unreadable(f"{key!r} is {entry[key]!r:.80}, and must be {what}")
    theirs, ours = entry.get(METHODS, pipeline.methods), pipeline.methods
    state = {stage: _usable(stage, kept, theirs.get(stage), entry, pipeline) for stage, kept in entry["state"].items()}
    # Weights that another method found are not reused.
    dropped = {METHODS} if theirs == ours else {METHODS, "refresh"}
    return {k: v for k, v in {**entry, "state": state}.items() if k not in dropped}


def _usable(stage: str, kept: State, method: str | None, entry: dict[str, Any], pipeline: Pipeline) -> State:
    """Return the state of a stage, or none if another method kept it."""
    ours = pipeline.methods[stage]
    if not kept:
        return kept
    if method != ours:
        warn(
            f"the state dict holds what {stage}={method!r} remembers, and here it is {stage}={ours!r} (each with "
            "its version), which starts afresh. Wrap with the options of the run that was saved to go on as it would."
        )
        return {}
    if stage == "normalize":
        fits = _works(pipeline.normalizer.scales, kept, entry["tasks"])
    elif isinstance(pipeline.surgery, ElementwiseSurgery):
        fits = False
    else:
        # With levels of priority, each has a state of its own.
        parts = [kept] if pipeline.levels is None else list(kept.values())
        fits = all(isinstance(part, dict) and _works(pipeline.surgery.weights, part, entry["tasks"]) for part in parts)
    if not fits:
        raise unreadable(f"the state of {stage}={ours!r} fails when {ours!r} uses it: {kept!r:.80}")
    return kept


# -- what normaliser and surgery remember ---------------------------------------------------------------------------


def _works(method: Callable[[Problem, State], tuple[Tensor, State]], state: State, tasks: Sequence[str]) -> bool:
    """Tell whether a method can use this state: try it on made-up steps of all tasks that are known.

    Only the method knows what its state must be. If it fails on such steps without any state, this tells nothing.
    """
    for count in sorted({1, *_lengths(state)})[:TOGETHER]:
        for start in range(0, len(tasks), TOGETHER):
            names = tuple(tasks[start : start + TOGETHER])
            # A method that fails on made-up steps even without a state is not to blame the state for it.
            if not _runs(method, state, names, count) and _runs(method, {}, names, count):
                return False
    return True


def _runs(
    method: Callable[[Problem, State], tuple[Tensor, State]], state: State, names: tuple[str, ...], partitions: int
) -> bool:
    """Tell whether two steps return finite numbers, for this number of partitions of the parameters."""
    m = len(names)
    # Positive definite, and every two tasks conflict.
    gramian = torch.eye(m, dtype=torch.float64) * 2 - torch.ones(m, m, dtype=torch.float64) / m
    # The first step's is tiny: sums that begin below zero stay there.
    ones = torch.ones(m, dtype=torch.float64)
    problem = Problem(gramian.expand(partitions, m, m), ones, names, ones, torch.Generator().manual_seed(0))
    try:
        for scale in (1e-12, 1.0):
            numbers, state = method(replace(problem, gramian=problem.gramian * scale), state)
            if not bool(torch.isfinite(numbers).all()) or not _is_plain(state):
                return False
    except Exception:
        return False
    return True


def _is_plain(value: object) -> bool:
    """Tell whether this holds only finite numbers, texts, and dicts and lists of them."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return is_finite(value) if isinstance(value, Tensor) else isinstance(value, (str, bool)) or _is_number(value)


def _lengths(value: object) -> Iterator[int]:
    """Yield the numbers of partitions that a state may be for: how long its lists and tensors are."""
    if isinstance(value, Tensor):
        yield max(value.numel(), 1)
    elif isinstance(value, (list, tuple)) and value:
        yield len(value)
    if isinstance(value, (list, tuple, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _lengths(each)
