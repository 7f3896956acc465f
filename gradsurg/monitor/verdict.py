"""A history in plain language: which tasks fight, when, how much surgery changed, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradsurg.monitor.advice import ALOOF, PEACE, Pair, advice, pairs
from gradsurg.monitor.plot.numbers import several
from gradsurg.optimizer.report import Report

__all__ = ["verdict"]

# The update hurts a task if cos(d, g_i) is lower; the rounding of 32-bit parameters stays above.
HURT = -1e-4
# Two tasks agree if their mean cosine is higher.
AGREE = 0.2


def verdict(reports: Sequence[Report]) -> dict[str, list[str]]:
    """Return heading -> sentences about the recorded reports, which come in order.

    Raises:
        ValueError: No step of several tasks that share parameters is among them.

    Example:
        >>> import torch, gradsurg
        >>> from gradsurg.monitor.verdict import verdict
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.01))
        >>> history = gradsurg.History(optimizer, every=1)
        >>> for _ in range(9):
        ...     optimizer.zero_grad()
        ...     optimizer.backward({"a": w[0] + w[1], "b": w[1] - 2 * w[0]})
        ...     optimizer.step()
        >>> verdict(history.reports)["Which tasks fight"]
        ['a and b fight: in conflict in 100% of the steps, at 108° on average.']
    """
    measured = several(reports, "judge")
    found = pairs(measured)
    return {
        "Which tasks fight": _who(found),
        "When": _when(found),
        "What the surgery changed": _changed(measured),
        "What to try": advice(measured, found) or ["Nothing stands out: these settings suit these tasks."],
    }


def _who(found: Sequence[Pair]) -> list[str]:
    fighting = [pair for pair in found if pair.share >= PEACE]
    if not fighting:
        return [f"No two tasks fight: no pair conflicts in more than {PEACE:.0%} of the recorded steps."]
    sentences = []
    for pair in fighting:
        a, b = pair.tasks
        # A mean of rounded cosines may lie beyond ±1, and acos fails there.
        angle = math.degrees(math.acos(max(-1.0, min(1.0, pair.cosine))))
        kind = "fight" if pair.cosine < -ALOOF else "mostly agree" if pair.cosine > AGREE else "are near a right angle"
        sentences.append(
            f"{a} and {b} {kind}: in conflict in {pair.share:.0%} of the steps, at {angle:.0f}° on average."
        )
    if peaceful := len(found) - len(fighting):
        sentences.append(
            f"The other {peaceful} {'pair hardly conflicts' if peaceful == 1 else 'pairs hardly conflict'}."
        )
    return sentences


def _when(found: Sequence[Pair]) -> list[str]:
    sentences = []
    for pair in (pair for pair in found if pair.share >= PEACE and len(pair.thirds) == 3):
        first, middle, last = (f"{share:.0%}" for share in pair.thirds)
        rise = pair.thirds[2] - pair.thirds[0]
        trend = "more and more" if rise > 0.2 else "less and less" if rise < -0.2 else "about as often throughout"
        a, b = pair.tasks
        sentences.append(f"{a} and {b}: {trend} ({first} of the first third of the run, {middle}, {last}).")
    return sentences or ["Too few conflicts to tell."]


def _changed(reports: Sequence[Report]) -> list[str]:
    sentences = []
    changes = torch.tensor([report.change for report in reports], dtype=torch.float64)
    # NaN: no weights were found in that step.
    changes = changes[~changes.isnan()]
    if len(changes):
        touched = changes[changes > 0]
        share = len(touched) / len(changes)
        sentences.append(f"Surgery left the (normalised) sum as it was in {1 - share:.0%} of the steps.")
        if len(touched):
            sentences.append(f"In the others it changed it by {float(touched.median()):.0%} of its length (median).")
    movements = [report.movement for report in reports if report.movement is not None]
    if movements:
        corrected = sum(movement.corrected for movement in movements) / len(movements)
        sentences.append(f"The optimizer's own update was corrected in {corrected:.0%} of the steps.")
        held = sum(movement.held for movement in movements) / len(movements)
        if held:
            sentences.append(f"In {held:.1%} of them no movement satisfied every task, and shared parameters stayed.")
    else:
        sentences.append("What the optimizer's update did was not measured: that needs guarantee='update'.")
    cosines = [(r.tasks, r.update_cosines) for r in reports if r.update_cosines is not None]
    hurt = {name: 0 for names, _ in cosines for name in names}
    for names, values in cosines:
        for name, value in zip(names, values.tolist(), strict=True):
            hurt[name] += value < HURT
    worst = [f"{name} ({count / len(cosines):.0%} of the steps)" for name, count in hurt.items() if count]
    if cosines:
        sentences.append(
            f"The update still raised, to first order: {', '.join(worst)}. Under auxiliary='help' that may be."
            if worst
            else "No recorded update raised any task's loss to first order."
        )
    return sentences
