"""The options of wrap(), and the checks of each one and of their combinations."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurg.errors import choose
from gradsurg.linalg.kernels import dispatch
from gradsurg.normalize import NORMALIZERS, Normalizer, resolve_normalizer
from gradsurg.surgery import SURGERIES, Surgery, resolve_surgery
from gradsurg.surgery.base import ElementwiseSurgery
from gradsurg.surgery.margin import named, parse_margin
from gradsurg.surgery.pipeline import GUARANTEES, Pipeline, check_mapping
from gradsurg.surgery.priority import AUXILIARY, check_names, parse_levels

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["DEFAULT_GUARANTEE", "Options", "WrapOptions", "check_options", "naming_the_nearest_option"]

GRANULARITIES = {name: name for name in ("model", "group", "tensor")}
# The default as an object of its own: this tells a guarantee that was asked for from one that was not.
DEFAULT_GUARANTEE = str(b"update", "ascii")
NONFINITE = {name: name for name in ("propagate", "skip_task", "raise")}
COUNT = "a whole number of at least 1"


class WrapOptions(TypedDict, total=False):
    """The options of `wrap`, for type checkers; a test compares them with its signature."""

    normalize: str | Normalizer
    surgery: str | Surgery
    primary: str | Sequence[Any] | None
    auxiliary: str
    preferences: Mapping[str, float] | None
    guarantee: str
    margin: float | Mapping[str, float]
    granularity: str
    model: nn.Module | None
    tasks: Sequence[str] | None
    shared: nn.Module | Iterable[Tensor] | None
    row_dtype: torch.dtype | None
    nonfinite: str
    atomic: bool
    backend: str
    seed: int
    refresh_every: int
    rotate: int | None
    batched: bool
    check_sync_every: int


@dataclass(frozen=True)
class Options:
    """The options of wrap(), checked."""

    pipeline: Pipeline
    guarantee: str
    preferences: Mapping[str, float]
    granularity: str
    tasks: tuple[str, ...] | None
    shared: tuple[Tensor, ...] | None
    row_dtype: torch.dtype | None
    nonfinite: str
    atomic: bool
    backend: str
    seed: int
    refresh_every: int
    rotate: int | None
    batched: bool
    check_sync_every: int
    guarantee_asked: bool
    # Whether any option names tasks, and so may name one that does not exist.
    names_tasks: bool

    def agreed(self) -> dict[str, str]:
        """Return the options that have to be the same on all ranks, as text."""
        p = self.pipeline
        given: dict[str, object] = {
            "normalize": p.normalizer,
            "surgery": p.surgery,
            "primary": p.levels,
            "auxiliary": p.auxiliary,
        }
        given |= {"guarantee": self.guarantee, "margin": p.margin, "preferences": sorted(self.preferences.items())}
        given |= {"shared": None if self.shared is None else [tuple(t.shape) for t in self.shared]}
        same = "granularity tasks row_dtype nonfinite seed refresh_every rotate batched check_sync_every"
        given |= {name: getattr(self, name) for name in same.split()}
        # A surgery of one's own may print its address.
        return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in given.items()}

    def check_names(self, known: Iterable[str], preferences: Iterable[str] = ()) -> None:
        """Raise a ValueError if an option, or the step's own preferences, name a task that is not known."""
        check_names(self.pipeline.levels, known)
        check_names(((*self.preferences, *preferences),), known, "preferences")
        check_names((named(self.pipeline.margin),), known, "margin")

    def preferring(self, preferences: Mapping[str, float]) -> Options:
        """Return the options with other preferences, those of one step."""
        return replace(self, preferences={**self.preferences, **preferences})


def naming_the_nearest_option(function: F) -> F:
    """Return the function with an error for unknown options that names the nearest known one."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                hint = _option_of_a_method(name, options) or hint
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint} The options are "
                    f"{', '.join(known[1:])}."
                )
        return function(*arguments, **options)

    return cast(F, checked)


def _option_of_a_method(name: str, options: Mapping[str, Any]) -> str:
    """Say how to build the method that was asked for with this option, if it is one of the method's."""
    for argument, known in (("surgery", SURGERIES), ("normalize", NORMALIZERS)):
        method = options.get(argument)
        cls: Any = known.get(method) if isinstance(method, str) else None
        if cls is not None and name in {field.name for field in fields(cls)}:
            built = f"gradsurg.{argument}.{cls.__name__}({name}={options[name]!r})"
            return f" It is an option of the method: pass {argument}={built}."
    return ""


def check_options(optimizers: Sequence[Optimizer], given: WrapOptions) -> Options:
    """Return checked options; `given` has all options of `wrap`, and a wrong one is an error that names the fix."""
    guarantee = choose("guarantee", given["guarantee"], GUARANTEES)
    names, levels = _names(given["tasks"]), parse_levels(given["primary"])
    preferences, margin = check_mapping("preferences", given["preferences"]), parse_margin(given["margin"])
    if margin and guarantee == "none":
        raise ValueError(
            f"margin={given['margin']!r} is part of a guarantee: use guarantee='update' or 'gradient' with it"
        )
    if names is not None:
        check_names(levels, names)
        check_names((tuple(preferences),), names, "preferences")
        check_names((named(margin),), names, "margin")
    dtype, rotate = given["row_dtype"], given["rotate"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"row_dtype={dtype!r}: pass a floating dtype such as torch.bfloat16, or None")
    surgery = resolve_surgery(given["surgery"])
    options = Options(
        pipeline=Pipeline(
            normalizer=resolve_normalizer(given["normalize"]),
            surgery=surgery,
            levels=levels,
            auxiliary=choose("auxiliary", given["auxiliary"], AUXILIARY),
            guarantee=guarantee,
            margin=margin,
        ),
        guarantee=guarantee,
        preferences=preferences,
        granularity=choose("granularity", given["granularity"], GRANULARITIES),
        tasks=names,
        shared=_shared(given["shared"], optimizers),
        row_dtype=dtype,
        nonfinite=choose("nonfinite", given["nonfinite"], NONFINITE),
        atomic=_flag("atomic", given["atomic"]),
        backend=_backend(given["backend"], surgery, bool(margin), optimizers),
        seed=_whole("seed", given["seed"], 0, "a nonnegative integer"),
        refresh_every=_whole("refresh_every", given["refresh_every"], 1, COUNT),
        rotate=None if rotate is None else _whole("rotate", rotate, 1, COUNT),
        batched=_flag("batched", given["batched"]),
        check_sync_every=_whole("check_sync_every", given["check_sync_every"], 0, "a whole number, 0 for never"),
        guarantee_asked=given["guarantee"] is not DEFAULT_GUARANTEE,
        names_tasks=bool(levels or preferences or margin),
    )
    _check_cheap(options)
    return options


def _check_cheap(options: Options) -> None:
    if options.refresh_every == 1:
        return
    if options.rotate is not None:
        raise ValueError("refresh_every and rotate both save backward passes, each in its own way: choose one")
    if options.granularity != "model":
        raise ValueError(
            f"refresh_every={options.refresh_every} needs granularity='model', and it is {options.granularity!r}: "
            "one backward pass of a weighted sum has one weight per task"
        )
    if isinstance(options.pipeline.surgery, ElementwiseSurgery):
        raise ValueError(
            f"refresh_every={options.refresh_every} reuses weights, and this surgery has none: it decides number by "
            "number. Use one that weighs, such as surgery='cone'."
        )


def _whole(argument: str, value: int, least: int, what: str) -> int:
    # Whole numbers of other types, such as numpy's, have an index; True has one too, and is no number here.
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{argument}={value!r}: pass {what}")
    return operator.index(value)


def _flag(argument: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{argument}={value!r}: pass True or False")
    return value


def _names(tasks: Sequence[str] | None) -> tuple[str, ...] | None:
    if tasks is None:
        return None
    filled = isinstance(tasks, Collection) and len(tasks) > 0 and not isinstance(tasks, str)
    if not filled or not all(isinstance(name, str) for name in tasks):
        raise ValueError(f"tasks={tasks!r}: pass the names as a list of strings, such as ['segment', 'depth']")
    # The names belong to a list of losses in this order, and a set has another order in each process.
    if isinstance(tasks, (set, frozenset)):
        raise ValueError(f"tasks={tasks!r} is a set, which has no order: pass a list")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks={list(tasks)!r} has a name twice: names must differ")
    return tuple(tasks)


def _backend(backend: str, surgery: Surgery, margin: bool, optimizers: Sequence[Optimizer]) -> str:
    """Return the backend; one that is asked for by name and cannot run is an error now, not in the first step."""
    backend = choose("backend", backend, dispatch.BACKENDS)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for device in {p.device for p in held}:
        dispatch.path(backend, device)
    if backend == "triton" and isinstance(surgery, ElementwiseSurgery):
        raise dispatch.cannot_run(f"surgery={surgery.name!r} decides number by number, for which there is no kernel")
    if backend == "triton" and margin:
        raise dispatch.cannot_run("margin= is kept on the host so far")
    return backend


def _shared(shared: nn.Module | Iterable[Tensor] | None, optimizers: Sequence[Optimizer]) -> tuple[Tensor, ...] | None:
    if shared is None:
        return None
    if isinstance(shared, Tensor):
        raise ValueError("shared is one tensor: pass a list of parameters, or a module such as model.encoder")
    if not isinstance(shared, (nn.Module, Iterable)):
        raise ValueError(f"shared={shared!r}: pass a list of parameters, or a module such as model.encoder")
    parameters = tuple(shared.parameters() if isinstance(shared, nn.Module) else shared)
    if not parameters:
        raise ValueError("shared is empty (a used-up generator?): pass model.encoder, or leave it out to have it found")
    if not all(isinstance(p, Tensor) for p in parameters):
        raise ValueError("shared must hold parameters: pass model.encoder, or model.encoder.parameters()")
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    strangers = sum(p not in held for p in parameters)
    if strangers:
        raise ValueError(
            f"shared has {strangers} of {len(parameters)} parameters that the optimizer does not train: pass only "
            "parameters of its groups"
        )
    return parameters
