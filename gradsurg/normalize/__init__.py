"""One file a family of normalisers: Gramian, losses, state -> m scales."""

from __future__ import annotations

from gradsurg.errors import choose
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.none import Unscaled
from gradsurg.normalize.norm import Norm

__all__ = ["NORMALIZERS", "Norm", "Normalizer", "Unscaled", "resolve_normalizer"]

NORMALIZERS: dict[str, type[Normalizer]] = {cls.name: cls for cls in (Unscaled, Norm)}


def resolve_normalizer(normalize: str | Normalizer) -> Normalizer:
    """Return the Normalizer that a name stands for; an instance is returned as it is."""
    if isinstance(normalize, Normalizer):
        return normalize
    return choose("normalize", normalize, NORMALIZERS, "a gradsurg.normalize.Normalizer instance")()
