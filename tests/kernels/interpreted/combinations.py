"""The combination kernel against torch's float64, bit for bit, in the interpreter."""

import pytest
import torch

from gradsurg.linalg.kernels import combine
from gradsurg.linalg.kernels.dispatch import DTYPES as PAIRS
from gradsurg.linalg.kernels.vectors import HOLD, LEAVE, WRITE
from tests.kernels.interpreted.harness import SIZES, make_rows, reads, times_read

COMBINATIONS = [(row, out) for row, outs in PAIRS.items() for out in sorted(outs, key=str)]


def weights_of(m, seed=1):
    return torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(rows, weights, start):
    """Σ w_i g_i on top of `start`, in float64 and in the order of the rows, rounded once."""
    results = []
    for k, first in enumerate(start):
        total = first.double()
        for row, w in zip(rows, weights.tolist(), strict=True):
            if row[k] is not None and w != 0:
                total = total + w * row[k].double()
        results.append(total if first.dtype == torch.float64 else total.float().to(first.dtype))
    return results


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("row", "out"), COMBINATIONS)
@pytest.mark.parametrize("m", [3, 9])
def test_bit_equal_to_one_rounding(m, row, out):
    rows, like = make_rows(m, SIZES, row, missing=0.2)
    w = weights_of(m)
    u = [torch.full_like(p, float("nan"), dtype=out) for p in like]
    combine.combine(rows, w, u)
    assert same(u, exactly(rows, w, [torch.zeros_like(t) for t in u]))
    start = [torch.randn(p.shape, dtype=torch.float64).to(out) for p in like]
    u = [t.clone() for t in start]
    combine.combine(rows, w, u, accumulate=True)
    assert same(u, exactly(rows, w, start))


@pytest.mark.parametrize("m", [1, 8, 32, 41])
def test_any_number_of_tasks(m):
    rows, like = make_rows(m, [3, 600, 4100])
    w = weights_of(m)
    u = [torch.empty_like(p) for p in like]
    combine.combine(rows, w, u)
    assert same(u, exactly(rows, w, like))


@pytest.mark.parametrize("m", [3, 20])
def test_a_row_of_weight_zero_is_not_read(m):
    rows, like = make_rows(m, [9, 700], missing=0.1)
    w = weights_of(m)
    w[1], w[m - 1] = 0.0, -0.0
    for i in (1, m - 1):
        rows[i] = [torch.full((9,), float("nan")), torch.full((700,), float("inf"))]
    u = [torch.empty_like(p) for p in like]
    with reads() as counts:
        combine.combine(rows, w, u)
    assert same(u, exactly(rows, w, like))
    for i, row in enumerate(rows):
        for g in row:
            assert g is None or times_read(counts, g) == {0 if w[i] == 0 else 1}


def test_what_stands_in_out_is_read_once_or_not_at_all():
    rows, like = make_rows(3, [700])
    w = weights_of(3)
    for accumulate in (False, True):
        with reads() as counts:
            combine.combine(rows, w, like, accumulate=accumulate)
        assert times_read(counts, like[0]) == {int(accumulate)}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    rows, like = make_rows(3, [20])
    rows[1][0][5] = bad
    u = [torch.empty_like(p) for p in like]
    combine.combine(rows, weights_of(3), u)
    assert torch.equal(torch.isfinite(u[0]), torch.arange(20) != 5)
    combine.combine(rows, torch.tensor([1.0, 1.0, bad], dtype=torch.float64), u)
    assert not torch.isfinite(u[0]).any()


def test_nobody_reached_it():
    u = [torch.full((5,), 3.0)]
    combine.combine([[None], [None]], weights_of(2), u, accumulate=True)
    assert torch.equal(u[0], torch.full((5,), 3.0))
    combine.combine([[None], [None]], weights_of(2), u)
    assert torch.equal(u[0], torch.zeros(5))


def test_layouts():
    generator = torch.Generator().manual_seed(0)

    def draws():
        base = torch.randn(9, 8, generator=generator)
        return [
            torch.randn(4, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last),
            torch.randn(20, 30, generator=generator).T,
            base[:, ::2],
            torch.cat([torch.zeros(1), torch.randn(77, generator=generator)])[1:],
            torch.randn(33, generator=generator, dtype=torch.complex64),
        ]

    rows, u = [draws() for _ in range(3)], draws()
    rows[1][1] = rows[1][1].contiguous()  # another order of elements than the others
    untouched = u[2]._base[:, 1::2].clone()
    w = weights_of(3)
    combine.combine(rows, w, u)
    for k, got in enumerate(u):
        wanted = sum(w[i].item() * rows[i][k].to(torch.complex128 if k == 4 else torch.float64) for i in range(3))
        assert (got - wanted).abs().max() <= 3e-7
    assert torch.equal(u[2]._base[:, 1::2], untouched)


def test_blocks_have_weights_of_their_own():
    rows, like = make_rows(3, [100, 31, 4200, 7])
    w = torch.stack([weights_of(3, 1), weights_of(3, 2), weights_of(3, 3)])
    u = [torch.empty_like(p) for p in like]
    combine.combine(rows, w, u, partitions=[0, 0, 1, 2])
    for k, block in enumerate([0, 0, 1, 2]):
        assert torch.equal(u[k], exactly([[row[k]] for row in rows], w[block], [like[k]])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_is_rounded_once(dtype):
    rows, like = make_rows(3, [300, 9], dtype, missing=0.2)
    after = [torch.randn(p.shape).to(dtype) for p in like]
    lam = torch.tensor([0.0, 0.7, 1.3], dtype=torch.float64)
    wanted = []
    for k, sign in enumerate([1.0, -1.0]):
        wanted += exactly([[row[k]] for row in rows], -sign * lam, [after[k]])
    combine.correct(rows, lam, after, signs=[1.0, -1.0])
    assert same(after, wanted)


def test_modes_are_decided_on_the_device():
    rows, like = make_rows(2, [300, 300, 300])
    before, after = [[torch.randn_like(p) for p in like] for _ in range(2)]
    before[2][4] = float("nan")  # what is not asked for is not read
    rows[0][1][3] = rows[0][0][3] = float("nan")
    start = [p.clone() for p in after]
    modes = torch.tensor([LEAVE.value, HOLD.value, WRITE.value], dtype=torch.int32)
    lam = torch.ones(3, 2, dtype=torch.float64)
    with reads() as counts:
        combine.correct(rows, lam, after, before=before, partitions=[0, 1, 2], modes=modes)
    assert torch.equal(after[0], start[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], exactly([[row[2]] for row in rows], -lam[2], [start[2]])[0])
    assert times_read(counts, before[0]) == times_read(counts, before[2]) == {0}
    assert times_read(counts, rows[0][0]) == times_read(counts, rows[0][1]) == {0}


def test_weights_must_be_float64():
    rows, like = make_rows(2, [3])
    with pytest.raises(ValueError, match="must be float64"):
        combine.combine(rows, torch.ones(2), like)
