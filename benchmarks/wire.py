"""The plan on paper of docs/many-gpus.md: bytes, memory and time a step of surgery needs on many GPUs.

Every number is computed from the formulas of that page and the assumptions below; nothing here is measured.

Run: python -m benchmarks.wire
"""

from __future__ import annotations

PARAMETERS, TASKS, GPUS, PER_NODE = 7e9, 8, 64, 8
TOKENS = 16_384  # a GPU and step
FLOPS = 400e12  # what a GPU does of dense bfloat16, a little over 40 % of an H100's peak
BETWEEN_NODES, WITHIN_NODE = 50e9, 450e9  # bytes a second and GPU, each way
PARAMETER_BYTES, GRADIENT_BYTES = 2, 4  # bfloat16 parameters on the wire, float32 reduction


def fsdp(tasks: int, shards: int) -> tuple[float, float]:
    """Return the bytes of parameters and of gradients that a rank sends: a gather forward, and both once a task."""
    share = (shards - 1) / shards
    return (1 + tasks) * PARAMETER_BYTES * PARAMETERS * share, tasks * GRADIENT_BYTES * PARAMETERS * share


def compute(tasks: int) -> float:
    """Return seconds: 2 operations a parameter and token forward, 4 backward."""
    return (2 + 4 * tasks) * PARAMETERS * TOKENS / FLOPS


def rows(shards: int, width: int) -> float:
    """Return the bytes of rows a rank holds."""
    return TASKS * width * PARAMETERS / shards


def main() -> None:
    giga = 1e9
    print(f"{PARAMETERS / 1e9:.0f} B parameters, {TASKS} tasks, {GPUS} GPUs, {TOKENS} tokens a GPU\n")
    print("| layout | sent between nodes | within | link | compute | rows, float32 | rows, bfloat16 |")
    print("|--|--|--|--|--|--|--|")
    for label, tasks in (("FSDP2 over 64, one loss", 1), (f"FSDP2 over 64, {TASKS} tasks", TASKS)):
        between = sum(fsdp(tasks, GPUS))
        held = "0 GB | 0 GB" if tasks == 1 else f"{rows(GPUS, 4) / giga:.1f} GB | {rows(GPUS, 2) / giga:.1f} GB"
        seconds = between / BETWEEN_NODES
        print(f"| {label} | {between / giga:.0f} GB | | {seconds:.1f} s | {compute(tasks):.1f} s | {held} |")
    nodes = GPUS // PER_NODE
    within = sum(fsdp(TASKS, PER_NODE))
    between = TASKS * 2 * (nodes - 1) / nodes * GRADIENT_BYTES * PARAMETERS / PER_NODE
    seconds = max(between / BETWEEN_NODES, within / WITHIN_NODE)
    held = f"{rows(PER_NODE, 4) / giga:.1f} GB | {rows(PER_NODE, 2) / giga:.1f} GB"
    print(
        f"| shards of 8 in a node, 8 copies, {TASKS} tasks | {between / giga:.0f} GB | {within / giga:.0f} GB "
        f"| {seconds:.1f} s | {compute(TASKS):.1f} s | {held} |"
    )
    print("\nDDP, bytes a rank sends over a plain step's, at W ranks large:")
    for m in (2, 4, 8):
        print(f"m = {m}: {(m + 1) / 2:.1f} times, {(m + 2) / 2:.1f} where the update is projected")


if __name__ == "__main__":
    main()
