"""Where results go: one Markdown file a benchmark and day, appended to, each entry with what it was measured on."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from pathlib import Path

import torch

import gradsurg

RESULTS = Path(__file__).parent / "results"


def conditions() -> str:
    """Return one line: date, commit, versions, machine."""
    return (
        f"{dt.date.today()}, commit {_commit()}, gradsurg {gradsurg.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {_processor()}, {os.cpu_count()} cores, {platform.system()}"
    )


def result_file(name: str) -> Path:
    """Return where today's results of a benchmark are."""
    return RESULTS / f"{name}-{dt.date.today()}.md"


def record(name: str, text: str) -> Path:
    """Append an entry to today's results of a benchmark; return the file."""
    path = result_file(name)
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{conditions()}\n\n{text}\n\n")
    return path


def _commit() -> str:
    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        # Only what is measured: results and docs may be changing while this runs.
        return (
            f"{commit} with changes" if git("status", "--porcelain", "--", "../gradsurg", ".", ":!results") else commit
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Return this process's peak resident memory on Linux.

    Not getrusage's: that goes on counting what the parent had when it forked.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
