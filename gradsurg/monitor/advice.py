"""Advice on what to try, from the reports of a history: one function per piece of advice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gradsurg.optimizer.report import Report

__all__ = ["ALOOF", "PEACE", "Pair", "advice", "pairs"]


# Two tasks that conflict in a smaller share of the steps get on.
PEACE = 0.05
# Two gradients whose mean cosine is nearer to 0 are at a right angle, and conflict in half of the steps by chance: the
# cosine of two random vectors of a thousand numbers is 0 ± 0.03.
ALOOF = 0.05
# Two tasks whose mean cosine is lower want opposite things.
OPPOSED = -0.8
# A task is loud if the median norm of its gradient is this many times another task's.
LOUD = 10.0


def advice(reports: Sequence[Report], found: Sequence[Pair]) -> list[str]:
    """Return what to try, the most telling first; empty if nothing stands out."""
    checks: list[Callable[[Sequence[Report], Sequence[Pair]], str | None]] = [
        _peace, _opposition, _noise, _loudness, _standstill, _not_measured, _places, _not_finite,
    ]  # fmt: skip
    return [sentence for check in checks if (sentence := check(reports, found)) is not None]


def _peace(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    if all(pair.share < PEACE for pair in found):
        return "These tasks get on, and surgery has next to nothing to do: compare with surgery='sum'."
    return None


def _opposition(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    opposed = [pair for pair in found if pair.cosine < OPPOSED]
    if not opposed:
        return None
    a, b = opposed[0].tasks
    return (
        f"{a} and {b} want nearly opposite things. No weighting helps both: look for a sign or a label that is wrong, "
        "give them more parameters of their own, or decide which comes first (primary=)."
    )


def _noise(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    noisy = [pair for pair in found if pair.share >= PEACE and abs(pair.cosine) < ALOOF]
    if not noisy:
        return None
    names = "; ".join(f"{a} and {b}" for a, b in (pair.tasks for pair in noisy[:3]))
    return (
        f"Between {names} the mean angle is about 90°: these conflicts are mostly the noise of the batch. Larger "
        "batches, or accumulation over several, show whether anything is left."
    )


def _loudness(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    lengths: dict[str, list[float]] = {}
    scaled: dict[str, list[float]] = {}
    for report in reports:
        for name, norm, scale in zip(report.tasks, report.norms.tolist(), report.scales.mean(0).tolist(), strict=True):
            lengths.setdefault(name, []).append(norm)
            scaled.setdefault(name, []).append(norm * scale)
    medians = {name: median for name, norms in lengths.items() if (median := _median(norms)) > 0}
    if not medians:
        return None
    loud, quiet = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
    ratio = medians[loud] / medians[quiet]
    if ratio < LOUD:
        return None
    # The same ratio after normalisation.
    left = _median(scaled[loud]) / max(_median(scaled[quiet]), 1e-300)
    said = f"The gradient of {loud} is about {ratio:.0f} times as long as that of {quiet}"
    if left > ratio / 2:
        return f"{said}, and nothing evens that out: try normalize='norm', or preferences=."
    return f"{said}; normalisation evens that out. In a plain sum {quiet} would hardly count."


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmedian())


def _standstill(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    still = sum(report.stationary for report in reports) / len(reports)
    if still < 0.02:
        return None
    return (
        f"In {still:.0%} of the steps no direction helped every task, so the shared parameters could not move. If that "
        "is too careful, name what matters most (primary=), or set guarantee='gradient'."
    )


def _not_measured(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    if any(report.movement is not None for report in reports) or all(pair.share < PEACE for pair in found):
        return None
    return "guarantee='update' keeps the optimizer's real movement from hurting a task, and shows it here."


def _places(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    hurt: dict[str, list[float]] = {}
    for report in reports:
        if len(report.blocks) > 1:
            for name, cosines in zip(report.blocks, report.block_cosines, strict=True):
                upper = cosines[tuple(torch.triu_indices(len(cosines), len(cosines), 1))]
                upper = upper[~upper.isnan()]
                if len(upper):
                    hurt.setdefault(name, []).append(float((upper < 0).double().mean()))
    # Among fewer partitions of the model, the worst one says little about layers.
    if len(hurt) < 4:
        return None
    shares = sorted(((sum(v) / len(v), name) for name, v in hurt.items()), reverse=True)
    (most, worst), (least, best) = shares[0], shares[-1]
    if most < 0.3 or most < 2 * least:
        return None
    names = ", ".join(name for share, name in shares[:3] if share > 0.7 * most)
    return (
        f"The conflict is in some layers: {most:.0%} of pairs and steps in {worst}, {least:.0%} in {best}. A copy of "
        f"{names} for each task would take it out of the shared part."
    )


def _not_finite(reports: Sequence[Report], found: Sequence[Pair]) -> str | None:
    names = list(dict.fromkeys(name for report in reports for name in report.nonfinite))
    if not names:
        return None
    count = sum(bool(report.nonfinite) for report in reports)
    return (
        f"{', '.join(names)}: NaN or infinite gradients in {count} of {len(reports)} recorded steps. nonfinite='raise' "
        "stops at the first."
    )


@dataclass(frozen=True)
class Pair:
    """Two tasks in the steps in which both were present: the share with a conflict, and the mean cosine.

    `thirds` are the shares in the first, middle and last third of these steps.
    """

    tasks: tuple[str, str]
    share: float
    cosine: float
    thirds: tuple[float, ...]


def pairs(reports: Sequence[Report]) -> list[Pair]:
    """Return every pair of tasks that met; the pair that conflicts most often comes first."""
    cosines: dict[tuple[str, str], list[float]] = {}
    for report in reports:
        matrix = report.cosines.tolist()
        for (i, a), (j, b) in itertools.combinations(enumerate(report.tasks), 2):
            # Tasks may come in another order in another step.
            key, value = ((a, b) if (b, a) not in cosines else (b, a)), matrix[i][j]
            if not math.isnan(value):
                cosines.setdefault(key, []).append(value)
    found = []
    for names, values in cosines.items():
        hurt = torch.tensor([value < 0 for value in values], dtype=torch.float64)
        thirds = tuple(float(part.mean()) for part in hurt.tensor_split(3) if len(part))
        found.append(Pair(names, float(hurt.mean()), float(torch.tensor(values, dtype=torch.float64).mean()), thirds))
    return sorted(found, key=lambda pair: (-pair.share, pair.cosine))
