"""Gradients of several tasks as rows of tensors, and the comparison of sums entry by entry."""

import torch

from gradsurg.linalg.blocks import BLOCK, SMALL
from gradsurg.linalg.gramian import gramian

# Of |g_i| |g_j|: running float64 sums (6e-14 on constant rows), and pairwise ones.
QUICK, EXACT = 1e-13, 1e-15


def rows_of(shapes, m, *, dtype=torch.float32, missing=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    rows = [
        [
            None
            if torch.rand((), generator=generator) < missing
            else torch.randn(p.shape, generator=generator).to(dtype)
            for p in parameters
        ]
        for _ in range(m)
    ]
    for k, p in enumerate(parameters):  # every parameter is reached by somebody
        if all(row[k] is None for row in rows):
            rows[0][k] = torch.randn(p.shape, generator=generator).to(dtype)
    return parameters, rows


def assert_close_by_entry(rows, want):
    norms = want.diagonal().sqrt()
    for exact, tolerance in [(False, QUICK), (True, EXACT)]:
        got = gramian(rows, exact=exact)
        assert got.dtype == torch.float64
        assert torch.equal(got, got.T)
        assert ((got - want).abs() <= tolerance * norms[:, None] * norms).all()


SHAPES = {
    "tiny": [(), (1,), (3, 2)],
    "empty": [(0,), (4, 0), (5,)],
    "around the packing size": [(SMALL - 1,), (SMALL,), (SMALL + 1,)],
    "around the block size": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,)],
    "many small": [(7, 11)] * 40 + [(13,)] * 40,
    "packs overflow": [(SMALL - 5,)] * 9,
}
