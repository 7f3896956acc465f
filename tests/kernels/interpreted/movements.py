"""⟨d, g_i⟩ and ‖d‖² against the float64 twin, in the interpreter."""

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.kernels import inner
from gradsurg.linalg.kernels.dispatch import DTYPES as PAIRS
from gradsurg.linalg.kernels.vectors import LEAVE, WRITE
from tests.kernels.interpreted.harness import SIZES, make_rows, reads, times_read

COMBINATIONS = [(row, out) for row, outs in PAIRS.items() for out in sorted(outs, key=str)]


def steps(like, dtype, seed=5):
    generator = torch.Generator().manual_seed(seed)
    before = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in like]
    return before, [(p.double() * 1.01).to(dtype) for p in before]


def check(got, wanted, rows, like):
    (products, square), (wanted_products, wanted_square) = got, wanted
    assert products.dtype == square.dtype == torch.float64
    lengths = reference.gramian(rows, like).diagonal().sqrt() * wanted_square**0.5
    assert ((products - wanted_products).abs() <= 1e-15 * lengths).all()
    assert abs(square.item() - wanted_square) <= 1e-15 * wanted_square


@pytest.mark.parametrize(("row", "moved"), COMBINATIONS)
@pytest.mark.parametrize("m", [4, 11])
def test_matches_the_twin(m, row, moved):
    rows, like = make_rows(m, SIZES, row, missing=0.2)
    before, after = steps(like, moved)
    signs = [1.0, -1.0] * (len(SIZES) // 2)
    got = inner.inner(rows, before, after, signs=signs)
    check(got, reference.inner_update(rows, before, after, signs), rows, like)


def test_one_vector():
    rows, like = make_rows(3, [5, 4200])
    vector, zeros = steps(like, torch.float32)[0], [torch.zeros_like(p) for p in like]
    check(inner.inner(rows, vector), reference.inner_update(rows, vector, zeros, [1.0, 1.0]), rows, like)


def test_unaligned_and_in_two_orders():
    rows, like = make_rows(3, [513])
    rows = [[torch.cat([g[:1], g])[1:], torch.randn(6, 5)] for (g,) in rows]
    like = [like[0], torch.zeros(6, 5)]
    before = [torch.randn(513), torch.randn(5, 6).T]
    after = [torch.randn(514)[1:], torch.randn(6, 5)]
    got = inner.inner(rows, before, after)
    check(got, reference.inner_update(rows, before, after, [1.0, 1.0]), rows, like)


def test_each_element_is_read_once():
    rows, like = make_rows(6, [9, 700], missing=0.2)
    before, after = steps(like, torch.float32)
    with reads() as counts:
        inner.inner(rows, before, after)
    everything = [*(g for row in rows for g in row if g is not None), *before, *after]
    assert {times for t in everything for times in times_read(counts, t)} == {1}


def test_blocks_and_modes():
    rows, like = make_rows(3, [100, 4200, 31])
    before, after = steps(like, torch.float32)
    modes = torch.tensor([WRITE.value, LEAVE.value], dtype=torch.int32)
    with reads() as counts:
        products, square = inner.inner(rows, before, after, partitions=[0, 0, 1], modes=modes)
    assert products.shape == (2, 3)
    assert square.shape == (2,)
    part = [row[:2] for row in rows]
    wanted = reference.inner_update(part, before[:2], after[:2], [1.0, 1.0])
    check((products[0], square[0]), wanted, part, like[:2])
    assert not products[1].any()
    assert not square[1]
    assert times_read(counts, rows[0][2]) == times_read(counts, before[2]) == {0}
