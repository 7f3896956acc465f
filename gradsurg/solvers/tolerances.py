"""How wrong float64 results may be, and what follows from that. For every room that decides by a Gramian."""

from __future__ import annotations

__all__ = [
    "CANCELLATION_GRAMIAN",
    "CANCELLATION_SUM",
    "COARSER",
    "CONFLICT",
    "ROUNDING_CUDA",
    "ROUNDING_EXACT",
    "ROUNDING_QUICK",
    "STATIONARY",
]

# Relative error of a Gramian's entries, |error of G_ij| / (‖g_i‖ ‖g_j‖): of linalg/gramian.py with exact=False, with
# exact=True, and of linalg/kernels/gramian.py. Sums of a few float64 numbers also have the exact one's.
ROUNDING_QUICK = 4e-13
ROUNDING_EXACT = 4e-16
ROUNDING_CUDA = 1e-13

# u = Σ w_i g_i is a difference of vectors of total length S = Σ |w_i| ‖g_i‖; its cancellation is S / ‖u‖.
# Above this one the quick Gramian may err by more than 1e-9 in a cosine and 1e-5 in ‖u‖²: the exact one decides.
CANCELLATION_GRAMIAN = 1e4
# Above this one a float32 sum of 8 rows (8 roundings of 6e-8) would turn u by 2.5e-5, a quarter of what the guarantee
# allows: such sums are formed in float64.
CANCELLATION_SUM = 50.0

# ‖u‖², read off the Gramian, carries an error of rounding · S². Below 16 times that error u cannot be told from 0.
STATIONARY = 16.0

# No cosine of u with a gradient is below minus this in a method that promises no conflict; else u is held at 0.
CONFLICT = 1e-4

# Coarser roundings under which a program is solved again if its answer violates a task. Rows that balance up to
# √(8 · rounding) are then dependent. The last bounds what a task can lose by that to 2.8e-5 of ‖u‖, below the 1e-4 of
# the guarantee.
COARSER = (1e-14, 1e-12, 1e-10)
