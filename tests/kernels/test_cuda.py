"""On a real device: correctness at scale, no waiting, CUDA graphs. Skipped, and said so, where there is none."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are tested where it is")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these tests need one")

from gradsurg.linalg import reference  # noqa: E402
from gradsurg.linalg.kernels import combine, cone, gramian, inner  # noqa: E402
from gradsurg.linalg.kernels.vectors import HOLD, LEAVE, WRITE  # noqa: E402
from gradsurg.solvers.problem import HOST  # noqa: E402
from tests.kernels.whole_step import (  # noqa: E402
    CAPTURABLE,
    WITHOUT_WAITING,
    Model,
    masked_steps,
    replayed_and_eager,
    step,
    trained,
    wrapped,
)

SIZES = [1, 3, 0, 4097, 1_000_003, 64, 250_000]


def make_rows(m, dtype=torch.float32, sizes=SIZES, missing=0.1):
    generator = torch.Generator("cuda").manual_seed(0)
    chance = torch.Generator().manual_seed(0)
    rows = [
        [
            None
            if torch.rand((), generator=chance) < missing
            else torch.randn(n, device="cuda", generator=generator).to(dtype)
            for n in sizes
        ]
        for _ in range(m)
    ]
    return rows, [torch.randn(n, device="cuda", generator=generator).to(dtype) for n in sizes]


def surgery(rows, out):
    """The whole of it, as an optimizer does it: Gramian, scales, program, combination."""
    G = gramian.gramian(rows)
    s = G.diagonal().rsqrt()
    scaled = G * s * s[:, None]
    weights = s * (1 + cone.nonnegative(scaled, scaled.sum(-1)))
    combine.combine(rows, weights, out)


def guarantee(rows, before, after):
    G = gramian.gramian(rows)
    products, square = inner.inner(rows, before, after)
    lam = cone.nonnegative(G, products, scale=square.sqrt())
    modes = torch.where(torch.isfinite(lam).all(), WRITE.value, HOLD.value).to(torch.int32).reshape(1)
    combine.correct(rows, lam, after, before=before, modes=modes)


@contextmanager
def error_on_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 32, 40])
def test_gramian_and_combination_at_scale(m, dtype):
    rows, like = make_rows(m, dtype)
    G = gramian.gramian(rows)
    wanted = reference.gramian(rows, like)
    lengths = wanted.diagonal().sqrt()
    assert ((G - wanted).abs() <= 1e-13 * lengths[:, None] * lengths).all()
    assert torch.equal(G, G.T)
    assert torch.equal(G, gramian.gramian(rows))  # deterministic
    w = torch.randn(m, dtype=torch.float64, device="cuda")
    w[0] = 0
    out = [torch.empty_like(p) for p in like]
    combine.combine(rows, w, out)
    exact = reference.combine(rows, w.tolist(), like)
    got = reference.flat(out, like)
    # Where the terms cancel, the order of their sum shows in more than the last place of the result.
    terms = reference.combine([[None if g is None else g.abs() for g in row] for row in rows], w.abs().tolist(), like)
    assert ((got - exact).abs() <= torch.finfo(dtype).eps * terms + 1e-7 * (dtype != torch.float64)).all()


@pytest.mark.parametrize("m", [1, 2, 5, 8, 13, 16, 32])
def test_programs(m):
    generator = torch.Generator("cuda").manual_seed(m)
    J = torch.randn(64, m, 2 * m, dtype=torch.float64, device="cuda", generator=generator)
    J = J - 0.9 * J.mean(1, keepdim=True)  # in conflict; of all of the mean, b would leave no minimum
    G = J @ J.mT
    b = G.sum(-1) - 0.1 * G.diagonal(dim1=-2, dim2=-1)
    mine, theirs = cone.nonnegative(G, b), HOST.nonnegative(G.cpu(), b.cpu()).cuda()
    assert (((mine - theirs).unsqueeze(-2) @ J).abs() <= 1e-8 * J.norm()).all()
    mine, theirs = cone.simplex(G), HOST.simplex(G.cpu()).cuda()
    assert (((mine - theirs).unsqueeze(-2) @ J).abs() <= 1e-6 * J.norm()).all()


def test_movement():
    rows, before = make_rows(5)
    after = [p * 0.99 for p in before]
    signs = [1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    products, square = inner.inner(rows, before, after, signs=signs)
    wanted, wanted_square = reference.inner_update(rows, before, after, signs)
    lengths = reference.gramian(rows, before).diagonal().sqrt() * wanted_square**0.5
    assert ((products - wanted).abs() <= 1e-13 * lengths).all()
    assert abs(square.item() - wanted_square) <= 1e-13 * wanted_square


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 6 * n:
        pytest.skip("the card has no room for two rows of 2**31 bfloat16 numbers and their sum")
    rows = [[torch.zeros(n, dtype=torch.bfloat16, device="cuda")] for _ in range(2)]
    for i, (g,) in enumerate(rows):
        g[-3:] = i + 1.0
    assert gramian.gramian(rows).tolist() == [[3.0, 6.0], [6.0, 12.0]]
    combine.combine(rows, torch.ones(2, dtype=torch.float64, device="cuda"), rows[0])
    assert rows[0][0][-4:].tolist() == [0.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("m", [3, 8, 20])
def test_nothing_waits_for_the_device(m):
    rows, before = make_rows(m)
    after, out = [p * 0.99 for p in before], [torch.empty_like(p) for p in before]
    surgery(rows, out)  # compile, and upload the tables
    torch.cuda.synchronize()
    with error_on_waiting():
        surgery(rows, out)
        guarantee(rows, before, after)
        moved = [[None if g is None else g.clone() for g in row] for row in rows]  # other addresses: new tables
        surgery(moved, out)


@pytest.mark.parametrize("m", [3, 20])
def test_in_a_cuda_graph(m):
    rows, before = make_rows(m)
    after, out = [p * 0.99 for p in before], [torch.empty_like(p) for p in before]
    start = [p.clone() for p in after]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            surgery(rows, out)
            guarantee(rows, before, after)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = [[None if g is None else g * 1 for g in row] for row in rows]  # from the graph's own memory
        surgery(moved, out)
        guarantee(moved, before, after)
    for factor in (1.0, 2.0, -3.0):
        for row in rows:
            for g in row:
                if g is not None:
                    g.mul_(factor).add_(0.01)
        for p, old in zip(after, start, strict=True):
            p.copy_(old)
        graph.replay()
        wanted = [torch.empty_like(p) for p in out]
        corrected = [p.clone() for p in start]
        surgery(rows, wanted)
        guarantee(rows, before, corrected)
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(after, corrected, strict=True))


def test_waiting_would_be_noticed():
    x = torch.ones(3, device="cuda")
    with error_on_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize(("options", "optimizer"), WITHOUT_WAITING)
def test_a_whole_step_does_not_wait(options, optimizer):
    """From the first backward to the end of step(); two steps before it compile, and make the optimizer's state."""
    gradients, mine, report, after = trained("triton", optimizer, 3, error_on_waiting, device="cuda", **options)
    wanted_gradients, theirs, wanted, _ = trained("torch", optimizer, 1, device="cuda", **options)
    assert (report.path, wanted.path) == ("triton", "torch")
    for found, due in ((gradients, wanted_gradients), (mine, theirs)):
        for a, b in zip(found, due, strict=True):
            eps = torch.finfo(b.dtype).eps if b.dtype == torch.bfloat16 else 2e-5
            assert ((a - b).abs() <= eps * b.abs().max()).all()
    assert after.report.step == report.step + 2


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_what_was_left_in_place_stays_and_rates_count(make):
    mine = masked_steps(make, "triton", error_on_waiting, "cuda")
    seen = []
    for (moves, _, corrected), (wanted, _, due) in zip(
        mine, masked_steps(make, "torch", nullcontext, "cuda"), strict=True
    ):
        assert not moves[0][:5].any()
        assert not moves[2].any()
        assert (torch.cat(moves) - torch.cat(wanted)).abs().max() <= 1e-5 * torch.cat(wanted).abs().max()
        assert corrected == due
        seen.append(due)
    assert any(seen)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
@pytest.mark.parametrize(("options", "optimizer"), CAPTURABLE)
def test_a_whole_step_in_a_cuda_graph(options, optimizer):
    """Replayed from the same start on other numbers, it does what an eager step does."""
    # One stream for all of it: a parameter's gradients are accumulated on the stream of its first use.
    stream = torch.cuda.Stream()

    @contextmanager
    def alone():
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            yield
        torch.cuda.synchronize()

    def capture(run):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return graph.replay

    with alone():
        model = Model("cuda", narrow=torch.float32)
        mine = wrapped(model, optimizer, **options)
        for _ in range(3):
            step(model, mine)
    for replayed, eager in replayed_and_eager(model, mine, capture, alone):
        for a, b in zip(replayed, eager, strict=True):
            # cuBLAS may choose another kernel in a capture: the same numbers, not the same order of sums.
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_on_another_stream_than_the_tables_were_made_on():
    rows, _ = make_rows(4)
    wanted = gramian.gramian(rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = gramian.gramian(rows)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, wanted)


def test_a_report_is_read_on_another_stream_than_the_step_s():
    options, optimizer = WITHOUT_WAITING[0]
    _, _, wanted, _ = trained("triton", optimizer, 1, device="cuda", **options)
    model = Model("cuda")
    mine = wrapped(model, optimizer, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # 50 ms: nothing of the step is done when the report is asked for
        step(model, mine)
    found = mine.report
    assert torch.equal(found.gramian, wanted.gramian)
    assert torch.equal(found.movement.inner, wanted.movement.inner)


def test_modes():
    rows, before = make_rows(2, sizes=[5000, 5000, 5000], missing=0.0)
    after = [p * 0.9 for p in before]
    start = [p.clone() for p in after]
    modes = torch.tensor([LEAVE.value, HOLD.value, WRITE.value], dtype=torch.int32, device="cuda")
    lam = torch.ones(3, 2, dtype=torch.float64, device="cuda")
    combine.correct(rows, lam, after, before=before, partitions=[0, 1, 2], modes=modes)
    assert torch.equal(after[0], start[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], (start[2].double() - rows[0][2].double() - rows[1][2].double()).float())
