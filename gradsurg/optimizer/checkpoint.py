"""What must survive a checkpoint. It is kept in the first parameter group, which every kind of checkpoint saves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from gradsurg.errors import warn

__all__ = ["FRESH", "KEY", "METHODS", "Checkpoint", "sealed", "unreadable", "unsealed"]

# METHODS says, in the sealed piece, whose the state is.
KEY, SEAL, METHODS = "gradsurg", "sealed", "methods"
# State is kept for so many task names.
MOST_NAMES = 1024
FRESH: dict[str, Any] = {"version": 1, "step": 0, "state": {}, "skipped": {}, "tasks": []}


class Checkpoint:
    """Reads and replaces one entry of `param_groups[0]`, which survives load_state_dict and DCP alike.

    A missing or foreign entry (the checkpoint of a bare optimizer) is a fresh start. The entry is replaced, never
    changed: a state dict that was taken earlier keeps its numbers.
    """

    def __init__(self) -> None:
        # Not kept alive: an optimizer that nobody holds is freed at once, as torch's own are.
        self.references: list[weakref.ref[Optimizer]] = []

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
        names = list(names)
        new = [name for name in names if name not in known]
        if new and known and len(known) + len(new) > MOST_NAMES:
            warn(
                f"more than {MOST_NAMES} different task names were met, the last one {new[-1]!r}: what is "
                "remembered by name would grow for ever, and starts afresh now. Name a task alike in every step."
            )
            self._replace(tasks=list(dict.fromkeys(names)), state={}, skipped={}, rotate={}, refresh={})
        elif new:
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
        optimizers = [optimizer for each in self.references if (optimizer := each()) is not None]
        for optimizer in optimizers:
            # Looked for at each call: load_state_dict() and trainers replace the groups.
            group: dict[str, Any] = optimizer.param_groups[0]
            entry = group.get(KEY)
            if isinstance(entry, dict) and entry.get("version") == 1 and entry.keys() >= FRESH.keys():
                return group
        group = optimizers[0].param_groups[0]
        group[KEY] = dict(FRESH)
        return group

    def _replace(self, **changes: Any) -> None:
        group = self.home()
        group[KEY] = {**group[KEY], **changes}


def sealed(state_dict: dict[str, Any], methods: Mapping[str, str], **inside: Any) -> dict[str, Any]:
    """Return a state dict that has the entry a second time, in one piece, with the methods whose state it holds.

    Distributed checkpoints take dicts apart, and load only the keys that the loading optimizer has already: the state
    of normaliser and surgery of a fresh one would stay empty. They leave a tuple whole. `inside` goes into the piece
    alone. A fresh optimizer must pass it too, empty, if its first group has no entry otherwise.
    """

    def seal(group: dict[str, Any]) -> dict[str, Any]:
        had = group.get(KEY)
        # A seal of an earlier save would be sealed again, and grow with each save.
        entry = {k: v for k, v in had.items() if k != SEAL} if isinstance(had, dict) else {}
        if not entry and not inside:
            return group
        return {**group, KEY: {**entry, SEAL: ({**entry, **({METHODS: dict(methods)} if entry else {}), **inside},)}}

    return _with_first_group(state_dict, seal)


def unsealed(state_dict: dict[str, Any], inside: str) -> tuple[dict[str, Any], Any]:
    """Undo `sealed`: return a state dict with the sealed entry in its place, and what was `inside` alone, or None.

    Raises:
        ValueError: What is sealed is no entry.
    """
    found: list[Any] = [None]

    def unseal(group: dict[str, Any]) -> dict[str, Any]:
        entry = group.get(KEY)
        if isinstance(entry, dict) and SEAL in entry:
            seal = entry[SEAL]
            if not isinstance(seal, (tuple, list)) or len(seal) != 1 or not isinstance(seal[0], dict):
                raise unreadable(f"{SEAL!r} holds {seal!r:.60} in place of a tuple with one dict")
            found[0] = seal[0].get(inside)
            entry = {k: v for k, v in {**entry, **seal[0]}.items() if k not in (SEAL, inside)}
        others = {k: v for k, v in group.items() if k != KEY}
        return others if entry is None or entry == {} else {**others, KEY: entry}

    return _with_first_group(state_dict, unseal), found[0]


def unreadable(fault: str) -> ValueError:
    """Return the error for an entry of a state dict that cannot be loaded."""
    return ValueError(
        f"this state dict holds what a wrapped optimizer remembers, under {KEY!r} in its first parameter group, and "
        f"that cannot be loaded: {fault}. Nothing was changed. Delete {KEY!r} there to load the rest and start afresh."
    )


def _with_first_group(state: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return a copy with its first parameter group changed; it may lie deeper, as in Lookahead's state dict."""
    groups = state.get("param_groups")
    if isinstance(groups, list) and groups and isinstance(groups[0], dict):
        return {**state, "param_groups": [change(groups[0]), *groups[1:]]}
    for key, inner in state.items():
        if isinstance(inner, dict) and (changed := _with_first_group(inner, change)) is not inner:
            return {**state, key: changed}
    return state
