"""Nothing is read or written beyond a tensor's end: each ends at a page that nobody may touch."""

import pytest
import torch

from gradsurg.linalg.kernels import combine, gramian, inner, left, moved
from tests.kernels.interpreted.harness import DTYPES, guarded, make_rows

SIZES = [1, 8, 1025]  # less than a vector of 16 bytes, one and no more, whole blocks and one element


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 7, 17])
def test_all_kernels_stay_inside(m, dtype):
    rows, like = make_rows(m, SIZES, dtype)
    rows = [[guarded(g) for g in row] for row in rows]
    before, after = [[guarded(torch.randn(p.shape).to(dtype)) for p in like] for _ in range(2)]
    assert torch.isfinite(gramian.gramian(rows)).all()
    products, square = inner.inner(rows, before, after)
    assert torch.isfinite(products).all()
    assert square > 0
    weights = torch.ones(m, dtype=torch.float64)
    combine.combine(rows, weights, after)
    combine.correct(rows, weights, after, before=before)
    # In a step of which some numbers stay, for the passes that look for them.
    gradients = [guarded(torch.randn(p.shape).to(dtype)) for p in like]
    for p, old in zip(after, before, strict=True):
        p[::2], old[::3] = old[::2], 0
    layout = inner.layout_of(rows, before, after, gradients, partitions=[0] * len(like))
    ones, modes = torch.ones(len(like), dtype=torch.float64), torch.ones(1, dtype=torch.int32)
    flags = left.left_in_place(layout, m, [0] * len(like), modes).flags
    assert flags.any()
    assert torch.isfinite(moved.gramian_moved(layout, m, ones, flags, modes)[0]).all()
    combine.correct(rows, weights, after, layout=layout, factors=ones, flags=flags)
    left.shorten(layout, m, torch.full((1,), 0.5, dtype=torch.float64), after)


if __name__ == "__main__":  # the control: one element more than there are must be a fault
    lone = guarded(torch.ones(100))
    from gradsurg.linalg.kernels import table

    layout = table.plan([[lone], [lone]])
    layout.launches[0].items[0, 2] += 1
    gramian.plan = lambda *args, **kwargs: layout
    gramian.gramian([[lone], [lone]])
