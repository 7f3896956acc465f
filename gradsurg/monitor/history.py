"""History records every k-th report of a wrapped optimizer; nothing waits for the device before it is read."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gradsurg.gradients.param_groups import parameter_names
from gradsurg.monitor.files import PackedReport, from_json, replacing, to_json, write_csv
from gradsurg.optimizer.optimizer import MultiTaskOptimizer
from gradsurg.optimizer.proxies import find_wrapped
from gradsurg.optimizer.report import Report

__all__ = ["History"]


class History:
    """Records every k-th step of a wrapped optimizer, on its device, in bounded memory.

    A hook on step() copies the few m x m numbers of the report. Nothing waits for a GPU before `reports` or `save`,
    with one exception: a step that ran on the Triton kernels waits for its report if it is recorded.
    When the memory is used up, every second record is dropped and `every` doubled: the whole run stays in view, in
    less detail. Tasks may change from step to step. Recording sends nothing over the network: the histories of several
    ranks differ only in the losses, so one rank's is enough.

    A history can be pickled and copied; the copy is not attached to the optimizer. It stops recording when it is
    deleted, or by `close`.

    Args:
        optimizer: A wrapped optimizer, or a trainer's proxy around one; None for a history that is filled by hand.
        every: Record steps 0, every, 2 · every …
        megabytes: About how much to keep, at most.
        model: Gives the blocks of granularity="tensor" their names, if the optimizer knows none.

    Raises:
        TypeError: The optimizer is not wrapped.
        ValueError: `every` is not a positive integer, or `megabytes` not a positive number.

    Example:
        >>> import torch, gradsurg
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
        >>> history = gradsurg.History(optimizer, every=2)
        >>> for _ in range(5):
        ...     optimizer.backward({"a": w[0] ** 2, "b": (w[0] - w[1] - 3) ** 2})
        ...     optimizer.step()
        >>> [report.step for report in history.reports]
        [0, 2, 4]
    """

    def __init__(
        self,
        optimizer: Any = None,
        every: int = 10,
        *,
        megabytes: float = 32.0,
        model: torch.nn.Module | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: pass a positive integer; 1 records every step")
        if not megabytes > 0:
            raise ValueError(f"megabytes={megabytes!r}: pass a positive number")
        self.every = every
        self.megabytes = megabytes
        # With a running number, by which a reader finds what is new to it after records were dropped.
        self._entries: list[tuple[int, PackedReport]] = []
        self._recorded = 0
        self._nbytes = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._last: Report | None = None
        self._optimizer: weakref.ref[MultiTaskOptimizer] | None = None
        self._handles: list[Any] = []
        self._names: dict[str, str] = {}
        if optimizer is None:
            return
        wrapped = find_wrapped(optimizer)
        self._optimizer = weakref.ref(wrapped)
        optimizers = wrapped._gradsurg.optimizers
        if model is not None:
            better = {id(p): name for name, p in model.named_parameters()}
            self._names = {old: better.get(key, old) for key, old in parameter_names(optimizers).items()}
        # A strong reference would keep the history alive, and recording, as long as the optimizer.
        owner = weakref.ref(self)

        def after_step(stepped: Any, args: Any, kwargs: Any) -> None:
            history, engine = owner(), stepped._gradsurg
            latest = engine.latest
            # Another optimizer has yet to use the same rows, or no surgery was done in this step.
            if history is None or engine.step.stepped or latest is None or latest is history._last:
                return
            if latest.step % history.every == 0:
                history.record(engine.report)

        self._handles = [each.register_step_post_hook(after_step) for each in optimizers]

    # -- recording --------------------------------------------------------------------------------------------------

    def record(self, report: Report | None = None) -> None:
        """Record a report now, independently of `every`.

        Args:
            report: The report; None for the last one of the optimizer that the history is attached to.

        Raises:
            ValueError: There is no report: no optimizer is attached, or it has not done a step.
        """
        if report is None:
            optimizer = None if self._optimizer is None else self._optimizer()
            report = None if optimizer is None else optimizer.report
        if report is None:
            raise ValueError("there is no report to record: pass one, or attach an optimizer and do a step first")
        self._last = report
        if self._names:
            report = replace(report, blocks=tuple(self._names.get(name, name) for name in report.blocks))
        packed = PackedReport(report)
        self._entries.append((self._recorded, packed))
        self._recorded += 1
        self._nbytes += packed.nbytes
        while self._nbytes > self.megabytes * 2**20 and len(self._entries) > 1:
            self._entries = self._entries[::2]
            self._nbytes = sum(entry.nbytes for _, entry in self._entries)
            self.every *= 2

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def reports(self) -> list[Report]:
        """What was recorded, oldest first, on the CPU; this waits for the device."""
        return [entry.report() for _, entry in self._fetched(self._entries)]

    def new(self, reader: Any) -> list[Report]:
        """Return the reports that were recorded since the last call with this reader.

        Args:
            reader: Any object that can be referred to weakly; it is not called.

        Raises:
            TypeError: The reader cannot be referred to weakly, for example None or a number.
        """
        start = self._seen.get(reader, 0)
        self._seen[reader] = self._recorded
        return [entry.report() for _, entry in self._fetched([e for e in self._entries if e[0] >= start])]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __repr__(self) -> str:
        steps = [entry.step for _, entry in self._entries]
        span = f", steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f", step {steps[0]}" if steps else ""
        return f"History of {len(steps)} report{'s' * (len(steps) != 1)}{span}, every={self.every}"

    @staticmethod
    def _fetched(entries: Sequence[tuple[int, PackedReport]]) -> Sequence[tuple[int, PackedReport]]:
        """Bring what is still on devices to the CPU, in one transfer per device."""
        waiting: dict[torch.device, list[PackedReport]] = {}
        for _, entry in entries:
            for device in entry.devices:
                waiting.setdefault(device, []).append(entry)
        for device, packed in waiting.items():
            together = torch.cat([entry.numbers[device] for entry in packed]).cpu()
            sizes = [entry.numbers[device].numel() for entry in packed]
            for entry, numbers in zip(packed, together.split(sizes), strict=True):
                entry.numbers[device] = numbers.clone()
        return entries

    # -- files and copies -------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file: .jsonl has everything, one report per line, for `load`; .csv is a table for a spreadsheet.

        The table has a row per step and task, and of the numbers per block only the sum or mean.

        Args:
            path: The file. An existing one is replaced when all is written: a full disk leaves it as it is.

        Raises:
            ValueError: Another ending.

        Example:
            >>> import os, tempfile, torch, gradsurg
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
            >>> history = gradsurg.History(optimizer, every=1)
            >>> optimizer.backward({"a": w[0] ** 2, "b": (w[0] - w[1] - 3) ** 2})
            >>> optimizer.step()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     history.save(os.path.join(folder, "run.jsonl"))
            ...     again = gradsurg.History.load(os.path.join(folder, "run.jsonl"))
            >>> again
            History of 1 report, step 0, every=1
        """
        path = Path(path)
        if path.suffix not in (".jsonl", ".csv"):
            raise ValueError(f"{str(path)!r}: a history is saved as a .jsonl or a .csv file")
        if path.suffix == ".csv":
            write_csv(path, self.reports)
        else:
            lines = (json.dumps(to_json(report), allow_nan=False, ensure_ascii=False) for report in self.reports)
            with replacing(path) as file:
                file.writelines(f"{line}\n" for line in lines)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read a .jsonl file that `save` wrote, into a history that is attached to no optimizer.

        Args:
            path: The file.

        Raises:
            ValueError: Another ending, or a line that is no report; the message has its number.
        """
        path = Path(path)
        if path.suffix != ".jsonl":
            raise ValueError(f"{str(path)!r}: a history is loaded from a .jsonl file")
        history = cls(every=1, megabytes=float("inf"))
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                history.record(from_json(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
        return history

    def __getstate__(self) -> dict[str, Any]:
        self._fetched(self._entries)
        return {**self.__dict__, "_optimizer": None, "_handles": [], "_last": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _seen=weakref.WeakKeyDictionary())
