"""Tables, whose small tensors are packed, against the float64 twin that knows of no packing."""

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.blocks import BLOCK, SMALL
from gradsurg.linalg.combine import combine, correct_
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.movement import inner_update
from gradsurg.linalg.packing import MOST, GradientTable

QUICK, EXACT = 1e-13, 1e-15  # of ‖a‖ ‖b‖, as for rows that are not packed
SHAPES = {
    "all small": [(7, 11), (), (13,), (3, 5, 2)],
    "some large": [(SMALL,), (4, 4), (BLOCK + 3,), (9,)],
    "more than is packed": [(SMALL - 1,)] * (MOST // SMALL + 2),
    "nothing in some": [(0,), (5,), (4, 0)],
}
shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


def case(shapes, m, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn((m + 2, *shape), generator=generator).to(dtype) for shape in shapes]
    parameters = [stacked[m].clone() for stacked in draw]
    after = [p - 0.1 * stacked[m + 1] for p, stacked in zip(parameters, draw, strict=True)]
    return parameters, after, GradientTable([stacked[i].clone() for stacked in draw] for i in range(m))


@shapes
@pytest.mark.parametrize("m", [1, 3, 4, 7, 13, 33])
def test_gramian_is_that_of_the_twin(shapes, m):
    parameters, _, table = case(shapes, m)
    assert table.packed() is not None
    want = reference.gramian(table, parameters)
    lengths = want.diagonal().sqrt()
    for exact, tolerance in [(False, QUICK), (True, EXACT)]:
        got = gramian(table, exact=exact)
        assert torch.equal(got, got.T)
        assert ((got - want).abs() <= tolerance * lengths[:, None] * lengths).all()


@pytest.mark.parametrize("shapes", [[(0,), (2, 0)], [(0,), (SMALL + 1,), (3, 0)]])
def test_of_tensors_that_have_no_numbers_nothing_is_packed(shapes):
    parameters, after, table = case(shapes, 3)
    assert table.packed() is None
    signs, weights = [1.0] * len(shapes), [1.0, -2.0, 0.5]
    want_inner, want_square = reference.inner_update(table, parameters, after, signs)
    for exact in (False, True):
        assert torch.allclose(gramian(table, exact=exact), reference.gramian(table, parameters), rtol=1e-12)
        inner, square = inner_update(table, parameters, after, signs, exact=exact)
        assert torch.allclose(inner, want_inner, rtol=1e-12)
        assert square == pytest.approx(want_square, rel=1e-12)
    u = combine(table, weights, parameters)
    assert [t.shape for t in u] == [p.shape for p in parameters]
    assert torch.allclose(reference.flat(u, parameters), reference.combine(table, weights, parameters), atol=1e-5)
    correct_(table, weights, after, signs)


@shapes
@pytest.mark.parametrize("signs", [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)])
@pytest.mark.parametrize("exact", [False, True])
def test_movement_and_correction_are_those_of_the_twin(shapes, signs, exact):
    parameters, after, table = case(shapes, 5)
    signs = [signs[k % 2] for k in range(len(shapes))]
    want, want_square = reference.inner_update(table, parameters, after, signs)
    inner, square = inner_update(table, parameters, after, signs, exact=exact)
    tolerance = EXACT if exact else QUICK
    lengths = reference.gramian(table, parameters).diagonal().sqrt() * want_square**0.5
    assert ((inner - want).abs() <= tolerance * lengths).all()
    assert square == pytest.approx(want_square, rel=tolerance)
    coefficients = [0.3, 0.0, 2.0, -0.1, 0.0]
    moved = reference.correct(table, coefficients, after, signs)
    scale = reference.flat(after, after).abs() + reference.matrix(table, after).abs().sum(0) * 2
    correct_(table, coefficients, after, signs, exact=exact)
    assert ((reference.flat(after, after) - moved).abs() <= (6e-8 if exact else 2.4e-7) * scale).all()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_combination_is_that_of_the_twin(shapes, dtype, exact):
    parameters, _, table = case(shapes, 4, dtype)
    weights = [0.5, -1.0, 2.0, 0.25]
    u = combine(table, weights, parameters, exact=exact)
    assert [(t.shape, t.dtype) for t in u] == [(p.shape, p.dtype) for p in parameters]
    scale = reference.matrix(table, parameters).abs().sum(0)
    tolerance = 1e-15 if dtype == torch.float64 else 2.4e-7
    assert (
        (reference.flat(u, parameters) - reference.combine(table, weights, parameters)).abs() <= tolerance * 2 * scale
    ).all()


def test_rows_of_sixteen_bits_are_combined_in_the_parameters_dtype():
    _, _, table = case([(7, 3), (5,)], 3, torch.bfloat16)
    parameters = [torch.zeros(7, 3), torch.zeros(5)]
    u = combine(table, [1.0, 2.0, 3.0], parameters)
    torch.testing.assert_close(
        reference.flat(u, parameters), reference.combine(table, [1.0, 2.0, 3.0], parameters), rtol=1e-6, atol=1e-6
    )


def test_a_row_of_weight_zero_is_not_read():
    parameters, _, table = case([(4,), (2, 2)], 3)
    table[1][0].fill_(float("nan"))
    u = combine(table, [1.0, 0.0, -1.0], parameters)
    assert all(t.isfinite().all() for t in u)


@pytest.mark.parametrize(
    "rows",
    [
        [[torch.ones(2), None], [torch.ones(2), torch.ones(3)]],
        [[torch.ones(2), torch.ones(3).double()], [torch.ones(2), torch.ones(3).double()]],
        [[torch.ones(2), torch.ones(3).to_sparse()], [torch.ones(2), torch.ones(3)]],
        [[torch.ones(2) + 1j, torch.ones(3) + 1j], [torch.ones(2) + 1j, torch.ones(3) + 1j]],
        [[torch.ones(2)], [torch.ones(2)]],
    ],
    ids=["a gap", "two dtypes", "sparse", "complex", "one tensor"],
)
def test_what_cannot_be_packed_is_read_as_it_is(rows):
    table = GradientTable(rows)
    assert table.packed() is None
    torch.testing.assert_close(gramian(table), gramian(rows), rtol=0, atol=0)
