"""The sum of products of blocks, against sums of exact products."""

import pytest
import torch

from gradsurg.linalg.buffers import LANE, Buffers, products_with_last
from gradsurg.linalg.gramian import MANY_FROM, GramianSum, PairwiseSum

QUICK, EXACT = 1e-13, 1e-15  # of ‖a‖ ‖b‖


def blocks_of(m, size, count):
    generator = torch.Generator().manual_seed(m)
    return [torch.randn(m, size, generator=generator, dtype=torch.float64) for _ in range(count)]


def stack(workspace, rows):
    return workspace.stack(0, [[row] for row in rows.unbind(0)])


def product(a, b):
    return (a * b).sum()  # pairwise


def assert_close(got, want, tolerance=QUICK):
    lengths = want.diagonal().sqrt()
    assert torch.equal(got, got.T)
    assert ((got - want).abs() <= tolerance * lengths[:, None] * lengths).all()


@pytest.mark.parametrize("m", [1, 2, 3, 4, MANY_FROM - 1, MANY_FROM, 2 * MANY_FROM])
@pytest.mark.parametrize("size", [1, LANE - 1, LANE, 3 * LANE + 5])
def test_strips_make_the_whole_product(m, size):
    total, workspace = GramianSum(m), Buffers()
    a, b = blocks_of(m, size, 2)
    count = 2 * PairwiseSum.SHORT + 1  # long enough to be folded twice
    for _ in range(count):
        for block in (a, b[:, : size // 2 + 1]):
            total.add(list(range(m)), stack(workspace, block), exact=False)
    b = b[:, : size // 2 + 1]
    want = count * torch.stack([torch.stack([product(x, y) for y in a]) for x in a])
    want += count * torch.stack([torch.stack([product(x, y) for y in b]) for x in b])
    assert_close(total.result(), want)


def test_sums_that_were_folded_many_times_lose_nothing():
    total, workspace = GramianSum(2), Buffers()
    block = torch.tensor([[0.1], [0.7]], dtype=torch.float64).expand(2, 3)
    count = PairwiseSum.SHORT * PairwiseSum.MOST + 5
    for _ in range(count):
        total.add([0, 1], stack(workspace, block), exact=False)
    one = block[:, 0]
    assert_close(total.result(), 3.0 * count * torch.outer(one, one), 1e-14)


@pytest.mark.parametrize("exact", [False, True])
def test_blocks_of_some_of_the_tasks_and_single_numbers_add_up(exact):
    total, workspace = GramianSum(4), Buffers()
    want = torch.zeros(4, 4, dtype=torch.float64)
    for present in ([0, 1, 2, 3], [1, 3], [2], [0, 1, 2, 3]):
        (block,) = blocks_of(len(present), 5000, 1)
        total.add(present, stack(workspace, block), exact)
        for a, i in enumerate(present):
            for b, j in enumerate(present):
                want[i, j] += product(block[a], block[b])
    total.put(2, 1, 0.25)
    want[2, 1] += 0.25
    want[1, 2] += 0.25
    assert_close(total.result(), want, EXACT if exact else QUICK)


def test_of_nothing_the_sum_is_zero():
    assert torch.equal(GramianSum(3).result(), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [1, LANE, 5 * LANE + 3])
def test_products_with_the_last_row_end_with_its_square(exact, size):
    (rows,) = blocks_of(4, size, 1)
    got = products_with_last(stack(Buffers(), rows), exact)
    last = rows[-1]
    for value, row in zip(got, rows, strict=True):
        bound = (EXACT if exact else QUICK) * float(row.norm() * last.norm())
        assert abs(value - float(product(row, last))) <= bound
