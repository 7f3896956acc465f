"""The Triton twins of linalg's passes and of the solvers: the only place that knows about CUDA.

    dispatch.py   which path, which kernel, which vector width: pure functions, no Triton
    table.py      tables of pointers and of work items, built on the host, cached
    vectors.py    shared by kernels: a row's start and bound, and the lanes of a vector
    pairs.py      Gramian of at most 8 tasks: one multiply-add chain per pair of tasks
    dots.py       Gramian of at most 32 tasks: float64 tensor cores
    reduce.py     second stage of these two and of inner.py: partial sums of work items, in a fixed order
    gramian.py    launcher of these, for any number of tasks
    inner.py      ⟨d, g_i⟩ and ‖d‖² for the update guarantee
    combine.py    u = Σ w_i g_i into p.grad, and the correction of an update
    cone.py       the nonnegative and the simplex program, batched

Importing this package imports none of them: Triton is loaded when the first kernel is chosen.
"""
