"""What the passes of the CUDA path cost at least, by bytes and instructions: nothing here is timed."""

from __future__ import annotations

import math

import torch

__all__ = ["CARDS", "DTYPES", "TASKS", "combine_work", "gramian_work", "model_seconds", "print_model"]

TASKS = (2, 4, 8, 16, 32)
DTYPES = (torch.float32, torch.bfloat16)
# Memory bandwidth in bytes a second, processors, clock, float64 multiply-adds a clock of a processor (vector units,
# tensor cores), conversions from and to float64 a clock of a processor. From data sheets and the CUDA programming
# guide's table of instruction throughput; only the model uses them.
CARDS = {
    "A100 SXM 80 GB": (2.04e12, 108, 1.41e9, 32, 64, 16),
    "H100 SXM": (3.35e12, 132, 1.755e9, 64, 128, 16),
    "B200": (8e12, 148, 1.85e9, 64, 64, 16),
    "L40S": (0.864e12, 142, 2.52e9, 2, 2, 2),
}


def gramian_work(m: int, dtype: torch.dtype) -> dict[str, float]:
    """What one parameter costs: bytes read, multiply-adds, float64 ones among them, conversions to float64."""
    if m <= 8:
        M = 2 if m <= 2 else 4 if m <= 4 else 8
        pairs = M * (M + 1) / 2
        return {"bytes": m * dtype.itemsize, "vector": pairs, "tensor": 0, "conversions": M, "fma": pairs}
    tiles = 1 if m <= 16 else 2
    products = 256 * tiles * (tiles + 1) / 2
    # Conversions read from SASS: once a tile that is alone, twice where two tiles meet.
    return {
        "bytes": m * dtype.itemsize,
        "vector": 0,
        "tensor": products,
        "conversions": 16 * tiles * tiles,
        "fma": products,
    }


def combine_work(m: int, dtype: torch.dtype) -> dict[str, float]:
    """As `gramian_work`, for u = Σ w_i g_i into tensors of the rows' dtype."""
    padded = 4 if m <= 4 else 8 * math.ceil(m / 8)
    return {
        "bytes": (m + 1) * dtype.itemsize,
        "vector": padded,
        "tensor": 0,
        "conversions": padded + 2,
        "fma": padded,
    }


def model_seconds(work: dict[str, float], parameters: int, card: str) -> tuple[float, str]:
    """Return the least time that one card needs, and what binds it."""
    bandwidth, processors, clock, vector, tensor, conversions = CARDS[card]
    clocks = {
        "float64 units": work["vector"] / vector,
        "float64 tensor cores": work["tensor"] / tensor,
        "conversions": work["conversions"] / conversions,
    }
    times = {name: n * parameters / (processors * clock) for name, n in clocks.items()}
    times["memory"] = work["bytes"] * parameters / bandwidth
    binding = max(times, key=lambda name: times[name])
    return times[binding], binding


def print_model() -> None:
    print("\nModel (bytes and instruction counts; nothing here was timed), 100 M parameters")
    print(f"{'':28}{'bytes':>7}{'FMA':>7}{'FMA/byte':>9}" + "".join(f"{card:>32}" for card in CARDS))
    for what, work_of in (("gramian", gramian_work), ("combine", combine_work)):
        for dtype in DTYPES:
            for m in TASKS:
                work = work_of(m, dtype)
                line = f"{what} m={m} {str(dtype)[6:]}"
                line = f"{line:28}{work['bytes']:7.0f}{work['fma']:7.0f}{work['fma'] / work['bytes']:9.2f}"
                for card in CARDS:
                    seconds, binding = model_seconds(work, 100_000_000, card)
                    line += f"{seconds * 1e3:8.2f} ms {binding:>20}"
                print(line)
