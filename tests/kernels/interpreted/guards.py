"""Nothing is read or written beyond a tensor's end: each ends at a page that nobody may touch."""

import pytest
import torch

from gradsurg.linalg.kernels import combine, gramian, inner
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


if __name__ == "__main__":  # the control: one element more than there are must be a fault
    lone = guarded(torch.ones(100))
    from gradsurg.linalg.kernels import table

    layout = table.plan([[lone], [lone]])
    layout.launches[0].items[0, 2] += 1
    gramian.plan = lambda *args, **kwargs: layout
    gramian.gramian([[lone], [lone]])
