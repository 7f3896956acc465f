"""The cache: one JSON line a run, keyed by a hash of all that the run depends on. Any number of processes share it.

A line is appended in one write under a lock, so a process that dies leaves whole lines; a run is claimed by locking one
byte of a file beside the cache, so a process that dies gives its claim back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Cache", "key_of"]


def key_of(config: dict[str, Any]) -> str:
    """Return the hash of a configuration, 16 hexadecimal digits, whatever the order of its entries."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Cache:
    """Results by key, on disk.

    Args:
        path: Of the JSON lines; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._read = 0
        # Not beside the cache, which may lie in a repository.
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._claims = Path(tempfile.gettempdir()) / f"gradsurg-claims-{name}"

    def refresh(self) -> None:
        """Read what other processes have added."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._known[key_of(entry["config"])] = entry

    def get(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return a run's result if it was there at the last refresh."""
        return self._known.get(key_of(config))

    def entries(self) -> list[dict[str, Any]]:
        """Return all runs, in the order in which they were read."""
        return list(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def append(self, config: dict[str, Any], result: dict[str, Any]) -> None:
        """Add a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"config": config, **result}, separators=(",", ":"), allow_nan=False) + "\n"
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            # A line that a full disk or a lost machine cut off must not swallow this one.
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            if cut:
                os.ftruncate(handle, self._last_whole(handle, size))
            os.write(handle, line.encode())
        finally:
            os.close(handle)
        self._known[key_of(config)] = json.loads(line)

    @contextmanager
    def claim(self, config: dict[str, Any]) -> Iterator[bool]:
        """Claim a run; yields False where another process has it. The claim ends with the block or the process."""
        handle = os.open(self._claims, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key_of(config)[:12], 16))
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)

    @staticmethod
    def _last_whole(handle: int, size: int) -> int:
        return os.pread(handle, size, 0).rfind(b"\n") + 1
