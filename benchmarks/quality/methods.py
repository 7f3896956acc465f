"""The table of methods: what each hands to gradsurg.wrap, or that it is not wrapped at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.problems import Problem
from gradsurg.normalize import PriorLoss

__all__ = ["DEFAULT", "METHODS", "STATIC", "SUBSET", "SUM", "TIERS", "Method", "methods_for", "tier"]

SUM, STATIC, DEFAULT = "sum", "static", "default"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As in the cache.
        title: As in the report.
        group: "baselines", "normalisers alone", "surgeries alone", "gradsurg" or "primary".
        options: Problem -> keyword arguments of gradsurg.wrap; None for a bare optimizer and a weighted sum.
        searches_weights: Whether part of the trials are with static weights that are drawn.
        wide: Whether to take the problem's larger model.
        trials: How many times the common budget of trials it gets.
    """

    name: str
    title: str
    group: str
    options: Callable[[Problem], dict[str, Any]] | None = None
    searches_weights: bool = False
    wide: bool = False
    trials: int = 1


def _fixed(**options: Any) -> Callable[[Problem], dict[str, Any]]:
    return lambda problem: options


def _normalizer(name: str) -> Method:
    plain = {"surgery": "sum", "guarantee": "none"}
    if name == "prior_loss":
        return Method(
            name, name, "normalisers alone", lambda problem: {**plain, "normalize": PriorLoss(problem.priors())}
        )
    return Method(name, name, "normalisers alone", _fixed(**plain, normalize=name))


def _surgery(name: str) -> Method:
    return Method(name, name, "surgeries alone", _fixed(surgery=name, normalize="none", guarantee="none"))


def _gradsurg(name: str, title: str, **options: Any) -> Method:
    return Method(name, title, "gradsurg", _fixed(**options))


def _primary(name: str, title: str, **options: Any) -> Method:
    return Method(name, title, "primary", lambda problem: {"primary": problem.primary, **options})


# fmt: off
NORMALIZERS = (
    "norm", "loss", "initial_loss", "prior_loss", "generalized_mean", "dwa", "uncertainty", "gradnorm", "famo",
    "imtl_l", "tchebycheff", "stch",
)
# fmt: on
# Not here: "mean", which is the sum at another learning rate, and "random", which is the normaliser of that name.
# fmt: off
SURGERIES = (
    "cone", "upgrad", "mgda", "pcgrad", "gradvac", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl", "config",
    "sdmgrad", "modo", "cr_mogm", "excess_mtl", "pcd", "krum", "trimmed_mean", "graddrop",
)
# fmt: on

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(SUM, "plain sum", "baselines"),
        Method(STATIC, "static weights, tuned", "baselines", searches_weights=True),
        Method("static_3", "static weights, three times the trials", "baselines", searches_weights=True, trials=3),
        Method("random", "random weights", "baselines", _normalizer("random").options),
        Method("wide", "plain sum, bigger model", "baselines", wide=True),
        *map(_normalizer, NORMALIZERS),
        *map(_surgery, SURGERIES),
        _gradsurg(DEFAULT, "default: norm, cone, update"),
        _gradsurg("norm_cone", "norm, cone, gradient", guarantee="gradient"),
        _gradsurg("norm_sum_update", "norm, sum, update", surgery="sum"),
        _gradsurg("norm_upgrad_update", "norm, upgrad, update", surgery="upgrad"),
        _gradsurg("sum_update", "none, sum, update", normalize="none", surgery="sum"),
        _gradsurg("cone_update", "none, cone, update", normalize="none"),
        _gradsurg(
            "pcgrad_gradient", "none, pcgrad, gradient", normalize="none", surgery="pcgrad", guarantee="gradient"
        ),
        _gradsurg("pcgrad_update", "none, pcgrad, update", normalize="none", surgery="pcgrad"),
        _primary("protect", "primary, auxiliaries protected, update"),
        _primary("help", "primary, auxiliaries help, update", auxiliary="help"),
        _primary("help_gradient", "primary, auxiliaries help, gradient", auxiliary="help", guarantee="gradient"),
        _primary("help_none_update", "none, primary, auxiliaries help, update", auxiliary="help", normalize="none"),
    )
}
# The order of work: these with every seed, then the second, then all others. Each kind of method is in the first.
TIERS = (
    ("sum", "static", "random", "wide", "norm", "cone", "pcgrad", "default", "norm_cone", "sum_update", "help"),
    ("cone_update", "norm_sum_update", "mgda", "cagrad", "nash_mtl", "loss", "uncertainty", "protect"),
)
# What the two-minute subset runs.
SUBSET = (SUM, "norm", "uncertainty", "pcgrad", "cone", DEFAULT, "help")


def methods_for(problem: Problem) -> list[Method]:
    """Return the rows that make sense here: those of a primary task only where there is one."""
    return [method for method in METHODS.values() if method.group != "primary" or problem.primary is not None]


def tier(method: str) -> int:
    """Return the place of a method in the order of work, 0 the first."""
    return next((k for k, names in enumerate(TIERS) if method in names), len(TIERS))
