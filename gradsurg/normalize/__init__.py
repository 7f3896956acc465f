"""The table of normalisers, one file per family: from Gramian, losses and state to m scales. For users and options."""

from __future__ import annotations

from gradsurg.errors import choose
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.dwa import DWA
from gradsurg.normalize.famo import FAMO
from gradsurg.normalize.generalized_mean import GeneralizedMean
from gradsurg.normalize.gradnorm import GradNorm
from gradsurg.normalize.imtl_l import IMTLL
from gradsurg.normalize.loss_values import CurrentLoss, InitialLoss, PriorLoss, class_entropy, target_variance
from gradsurg.normalize.none import Unscaled
from gradsurg.normalize.norm import Norm
from gradsurg.normalize.random import RandomWeights
from gradsurg.normalize.tchebycheff import STCH, Tchebycheff
from gradsurg.normalize.uncertainty import LogVariances, Uncertainty

__all__ = [
    "DWA",
    "FAMO",
    "IMTLL",
    "NORMALIZERS",
    "STCH",
    "CurrentLoss",
    "GeneralizedMean",
    "GradNorm",
    "InitialLoss",
    "LogVariances",
    "Norm",
    "Normalizer",
    "PriorLoss",
    "RandomWeights",
    "Tchebycheff",
    "Uncertainty",
    "Unscaled",
    "class_entropy",
    "resolve_normalizer",
    "target_variance",
]

_CLASSES: tuple[type[Normalizer], ...] = (
    Unscaled,
    Norm,
    CurrentLoss,
    InitialLoss,
    PriorLoss,
    GeneralizedMean,
    DWA,
    Uncertainty,
    GradNorm,
    FAMO,
    RandomWeights,
    IMTLL,
    Tchebycheff,
    STCH,
)
NORMALIZERS: dict[str, type[Normalizer]] = {cls.name: cls for cls in _CLASSES}


def resolve_normalizer(normalize: str | Normalizer) -> Normalizer:
    """Return the Normalizer that a name stands for; an instance is returned as it is."""
    if isinstance(normalize, Normalizer):
        return normalize
    return choose("normalize", normalize, NORMALIZERS, "a gradsurg.normalize.Normalizer instance")()
