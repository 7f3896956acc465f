"""What a run of benchmarks.gpu was made on, how it does against the targets, and the files that it leaves."""

from __future__ import annotations

import datetime as dt
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gradsurg
from benchmarks.gpu_training import SMALL
from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from benchmarks.gpu_bench import Bench

__all__ = ["judge", "machine", "number", "save", "tables"]

PEERS = ("TorchJD", "pytorch_optimizer")
TARGETS = {
    "share of copy bandwidth, Gramian and combination, from 25 M parameters": 0.85,
    "share of a training step": 0.05,
    "times less surgery time than the best peer": 3.0,
}


def judge(bench: Bench) -> None:
    """Hold what was measured against TARGETS, the worst case of each."""
    found: dict[str, list[float]] = {name: [] for name in TARGETS}
    share, step, times = found
    for row in bench.results:
        if "failed" in row:
            continue
        if row["what"] in ("gramian", "combine") and row["P"] != "1 M":
            found[share].append(row["share_of_copy"])
        if row["what"] == "step" and row["by"].startswith("gradsurg") and not row["model"].startswith(SMALL):
            found[step].append(-row["surgery_share"])
    surgeries = [row for row in bench.results if row["what"] == "surgery" and "failed" not in row]
    for m in sorted({row["m"] for row in surgeries}):
        seconds = {row["by"]: row["seconds"] for row in surgeries if row["m"] == m}
        peers = [value for by, value in seconds.items() if by.startswith(PEERS)]
        # Without a peer there is nothing to be faster than; where the time was up, ours may be missing.
        found[times].append(min(peers, default=math.nan) / seconds.get("gradsurg cone", math.nan))
    for name, target in TARGETS.items():
        # min() of numbers and NaN is either, by their order; and a size that did not fit leaves nothing.
        measured = bool(found[name]) and not any(map(math.isnan, found[name]))
        worst = (-1 if name == step else 1) * min(found[name]) if measured else math.nan
        met = worst <= target if name == step else worst >= target
        verdict = ("met" if met else "missed") if measured else "not measured"
        bench.keep("target", name=name, wanted=target, worst=worst, verdict=verdict)


def machine() -> dict[str, Any]:
    import triton

    about = {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gradsurg": gradsurg.__version__,
        "card": None,
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            driver = "unknown: no nvidia-smi"
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver and clocks": driver,
        }
    return about


def save(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> Path:
    """Write every number as JSON, over what an earlier call of this run wrote; return the file."""
    RESULTS.mkdir(exist_ok=True)
    card = str(about["card"]).replace(" ", "-")
    path = RESULTS / f"gpu-{about['date'].replace(':', '')[:15]}-{card}.json"
    path.write_text(json.dumps({"machine": about, "targets": TARGETS, "results": results}, indent=1) + "\n")
    return path


def tables(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Return one Markdown table for each kind of result; a cell is empty where a row has no such number."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if key != "date")]
    for what in dict.fromkeys(row["what"] for row in results):
        rows = [{k: v for k, v in row.items() if k != "what"} for row in results if row["what"] == what]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {what}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(number(row[key]) if key in row else '' for key in columns)} |" for row in rows]
    return "\n".join(lines)


def number(value: Any) -> str:
    """Return four digits of a float, and all of anything else."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
