"""What a step left in place and the metric of its learning rates, against the float64 twins, in the interpreter."""

import itertools
from contextlib import nullcontext

import pytest
import torch

import gradsurg
from gradsurg.guarantee.update import project_update
from gradsurg.guarantee.update_cuda import project_update_cuda
from gradsurg.linalg import moved
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.kernels import combine, inner, left
from gradsurg.linalg.kernels.dispatch import DTYPES as PAIRS
from gradsurg.linalg.kernels.moved import gramian_moved, moved_places
from gradsurg.linalg.kernels.vectors import EVERY, HOLD, LEAVE, MEANT, WRITE
from tests.guarantee.test_foreign import OnSphere, Riemannian
from tests.guarantee.test_metric import step as one_step
from tests.guarantee.test_metric import worst_cosine
from tests.kernels.interpreted.harness import make_rows, reads, times_read
from tests.kernels.whole_step import masked_steps
from tests.no_waiting import no_waiting

COMBINATIONS = [(row, out) for row, outs in PAIRS.items() for out in sorted(outs, key=str)]
# How a step treats a tensor, and what of it stays by intent.
STEPS = ["all moved", "p.grad masked", "a rest stays", "rounded away", "zeros stay", "unmoved", "no p.grad", "small"]
SIZES = [1500, 1025, 700, 1027, 9, 130, 0, 3]


def step(sizes, dtype, seed=0):
    """Return parameters before and after a step, and p.grad, as STEPS says; a number triples, stays, or becomes 0."""
    draw = torch.Generator().manual_seed(seed)
    before, after, gradients = [], [], []
    for kind, size in zip(STEPS, sizes, strict=True):
        old = torch.randn(size, generator=draw).to(dtype)
        g = torch.randn(size, generator=draw).to(dtype)
        new = (old.double() * 3).to(dtype)
        some = torch.arange(size) % 3 == 0
        if kind == "p.grad masked":
            g[some] = 0
            new[some] = old[some]
        elif kind == "a rest stays":
            new[some] = old[some]
            new[1] = 0
        elif kind == "rounded away":
            new[:5] = old[:5]
            g[3] = new[7] = 0
        elif kind == "zeros stay":
            old[some] = 0
            new[some] = -0.0
        elif kind in ("unmoved", "small"):
            new = old.clone()
        before.append(old)
        after.append(new)
        gradients.append(None if kind == "no p.grad" else g)
    return before, after, gradients


def tables(rows, before, after, gradients, partitions):
    return inner.layout_of(rows, before, after, gradients, partitions=partitions)


def masks(flags, before, after, gradients):
    """Return which numbers the flags mean."""
    found = []
    for flag, old, new, g in zip(flags.tolist(), before, after, gradients, strict=True):
        meant = (old == 0) | (torch.zeros_like(old, dtype=torch.bool) if g is None else g == 0)
        stays = (old == new) & (meant if flag == MEANT.value else torch.full_like(meant, flag == EVERY.value))
        found.append(stays | ((new == 0) & (old != 0) & (flag != 0)))
    return found


def ones(count):
    return torch.ones(count, dtype=torch.int32)


@pytest.mark.parametrize("dtype", PAIRS)
@pytest.mark.parametrize("unaligned", [0, 1])
def test_the_same_numbers_are_left_as_on_the_host(dtype, unaligned):
    tensors = step([size + unaligned for size in SIZES], dtype)
    before, after, gradients = [[None if t is None else t[unaligned:] for t in each] for each in tensors]
    wanted = moved.left_in_place(before, after, gradients)
    assert [mask is None for mask in wanted] == [True, False, False, False, False, False, True, False]
    layout = tables([after], before, after, gradients, list(range(8)))
    found = left.left_in_place(layout, 1, list(range(8)), ones(8))
    for mine, theirs, p in zip(masks(found.flags, before, after, gradients), wanted, before, strict=True):
        assert torch.equal(mine, torch.zeros_like(p, dtype=torch.bool) if theirs is None else theirs)
    assert (found.some > 0).tolist() == [mask is not None for mask in wanted]
    for far, old, new in zip(found.farthest, before, after, strict=True):
        assert far == (max(map(abs, (old.double() - new.double()).tolist())) if len(old) else 0)


def test_what_is_in_no_conflict_is_not_read():
    before, after, gradients = step(SIZES, torch.float32)
    rows, _ = make_rows(2, SIZES)
    layout = tables(rows, before, after, gradients, [0] * 4 + [1] * 4)
    modes = torch.tensor([LEAVE.value, WRITE.value], dtype=torch.int32)
    with reads() as counts:
        found = left.left_in_place(layout, 2, [0] * 4 + [1] * 4, modes)
        gramian_moved(layout, 2, torch.ones(8, dtype=torch.float64), found.flags, torch.zeros_like(modes))
    assert times_read(counts, before[0]) == times_read(counts, gradients[0]) == times_read(counts, rows[0][5]) == {0}
    assert times_read(counts, before[5]) == times_read(counts, after[5]) == times_read(counts, gradients[5]) == {1}
    assert found.some.tolist() == [0, EVERY.value]
    # Of a tensor in which everything moved, p.grad is not read at all.
    with reads() as counts:
        left.left_in_place(layout, 2, [0] * 4 + [1] * 4, modes.flip(0))
    assert times_read(counts, before[0]) == {1}
    assert times_read(counts, gradients[0]) == {0}


@pytest.mark.parametrize(
    ("m", "row", "out"), [(m, *pair) for m in (3, 7) for pair in COMBINATIONS] + [(13, torch.bfloat16, torch.float32)]
)
def test_gramian_of_what_moved(m, row, out):
    before, after, gradients = step(SIZES, out)
    rows, _ = make_rows(m, SIZES, row, missing=0.2)
    partitions = [0, 0, 0, 0, 1, 1, 1, 1]
    metric = [1.0, 0.5, 0.0, 0.25, 1.0, 1.0, 1.0, 1.0]
    layout = tables(rows, before, after, gradients, partitions)
    flags = left.left_in_place(layout, m, partitions, ones(2)).flags
    G, length, pulled = gramian_moved(layout, m, torch.tensor(metric, dtype=torch.float64), flags, ones(2))
    stays = moved.left_in_place(before, after, gradients)
    for k, part in enumerate([slice(0, 4), slice(4, 8)]):
        cut = [each[part] for each in rows], before[part], after[part], metric[part], stays[part]
        wanted, wanted_length = moved.gramian_moved(*cut)
        assert ((G[k] - wanted).abs() <= 1e-13 * wanted.diagonal().max()).all()
        assert abs(length[k] - wanted_length) <= 1e-13 * wanted_length
        # What no rate moves is of no matter: such a partition needs the metric anyway.
        assert bool(pulled[k]) == moved.pulled(
            cut[0], [None if M == 0 else s for s, M in zip(cut[4], cut[3], strict=True)]
        )


def test_rows_that_are_zero_where_numbers_stay_do_not_pull():
    before, after, gradients = step(SIZES, torch.float32)
    rows, _ = make_rows(2, SIZES)
    stays = moved.left_in_place(before, after, gradients)
    for row, k in itertools.product(rows, range(8)):
        if stays[k] is not None:
            row[k][stays[k]] = 0
    layout = tables(rows, before, after, gradients, [0] * 8)
    flags = left.left_in_place(layout, 2, [0] * 8, ones(1)).flags
    G, _, pulled = gramian_moved(layout, 2, torch.ones(8, dtype=torch.float64), flags, ones(1))
    assert not pulled
    assert torch.allclose(G[0], gramian(rows, exact=True), rtol=1e-13)
    rows[1][1][-2] = 1e-30
    assert moved.pulled(rows, stays)
    assert gramian_moved(layout, 2, torch.ones(8, dtype=torch.float64), flags, ones(1))[2]


@pytest.mark.parametrize("m", [2, 4, 7, 8, 9, 13, 32])
def test_every_pair_of_tasks_has_one_place(m):
    tasks = 4 if m <= 4 else 8
    unions = list(itertools.combinations(range(max(2, -(-m // (tasks // 2)))), 2))
    places = [place for both in moved_places(m, tasks, unions) for place in set(both) if place >= 0]
    assert sorted(places) == list(range(m * m + 1 + len(unions)))


@pytest.mark.parametrize(("row", "out"), COMBINATIONS)
@pytest.mark.parametrize("m", [3, 9])
def test_a_correction_in_the_metric_is_rounded_once_and_leaves_what_stays(m, row, out):
    before, after, gradients = step(SIZES, out)
    rows, _ = make_rows(m, SIZES, row)
    lam = torch.rand(m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = torch.tensor([1.0, -0.5, 0.25, 1.0, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    layout = tables(rows, before, after, gradients, [0] * 8)
    flags = left.left_in_place(layout, m, [0] * 8, ones(1)).flags
    start = [p.clone() for p in after]
    combine.correct(rows, lam, after, layout=layout, factors=factors, flags=flags)
    for k, stays in enumerate(masks(flags, before, start, gradients)):
        total = start[k].double()
        for i in range(m):
            total = total - factors[k] * lam[i] * rows[i][k].double()
        wanted = total if out == torch.float64 else total.float().to(out)
        assert torch.equal(after[k], torch.where(stays | (factors[k] == 0), start[k], wanted))
    combine.correct(rows, lam, after, layout=layout, factors=factors, flags=flags, modes=ones(1) * HOLD.value)
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", PAIRS)
def test_shortening(dtype):
    before, after, gradients = step(SIZES, dtype)
    layout = tables([after], before, after, gradients, list(range(8)))
    shares = torch.tensor([0.3, 1.0, 0.7, 2.0, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    start = [p.clone() for p in after]
    left.shorten(layout, 1, shares, after)
    for share, old, was, now in zip(shares.tolist(), before, start, after, strict=True):
        wanted = old.double() + min(share, 1.0) * (was.double() - old.double())
        assert (now.double() - wanted).abs().le(torch.finfo(dtype).eps * wanted.abs()).all()
        assert torch.equal(now[old == was], old[old == was])
        assert share < 1 or torch.equal(now, was)


def cases():
    """Yield (name, rows, before, after, p.grad, rates): conflicts, in which the metric matters or does not."""
    draw = torch.Generator().manual_seed(7)

    def vectors(count, sizes):
        return [[torch.randn(n, generator=draw) for n in sizes] for _ in range(count)]

    for name, m, sizes, rates in [
        ("one rate", 3, [40, 30], [0.1, 0.1]),
        ("rates differ", 3, [40, 30], [0.1, 0.001]),
        ("rates differ, and a step is shortened", 2, [40, 3], [1.0, 0.001]),
        ("a group with rate 0", 3, [40, 30], [0.1, 0.0]),
        ("only rate 0 moved", 2, [0, 30], [0.1, 0.0]),
        ("more tasks", 11, [90, 90], [0.1, 0.02]),
    ]:
        rows, (before, d) = vectors(m, sizes), vectors(2, sizes)
        for g, step, k in zip(rows[0], d, range(2), strict=True):
            step *= rates[k] / max(rates) if rates[k] else 0.1 * (name == "only rate 0 moved")
            step -= 0.2 * g * (rates[k] > 0)
        for masked in (False, True):
            gradients = [torch.ones(n) for n in sizes]
            moves = [step.clone() for step in d]
            if masked:
                for each in (*gradients, *moves):
                    each[::3] = 0
            yield name, rows, before, [p - step for p, step in zip(before, moves, strict=True)], gradients, rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_guarantee_in_a_metric_decides_as_the_host_does(dtype):
    """Every case is a partition of its own on the device, and a call of its own on the host."""
    every, seen = list(cases()), []
    for m in {len(case[1]) for case in every}:
        chosen = [case for case in every if len(case[1]) == m]

        def joined(which, chosen=chosen):
            return [t.to(dtype) for case in chosen for t in case[which]]

        rows = [[g for case in chosen for g in case[1][i]] for i in range(m)]
        before, after, gradients = joined(2), joined(3), joined(4)
        mine, theirs = [p.clone() for p in after], [p.clone() for p in after]
        G = torch.stack([gramian(case[1], exact=True) for case in chosen])
        numbers = [k for k in range(len(chosen)) for _ in range(2)]
        rates = [rate for case in chosen for rate in case[5]]
        signs = [1.0] * len(rates)
        found = project_update_cuda(rows, G, before, mine, signs, numbers, None, torch.tensor(True), rates, gradients)
        for k, (name, some, *_) in enumerate(chosen):
            part = slice(2 * k, 2 * k + 2)
            tensors = before[part], theirs[part]
            said = rates[part], gradients[part]
            left_here = moved.left_in_place(*tensors, gradients[part])
            wanted = project_update(some, G[k], *tensors, signs[:2], None, meant=lambda said=said: said)
            assert (bool(found.corrected[k]), bool(found.held[k])) == (wanted.corrected, wanted.held), name
            size = max(
                float((p.double() - old.double()).abs().max()) for p, old in zip(*tensors, strict=True) if len(p)
            )
            for p, q in zip(mine[part], theirs[part], strict=True):
                eps = torch.finfo(dtype).eps
                assert ((p.double() - q.double()).abs() <= 2 * eps * q.double().abs() + 1e-7 * size).all(), name
            for old, now, stays in zip(before[part], mine[part], left_here, strict=True):
                assert stays is None or torch.equal(now[stays], old[stays])
            assert found.inner[k] == pytest.approx(wanted.inner, rel=1e-3, abs=1e-2 * size)
            seen.append((name, wanted.corrected, wanted.held))
    assert sum(corrected for _, corrected, _ in seen) >= 10, seen
    assert any(held for _, _, held in seen), seen


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_steps_with_a_mask_and_rates_by_layer_are_those_of_the_host(make):
    """Judged by autograd, and by the torch path."""
    pairs = zip(masked_steps(make, "triton", no_waiting), masked_steps(make, "torch", nullcontext), strict=True)
    seen = []
    for (moves, gradients, corrected), (wanted, _, due) in pairs:
        assert worst_cosine(moves, gradients) >= -1e-4
        assert not moves[0][:5].any()
        assert not moves[2].any()
        mine, theirs = torch.cat(moves), torch.cat(wanted)
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert corrected == due
        seen.append(due)
    assert any(seen)


def test_foreign_parameters_and_many_tasks_are_held_to_the_promise_on_the_host():
    """The device's programs take 32 tasks, and no kernel reads a tensor class that only its own operations may."""
    torch.manual_seed(0)
    p, q = OnSphere(torch.randn(5)), torch.nn.Parameter(torch.randn(5))
    with pytest.warns(UserWarning, match="leaves parameters of class OnSphere"):
        optimizer = gradsurg.wrap(Riemannian([p, q], lr=0.05), surgery="mean", normalize="none", backend="triton")
    corrected = 0
    for _ in range(4):
        rows = torch.randn(3, 10)
        rows[1] -= 1.5 * rows[0]
        moves, gradients = one_step(optimizer, [p, q], dict(zip("abc", torch.cat([p, q]) @ rows.T, strict=True)))
        plain = [t.as_subclass(torch.Tensor) for t in moves]
        assert worst_cosine(plain, gradients) >= -1e-4
        assert abs(float(p.detach().norm()) - 1) <= 3e-7
        corrected += optimizer.report.movement.corrected
    assert corrected
    many = torch.nn.Parameter(torch.randn(40))
    optimizer = gradsurg.wrap(torch.optim.SGD([many], lr=0.1), surgery="mean", backend="triton")
    losses = {str(i): many @ row for i, row in enumerate(torch.randn(33, 40))}
    moves, gradients = one_step(optimizer, [many], losses)
    assert worst_cosine(moves, gradients) >= -1e-4
    assert optimizer.report.movement.corrected
    assert optimizer.report.path == "triton"
