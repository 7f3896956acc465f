"""What must survive a checkpoint, kept where every kind of checkpoint looks: in the first parameter group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

__all__ = ["KEY", "Checkpoint", "sealed", "unsealed"]

KEY, SEAL = "gradsurg", "sealed"
FRESH: dict[str, Any] = {"version": 1, "step": 0, "state": {}, "skipped": {}, "tasks": []}


class Checkpoint:
    """Reads and replaces one entry of `param_groups[0]`, which survives load_state_dict and DCP alike.

    A missing or foreign entry (the checkpoint of a bare optimizer) is a fresh start. The entry is replaced, never
    changed: a state dict in somebody's hand keeps the numbers it had.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers  # the list itself: it may grow

    def touch(self) -> None:
        """Make sure that there is an entry, so that a state dict taken before the first step has it."""
        self._home()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self._home()[KEY]["step"])

    @property
    def state(self) -> Mapping[str, Any]:
        """What normaliser and surgery remember."""
        state: Mapping[str, Any] = self._home()[KEY]["state"]
        return state

    @property
    def tasks(self) -> list[str]:
        """Every task name seen so far."""
        return list(self._home()[KEY]["tasks"])

    def end_step(self, state: Mapping[str, Any] | None) -> None:
        """Count a step; None leaves the state of normaliser and surgery as it is."""
        self._replace(step=self.step + 1, state=self.state if state is None else dict(state))

    def learn(self, names: Iterable[str]) -> None:
        """Remember names of tasks."""
        known: list[str] = self._home()[KEY]["tasks"]
        new = [name for name in names if name not in known]
        if new:
            self._replace(tasks=[*known, *new])

    def recall(self, key: str) -> Mapping[str, Any]:
        """Return what `keep` left under a key; empty where there is nothing, as in older checkpoints."""
        kept: Mapping[str, Any] = self._home()[KEY].get(key, {})
        return kept

    def keep(self, key: str, **value: Any) -> None:
        """Keep something of one of the cheap modes."""
        self._replace(**{key: value})

    def count_skipped(self, name: str) -> None:
        """Count a step that went without this task because of NaN or infinity."""
        counts = self._home()[KEY]["skipped"]
        self._replace(skipped={**counts, name: counts.get(name, 0) + 1})

    def _home(self) -> dict[str, Any]:
        for optimizer in self.optimizers:
            group: dict[str, Any] = optimizer.param_groups[0]
            entry = group.get(KEY)
            if isinstance(entry, dict) and entry.get("version") == 1 and entry.keys() >= FRESH.keys():
                return group
        group = self.optimizers[0].param_groups[0]
        group[KEY] = dict(FRESH)
        return group

    def _replace(self, **changes: Any) -> None:
        group = self._home()
        group[KEY] = {**group[KEY], **changes}


def sealed(state_dict: dict[str, Any], **inside: Any) -> dict[str, Any]:
    """Return a state dict that has the entry a second time, in one piece.

    Distributed checkpoints take dicts apart, and load only what the optimizer that loads has already: of a fresh one,
    the state of normaliser and surgery would stay empty. A tuple they leave whole. `inside` goes into the piece alone;
    a fresh optimizer must pass it too, empty, where its first group has no entry otherwise.
    """
    group = state_dict["param_groups"][0]
    had = group.get(KEY)
    # A seal is there already where a bare optimizer loaded the checkpoint of a wrapped one, and was wrapped then.
    entry = {k: v for k, v in had.items() if k != SEAL} if isinstance(had, dict) else {}
    if entry or inside:
        group[KEY] = {**entry, SEAL: ({**entry, **inside},)}
    return state_dict


def unsealed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with what was sealed in its place; the one given is left as it is."""
    groups = state_dict.get("param_groups") or [{}]
    entry = groups[0].get(KEY)
    if not isinstance(entry, dict) or SEAL not in entry:
        return state_dict
    seal = entry[SEAL]
    whole = seal[0] if isinstance(seal, tuple) and len(seal) == 1 and isinstance(seal[0], dict) else {}
    first = {**groups[0], KEY: {**{k: v for k, v in entry.items() if k != SEAL}, **whole}}
    return {**state_dict, "param_groups": [first, *groups[1:]]}
