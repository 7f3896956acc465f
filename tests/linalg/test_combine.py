"""The weighted sum of rows against its float64 twin."""

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.blocks import BLOCK, SMALL
from gradsurg.linalg.combine import DIRECT, GROUPED, combine, correct_
from tests.linalg.gradient_rows import rows_of


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_combination_is_that_of_the_twin(exact, dtype):
    parameters, rows = rows_of([(), (3,), (0,), (40, 5), (SMALL + 3,), (BLOCK + 5,)], 4, dtype=dtype)
    weights = [0.3, 0.0, -2.0, 1.0]
    u = combine(rows, weights, parameters, exact=exact)
    want = reference.combine(rows, weights, parameters)
    assert [t.dtype for t in u] == [p.dtype for p in parameters]
    scale = sum(abs(w) for w in weights) * 5  # |g| of a normal number rarely exceeds 5
    # float32 sums of 4 terms: 4 roundings of 6e-8 each; the exact form rounds once
    tolerance = 1e-15 if dtype == torch.float64 else (6e-8 if exact else 2.4e-7)
    assert ((reference.flat(u, parameters) - want).abs() <= tolerance * scale).all()


def test_many_small_and_a_few_large_tensors_are_combined_where_they_were_told_to():
    shapes = [(SMALL - 1,)] * (GROUPED // SMALL + 3) + [(SMALL,), (2, DIRECT // 2), (DIRECT + 1,)]
    parameters, rows = rows_of(shapes, 3, missing=0)
    weights = [0.3, 0.0, -2.0]
    into = [torch.full_like(p, float("nan")) if p.numel() >= SMALL else None for p in parameters]
    u = combine(rows, weights, parameters, into=into)
    assert all(t is room for t, room in zip(u, into, strict=True) if room is not None)
    want = reference.combine(rows, weights, parameters)
    scale = reference.matrix(rows, parameters).abs().sum(0)
    assert ((reference.flat(u, parameters) - want).abs() <= 2.4e-7 * 2 * scale).all()


def test_a_row_of_weight_zero_is_not_read():
    parameters, rows = rows_of([(3,), (SMALL + 1,), (BLOCK + 1,)], 2, missing=0)
    rows[1] = [torch.full_like(g, float("nan")) for g in rows[1]]
    for exact in (False, True):
        assert all(torch.isfinite(u).all() for u in combine(rows, [2.0, 0.0], parameters, exact=exact))
    assert all((u == 0).all() for u in combine(rows, [0.0, 0.0], parameters))


def test_a_weight_beyond_float32_on_a_gradient_near_nothing():
    parameter, tiny = torch.zeros(3), torch.full((3,), 1e-40)
    rows = [[tiny], [torch.tensor([1.0, 0.0, 0.0])]]
    want = 1e40 * tiny.double() + torch.tensor([1.0, 0.0, 0.0]).double()
    (u,) = combine(rows, [1e40, 1.0], [parameter])
    torch.testing.assert_close(u.double(), want, rtol=1e-7, atol=0)
    correct_(rows, [1e40, 1.0], [parameter], [1.0])
    torch.testing.assert_close(parameter.double(), -want, rtol=1e-7, atol=0)
