"""What must survive a checkpoint. It is kept in the first parameter group, which every kind of checkpoint saves."""

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
    changed: a state dict that was taken earlier keeps its numbers.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        # The list itself: it may grow.
        self.optimizers = optimizers

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.home()[KEY]["step"])

    @property
    def state(self) -> Mapping[str, Any]:
        """What normaliser and surgery remember."""
        state: Mapping[str, Any] = self.home()[KEY]["state"]
        return state

    @property
    def tasks(self) -> list[str]:
        """Every task name seen so far."""
        return list(self.home()[KEY]["tasks"])

    def end_step(self, state: Mapping[str, Any] | None) -> None:
        """Count a step; None leaves the state of normaliser and surgery as it is."""
        self._replace(step=self.step + 1, state=self.state if state is None else dict(state))

    def learn(self, names: Iterable[str]) -> None:
        """Remember names of tasks."""
        known: list[str] = self.home()[KEY]["tasks"]
        new = [name for name in names if name not in known]
        if new:
            self._replace(tasks=[*known, *new])

    def recall(self, key: str) -> Mapping[str, Any]:
        """Return what `keep` left under a key; empty if there is nothing, as in older checkpoints."""
        kept: Mapping[str, Any] = self.home()[KEY].get(key, {})
        return kept

    def keep(self, key: str, **value: Any) -> None:
        """Keep the memory of one of the cheap modes under a key."""
        self._replace(**{key: value})

    def count_skipped(self, name: str) -> None:
        """Count a step that went without this task because of NaN or infinity."""
        counts = self.home()[KEY]["skipped"]
        self._replace(skipped={**counts, name: counts.get(name, 0) + 1})

    def home(self) -> dict[str, Any]:
        """Return the parameter group that has the entry; if there is none, the first group gets a fresh one."""
        for optimizer in self.optimizers:
            group: dict[str, Any] = optimizer.param_groups[0]
            entry = group.get(KEY)
            if isinstance(entry, dict) and entry.get("version") == 1 and entry.keys() >= FRESH.keys():
                return group
        group = self.optimizers[0].param_groups[0]
        group[KEY] = dict(FRESH)
        return group

    def _replace(self, **changes: Any) -> None:
        group = self.home()
        group[KEY] = {**group[KEY], **changes}


def sealed(state_dict: dict[str, Any], **inside: Any) -> dict[str, Any]:
    """Return a state dict that has the entry a second time, in one piece.

    Distributed checkpoints take dicts apart, and load only the keys that the loading optimizer has already: the state
    of normaliser and surgery of a fresh one would stay empty. They leave a tuple whole. `inside` goes into the piece
    alone. A fresh optimizer must pass it too, empty, if its first group has no entry otherwise.
    """
    group = state_dict["param_groups"][0]
    had = group.get(KEY)
    # There is a seal already if a bare optimizer loaded the checkpoint of a wrapped one and was wrapped afterwards.
    entry = {k: v for k, v in had.items() if k != SEAL} if isinstance(had, dict) else {}
    if entry or inside:
        group[KEY] = {**entry, SEAL: ({**entry, **inside},)}
    return state_dict


def unsealed(state_dict: dict[str, Any], inside: str) -> tuple[dict[str, Any], Any]:
    """Undo `sealed`: return a state dict with the sealed entry in its place, and what was `inside` alone, or None."""
    groups = state_dict.get("param_groups") or [{}]
    entry = groups[0].get(KEY)
    if not isinstance(entry, dict) or SEAL not in entry:
        return state_dict, None
    seal = entry[SEAL]
    whole = seal[0] if isinstance(seal, tuple) and len(seal) == 1 and isinstance(seal[0], dict) else {}
    entry = {k: v for k, v in {**entry, **whole}.items() if k not in (SEAL, inside)}
    first = {k: v for k, v in {**groups[0], KEY: entry}.items() if k != KEY or entry}
    return {**state_dict, "param_groups": [first, *groups[1:]]}, whole.get(inside)
