"""Launches the Gramian kernels: G_ij = ⟨g_i, g_j⟩ in float64, for any number of tasks, tensors and partitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.kernels import dots, pairs, reduce
from gradsurg.linalg.kernels.dispatch import GramianKernel, gramian_kernel, task_tiles
from gradsurg.linalg.kernels.table import Launch, Plan, constant, device_of, on_device, plan

__all__ = ["TRITON_DTYPES", "gramian", "sum_partials"]

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def gramian(rows: Rows, *, partitions: Sequence[int] | None = None) -> Tensor:
    """Return G_ij = ⟨g_i, g_j⟩; each gradient is read once (if m > 32, once per union of tiles of tasks).

    Deterministic: the order of all sums depends on m, sizes, dtypes and alignment alone. Products of 16 and 32-bit rows
    are exact and sums are in float64: relative to ‖g_i‖ ‖g_j‖ the error is below 1e-13.

    Args:
        rows: m lists of one gradient per parameter (dense; real or complex; float64, 32, 16 or bfloat16) or None.
        partitions: The partition that each parameter belongs to, ascending from 0; each has its own Gramian. None is
            one partition.

    Returns:
        Shape (m, m), or (partitions, m, m) if partitions are given; float64, symmetric to the bit, on the rows' device.
    """
    m, device = len(rows), device_of(rows)
    count = 1 if not partitions else partitions[-1] + 1
    G = torch.empty(count, m, m, dtype=torch.float64, device=device)
    tiles = task_tiles(m)
    if len(tiles) == 1:
        _write(rows, partitions, G)
    for a, (first, end) in enumerate(tiles[:-1]):
        for other, other_end in tiles[a + 1 :]:
            tasks = [*range(first, end), *range(other, other_end)]
            union = torch.empty(count, len(tasks), len(tasks), dtype=torch.float64, device=device)
            _write([rows[i] for i in tasks], partitions, union)
            left = end - first
            G[:, first:end, first:end] = union[:, :left, :left]
            G[:, first:end, other:other_end] = union[:, :left, left:]
            G[:, other:other_end, first:end] = union[:, left:, :left]
            G[:, other:other_end, other:other_end] = union[:, left:, left:]
    return G[0] if partitions is None else G


def sum_partials(partials: Tensor, layout: Plan, places: Sequence[tuple[int, int]], out: Tensor) -> None:
    """Add up partial sums (slots, planes) partition by partition into `out` (partitions, stride)."""
    planes = len(places)
    where = constant([place for both in places for place in both], out.device, torch.int64)
    grid = (triton.cdiv(planes, reduce.PLANES), layout.partitions)
    with on_device(out.device):
        reduce.reduce_kernel[grid](
            partials,
            layout.bounds,
            where,
            out,
            planes,
            out[0].numel(),
            PLANES=reduce.PLANES,
            SLOTS=reduce.SLOTS,
            num_warps=reduce.WARPS,
            enable_fp_fusion=True,
        )


def _write(rows: Rows, partitions: Sequence[int] | None, G: Tensor) -> None:
    m = len(rows)
    layout = plan(rows, partitions=partitions)
    kernel = gramian_kernel(m)
    pairs_of = pairs.pair_places(kernel.tasks) if kernel.name == "pairs" else dots.dot_places(kernel.tasks // dots.TILE)
    partials = torch.empty(max(layout.slots, 1), len(pairs_of), dtype=torch.float64, device=G.device)
    with on_device(G.device):
        for launch in layout.launches:
            _launch(kernel, launch, layout, partials, m)
    # The two places of ⟨g_i, g_j⟩ in G; the lower triangle of a tile on the diagonal is not used.
    places = [(i * m + j, j * m + i) if i <= j < m else (-1, -1) for i, j in pairs_of]
    sum_partials(partials, layout, places, G)


def _launch(kernel: GramianKernel, launch: Launch, layout: Plan, partials: Tensor, m: int) -> None:
    (dtype,) = launch.dtypes
    common = {"DTYPE": TRITON_DTYPES[dtype], "ALIGNED": launch.aligned, "V": launch.vector, "enable_fp_fusion": True}
    arguments = (layout.pointers, launch.items, partials, layout.width, m)
    grid = (len(launch.items),)
    if kernel.name == "pairs":
        pairs.pairs_kernel[grid](
            *arguments,
            M=kernel.tasks,
            LANES=32 * pairs.WARPS,
            num_warps=pairs.WARPS,
            **common,
        )
    else:
        tiles = kernel.tasks // dots.TILE
        dots.dots_kernel[grid](
            *arguments,
            TILES=tiles,
            BLOCK=dots.block_for(tiles, dtype.itemsize),
            num_warps=dots.WARPS,
            maxnreg=dots.registers_for(tiles, dtype.itemsize, launch.aligned),
            **common,
        )
