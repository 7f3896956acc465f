"""gramian.py against its float64 twin, over every kind of tensor that a gradient can be."""

from fractions import Fraction

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.blocks import BLOCK, SMALL, blocks, cut, flat_column
from gradsurg.linalg.combine import DIRECT, GROUPED, combine, correct_
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.movement import inner_update

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


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(5, 8, [5]), (11, 8, [11]), (100, 40, [64, 36]), (40, 9, [16, 16, 8])]
)
def test_tensors_are_cut_evenly(count, size, lengths):
    a, b = torch.arange(count), -torch.arange(count)
    parts = list(cut([a, b], size))
    assert [len(x) for x, _ in parts] == lengths
    assert all(torch.equal(torch.cat([part[k] for part in parts]), whole) for k, whole in enumerate((a, b)))


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


def test_blocks_read_every_number_once_and_keep_tags_apart():
    shapes = [(SMALL - 1,), (2 * BLOCK + 7,), (5,), (6,), ()]
    tensors = [torch.full(shape, float(k + 1)) for k, shape in enumerate(shapes)]
    tags = ["a", "a", "b", "a", "b"]
    seen = dict.fromkeys(range(len(shapes)), 0)
    for tag, (pieces,) in blocks([tensors], tags=tags):
        assert sum(piece.numel() for piece in pieces) <= BLOCK + SMALL
        for k in range(len(shapes)):
            count = sum(int((piece == k + 1).sum()) for piece in pieces)
            assert count == 0 or tags[k] == tag
            seen[k] += count
    assert seen == {k: t.numel() for k, t in enumerate(tensors)}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("exact", [False, True])
def test_movement_and_correction_are_those_of_the_twin(dtype, exact):
    before, rows = rows_of([(), (3,), (40, 5), (SMALL + 3,), (BLOCK + 5,)], 3, dtype=dtype)
    generator = torch.Generator().manual_seed(9)
    after = [p + 0.1 * torch.randn(p.shape, generator=generator).to(dtype) for p in before]
    signs = [1.0, -1.0, 1.0, -1.0, 1.0]
    inner, square = inner_update(rows, before, after, signs, exact=exact)
    want, want_square = reference.inner_update(rows, before, after, signs)
    lengths = reference.gramian(rows, before).diagonal().sqrt() * want_square**0.5
    tolerance = EXACT if exact else QUICK
    assert ((inner - want).abs() <= tolerance * lengths).all()
    assert square == pytest.approx(want_square, rel=tolerance)
    coefficients = [0.0, 0.7, -0.2]
    corrected = [p.clone() for p in after]
    correct_(rows, coefficients, corrected, signs, exact=exact)
    exactly = reference.correct(rows, coefficients, after, signs)
    unit = torch.finfo(dtype).eps
    assert ((reference.flat(corrected, after) - exactly).abs() <= unit * (exactly.abs() + 5)).all()


def test_correction_reaches_parameters_that_are_views():
    base = torch.zeros(4, 6)
    parameter = base[:, ::2]
    correct_([[torch.ones(4, 3)]], [0.5], [parameter], [1.0])
    assert torch.equal(parameter, torch.full((4, 3), -0.5))
    assert torch.equal(base[:, 1::2], torch.zeros(4, 3))


def test_sparse_rows_stay_sparse():
    index = torch.tensor([[1, 3, 1]])
    a = torch.sparse_coo_tensor(
        index, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), (5, 2), check_invariants=True
    )
    b = torch.sparse_coo_tensor(
        torch.tensor([[3, 0]]), torch.tensor([[1.0, -1.0], [2.0, 2.0]]), (5, 2), check_invariants=True
    )
    dense = torch.arange(3.0)
    parameters = [torch.zeros(5, 2), torch.zeros(3)]
    rows = [[a, dense], [b, None], [None, dense]]
    assert torch.equal(gramian(rows), reference.gramian(rows, parameters))
    u = combine(rows, [1.0, 2.0, 3.0], parameters)
    assert u[0].is_sparse
    assert torch.equal(reference.flat(u, parameters), reference.combine(rows, [1.0, 2.0, 3.0], parameters))
    after = [torch.ones(5, 2), torch.ones(3)]
    inner, square = inner_update(rows, parameters, after, [1.0, 1.0])
    want, want_square = reference.inner_update(rows, parameters, after, [1.0, 1.0])
    assert torch.equal(inner, want)
    assert square == want_square
    wanted = reference.correct(rows, [1.0, 0.5, 2.0], after, [1.0, 1.0])
    correct_(rows, [1.0, 0.5, 2.0], after, [1.0, 1.0])
    assert torch.equal(reference.flat(after, parameters), wanted)


def test_sparse_and_dense_rows_of_one_parameter():
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[2.0]]), (3, 1), check_invariants=True)
    dense = torch.ones(3, 1)
    parameters = [torch.zeros(3, 1)]
    rows = [[sparse], [dense]]
    assert torch.equal(gramian(rows), reference.gramian(rows, parameters))
    u = combine(rows, [1.0, -1.0], parameters)
    assert torch.equal(reference.flat(u, parameters), reference.combine(rows, [1.0, -1.0], parameters))


def test_a_weight_beyond_float32_on_a_gradient_near_nothing():
    parameter, tiny = torch.zeros(3), torch.full((3,), 1e-40)
    rows = [[tiny], [torch.tensor([1.0, 0.0, 0.0])]]
    want = 1e40 * tiny.double() + torch.tensor([1.0, 0.0, 0.0]).double()
    (u,) = combine(rows, [1e40, 1.0], [parameter])
    torch.testing.assert_close(u.double(), want, rtol=1e-7, atol=0)
    correct_(rows, [1e40, 1.0], [parameter], [1.0])
    torch.testing.assert_close(parameter.double(), -want, rtol=1e-7, atol=0)
