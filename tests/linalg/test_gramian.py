"""The Gramian against its float64 twin, over every kind of tensor that a gradient can be."""

from fractions import Fraction

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.blocks import BLOCK, SMALL, flat_column
from gradsurg.linalg.combine import combine
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.movement import inner_update
from tests.linalg.gradient_rows import EXACT, QUICK, SHAPES, assert_close_by_entry, rows_of


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("m", [1, 2, 3, 4, 9])
def test_gramian_is_that_of_the_twin(shapes, m):
    parameters, rows = rows_of(shapes, m)
    want = reference.gramian(rows, parameters)
    assert_close_by_entry(rows, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128])
def test_gramian_of_other_dtypes(dtype):
    parameters, rows = rows_of([(3,), (40, 5), (SMALL + 3,)], 4, dtype=dtype)
    want = reference.gramian(rows, parameters)
    assert_close_by_entry(rows, want)


def test_constant_rows_do_not_drift():
    # A running float32 sum of 131 072 equal squares is off by 5e-5; nearly opposite tasks would amplify that.
    rows = [[torch.full((BLOCK,), 0.0013)], [torch.full((BLOCK,), 0.3)]]
    want = reference.gramian(rows, rows[0])
    assert_close_by_entry(rows, want)


@pytest.mark.parametrize("m", [2, 4, 9])
def test_what_is_promised_holds_for_constant_rows_of_many_blocks(m):
    # 0.7 · 0.1 summed one after the other, 131 072 times in a matrix product, is off by 5e-13, and 1/3 · 1e-5 by 2e-12.
    numbers = [float(torch.tensor(x)) for x in (0.7, 0.1, 1 / 3, 1e-5)]
    values = [numbers[i % 4] for i in range(m)]
    shapes = [(1_500_000,), (131_071,), (196_608,)]
    rows = [[torch.full(shape, value) for shape in shapes] for value in values]
    before, after = [torch.full(shape, 0.5) for shape in shapes], [torch.full(shape, 0.1) for shape in shapes]
    count, d = sum(shape[0] for shape in shapes), 0.5 - float(torch.tensor(0.1))
    for exact, tolerance in [(False, QUICK), (True, EXACT)]:
        G = gramian(rows, exact=exact)
        inner, square = inner_update(rows, before, after, [1.0] * 3, exact=exact)
        for i, x in enumerate(values):
            assert inner[i].item() == pytest.approx(float(count * Fraction(d) * Fraction(x)), rel=tolerance)
            for j, y in enumerate(values):
                assert G[i, j].item() == pytest.approx(float(count * Fraction(x) * Fraction(y)), rel=tolerance)
        assert square == pytest.approx(float(count * Fraction(d) ** 2), rel=tolerance)


def test_an_infinite_row_makes_infinite_entries():
    G = gramian([[torch.tensor([float("inf")])], [torch.tensor([1.0])]])
    assert torch.equal(G, torch.tensor([[float("inf"), float("inf")], [float("inf"), 1.0]], dtype=torch.float64))


def test_parameters_of_several_dtypes_and_rows_of_another():
    parameters = [torch.zeros(5), torch.zeros(6, dtype=torch.float64), torch.zeros(7, dtype=torch.bfloat16)]
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters] for _ in range(3)]
    rows[1][0] = rows[1][0].bfloat16()
    want = reference.gramian(rows, parameters)
    assert torch.allclose(gramian(rows), want, rtol=0, atol=QUICK * float(want.diagonal().max()))
    u = combine(rows, [0.5, -2.0, 3.0], parameters)
    assert [t.dtype for t in u] == [p.dtype for p in parameters]


def test_layouts_need_no_copy_and_mix_freely():
    parameters, rows = rows_of([(8, 6, 5, 4)], 3, missing=0)
    last = [[g.to(memory_format=torch.channels_last) for g in row] for row in rows]
    views = flat_column([row[0] for row in last])
    assert all(view.data_ptr() == row[0].data_ptr() for view, row in zip(views, last, strict=True))
    mixed = [last[0], rows[1], [rows[2][0].transpose(0, 1).contiguous().transpose(0, 1)]]
    want = reference.gramian(rows, parameters)
    for variant in (last, mixed):
        assert torch.allclose(gramian(variant), want, rtol=1e-11)
        u = combine(variant, [1.0, 2.0, -0.5], parameters)
        assert torch.allclose(
            u[0].double().reshape(-1), reference.combine(rows, [1.0, 2.0, -0.5], parameters), atol=1e-6
        )
