"""Whole steps of a wrapped optimizer by the kernels against the torch path, and that nothing in them waits."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

import gradsurg
from gradsurg.guarantee.update import project_update as guard_on_the_host
from gradsurg.guarantee.update_cuda import project_update_cuda
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.kernels import table
from gradsurg.optimizer.report import DeferredReport
from tests.kernels.interpreted import harness  # noqa: F401 (has the interpreter round bfloat16 as hardware does)
from tests.kernels.whole_step import (
    CAPTURABLE,
    COEFFICIENTS,
    WITHOUT_WAITING,
    Model,
    replayed_and_eager,
    step,
    trained,
    wrapped,
)
from tests.no_waiting import WaitError, no_waiting

ADAM, SGD = torch.optim.Adam, torch.optim.SGD


def close(mine, theirs, tolerance):
    eps = torch.finfo(theirs.dtype).eps if theirs.dtype == torch.bfloat16 else tolerance
    return bool(((mine - theirs).abs() <= eps * theirs.abs().max()).all())


@pytest.mark.parametrize(("options", "optimizer"), WITHOUT_WAITING)
def test_the_same_step_as_with_torch_and_nothing_waits(options, optimizer):
    gradients, mine, report, _ = trained("triton", optimizer, 2, watch=no_waiting, **options)
    wanted_gradients, theirs, wanted, _ = trained("torch", optimizer, 1, **options)
    assert all(close(g, h, 2e-5) for g, h in zip(gradients, wanted_gradients, strict=True))
    assert all(close(p, q, 2e-5) for p, q in zip(mine, theirs, strict=True))
    assert (report.path, wanted.path) == ("triton", "torch")
    assert report.blocks == wanted.blocks
    assert (report.weights - wanted.weights).abs().max() <= 2e-5 * wanted.weights.abs().max()
    assert (report.direction_cosines - wanted.direction_cosines).abs().max() <= 2e-5
    assert (report.movement is None) == (wanted.movement is None)
    if options.get("guarantee", "update") == "update":
        protected = slice(1, 2) if options.get("auxiliary") == "help" else slice(None)
        assert (report.update_cosines[protected] >= -1e-2).all()  # some of the parameters are of 16 bits


class Recorder(TorchDispatchMode):
    """Keeps the names of all operations of torch, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
@pytest.mark.parametrize(("options", "optimizer"), [WITHOUT_WAITING[0], WITHOUT_WAITING[2]])
def test_what_is_launched_does_not_depend_on_the_numbers(monkeypatch, options, optimizer):
    """Without which a captured graph, replayed with other numbers, would do something else than a step."""
    launches, interpreted = [], InterpretedFunction.__getitem__

    def logged(self, grid):
        def launch(*arguments, **keywords):
            launches.append((self.fn.__name__, grid))
            with _disable_current_modes():  # what the interpreter itself does is the device's affair
                return interpreted(self, grid)(*arguments, **keywords)

        return launch

    model = Model()
    mine = wrapped(model, optimizer, **options)
    step(model, mine)  # the first makes the optimizer's state
    monkeypatch.setattr(InterpretedFunction, "__getitem__", logged)
    # Whether a table of these addresses is there already is chance.
    monkeypatch.setattr(table, "_cached", lambda key, device, make, fleeting=False: make())
    start, state = copy.deepcopy(model.state_dict()), copy.deepcopy(mine.state_dict())
    seen, moved = [], []
    for coefficients in COEFFICIENTS:
        model.load_state_dict(start)
        mine.load_state_dict(copy.deepcopy(state))
        model.coefficients.copy_(torch.tensor(coefficients))
        launches.clear()
        with Recorder() as recorder:
            step(model, mine)
        seen.append((recorder.names, list(launches)))
        moved.append(mine.report.movement is not None and mine.report.movement.corrected)
    assert len(seen[0][0]) > 50
    assert len(seen[0][1]) >= 3
    for operations, launched in seen[1:]:
        assert operations == seen[0][0]
        assert launched == seen[0][1]
    if options.get("guarantee", "update") == "update":
        assert any(moved)  # the numbers did ask for different things
        assert not all(moved)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
def test_the_test_of_a_cuda_graph_has_a_rehearsal():
    """Of test_cuda.py, which CI cannot run: its body, with a step done anew where a graph would replay one."""
    options, (kind, _) = CAPTURABLE[2]
    model = Model(narrow=torch.float32)
    mine = wrapped(model, (kind, {}), **options)
    step(model, mine)
    pairs = list(replayed_and_eager(model, mine, capture=lambda run: run, alone=nullcontext))
    assert len(pairs) == len(COEFFICIENTS)
    for replayed, eager in pairs:
        assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(replayed, eager, strict=True))


def test_a_method_that_waits_is_called_so_and_does():
    assert {method.name for method in gradsurg.methods() if not method.waits} == {
        *("sum", "mean", "cone", "upgrad", "mgda"),
        *("none", "norm"),
    }
    with pytest.raises(WaitError, match="direction_cuda"):
        trained("triton", (SGD, {}), 1, watch=no_waiting, surgery="pcgrad")
    _, mine, report, _ = trained("triton", (SGD, {}), 1, surgery="pcgrad")
    _, theirs, _, _ = trained("torch", (SGD, {}), 1, surgery="pcgrad")
    assert report.path == "triton"
    assert all(close(p, q, 2e-5) for p, q in zip(mine, theirs, strict=True))


def test_the_torch_path_would_wait():
    with pytest.raises(WaitError):
        trained("torch", (SGD, {}), 1, watch=no_waiting)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
@pytest.mark.parametrize("surgery", ["cone", "pcgrad"])
def test_not_finite_is_written_as_a_plain_sum_and_moves_nothing_else(surgery):
    model = Model()
    wrapped = gradsurg.wrap(SGD([model.first, model.shift], lr=0.1), backend="triton", surgery=surgery)
    gradients = {name: [torch.ones(5, 6), torch.tensor(1.0)] for name in "ab"}
    gradients["b"][0][2, 3] = float("inf")
    wrapped.set_gradients(gradients)
    assert torch.equal(torch.isfinite(model.first.grad), torch.isfinite(gradients["b"][0]))
    assert model.shift.grad == 2
    wrapped.step()
    assert wrapped.report.nonfinite == ("b",)
    assert not wrapped.report.stationary
    assert wrapped.report.movement is None or not wrapped.report.movement.corrected


def test_opposed_tasks_are_stationary():
    model = Model()
    optimizer = torch.optim.AdamW([model.first, model.shift], lr=0.1, weight_decay=0.5)
    wrapped = gradsurg.wrap(optimizer, backend="triton")
    g = [torch.randn(5, 6), torch.randn(())]
    wrapped.set_gradients({"a": g, "b": [-3 * t for t in g]})
    wrapped.step()
    assert wrapped.report.stationary
    assert not model.first.grad.any()
    assert wrapped.report.movement.corrected  # weight decay moves what is orthogonal to both, and no more
    assert (wrapped.report.update_cosines >= -1e-4).all()


@pytest.mark.parametrize("m", [2, 5])
def test_16_bit_rows_that_nearly_cancel_are_told_apart(m):
    """u is so short that sums good to 4e-7, as float32 ones of eight products were, could not tell it from 0."""
    draw = torch.Generator().manual_seed(m)
    g = torch.randn(2048, generator=draw).bfloat16()
    rows = [(g if i == 0 else -g / (m - 1)).bfloat16() for i in range(m)]
    for row in rows:
        row[:8] += 0.02 * torch.randn(8, generator=draw).bfloat16()
    exact = torch.stack(rows).double()
    found = []
    for backend in ("triton", "torch"):
        p = torch.nn.Parameter(torch.zeros(2048))
        mine = gradsurg.wrap(
            SGD([p], lr=1.0), backend=backend, row_dtype=torch.bfloat16, normalize="none", guarantee="gradient"
        )
        mine.set_gradients({str(i): [row.float()] for i, row in enumerate(rows)})
        u = p.grad.double()
        assert not mine.report.stationary
        assert (exact @ u >= -1e-4 * exact.norm(dim=1) * u.norm()).all()
        found.append(u)
    assert found[0].norm() < 2.6e-3 * exact.norm(dim=1).sum()
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()


CASES = {
    "agreeing": ([[1.0, 0.0, 0.2], [0.5, 1.0, 0.0]], [1.0, 1.0, 0.0]),
    "in conflict": ([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.0]], [1.0, -1.0, 0.3]),
    "all of it has to go": ([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], [1.0, 0.0, 0.0]),
    "nothing moved": ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1.0), (torch.bfloat16, 1e-2)])
def test_the_guarantee_decides_as_the_host_does(dtype, size):
    """Each case is a block of its own; movements of 16-bit parameters are a few units in the last place."""
    draw = torch.Generator().manual_seed(3)
    rows = [[torch.tensor(case[0][i]).repeat(40).to(dtype) for case in CASES.values()] for i in range(2)]
    before = [torch.randn(120, generator=draw).to(dtype) for _ in CASES]
    moves = [torch.tensor(case[1]).repeat(40) * size for case in CASES.values()]
    after = [(p.float() - d).to(dtype) for p, d in zip(before, moves, strict=True)]
    mine, theirs = [p.clone() for p in after], [p.clone() for p in after]
    count = len(CASES)
    G = torch.stack([gramian([[row[k]] for row in rows], exact=True) for k in range(count)])
    finite, ones = torch.tensor(True), [1.0] * count
    movement = project_update_cuda(rows, G, before, mine, ones, list(range(count)), None, finite)
    for k in range(count):
        wanted = guard_on_the_host([[row[k]] for row in rows], G[k], [before[k]], [theirs[k]], [1.0], None)
        assert bool(movement.corrected[k]) == wanted.corrected
        assert bool(movement.held[k]) == wanted.held
        assert close(mine[k], theirs[k], 1e-6)
        norms = G[k].diagonal().sqrt()
        d = before[k].double() - mine[k].double()
        allowed = -1e-2 if dtype == torch.bfloat16 else -1e-4
        assert (torch.stack([d @ row[k].double() for row in rows]) >= allowed * norms * d.norm()).all()
        assert (movement.inner[k] - wanted.inner).abs().max() <= 1e-6 * norms.max() * (1 + d.norm())
    untouched = [p.clone() for p in after]
    project_update_cuda(rows, G, before, untouched, ones, list(range(count)), None, torch.tensor(False))
    assert all(torch.equal(p, q) for p, q in zip(untouched, after, strict=True))


def test_two_optimizers_share_the_rows_and_are_judged_apart():
    results = []
    for backend in ("triton", "torch"):
        model = Model()
        left, right = gradsurg.wrap(
            [SGD([model.first], lr=0.1), ADAM([model.shift, model.second, *model.heads], lr=0.1)], backend=backend
        )
        left.total(model.losses()).backward()
        left.step()
        right.step()
        results.append((list(model.parameters()), right.report))
    assert all(close(p, q, 2e-5) for p, q in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1].movement.inner.shape == (3,)
    assert isinstance(results[0][1].movement.square, float)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_are_let_go_while_a_report_is_unread(backend):
    model = Model()
    wrapped = gradsurg.wrap(SGD(model.parameters(), lr=0.1), backend=backend)
    wrapped.total(model.losses()).backward()
    trunk = (model.first, model.second, model.shift)
    rows = [weakref.ref(g) for p in trunk for g in wrapped._gradsurg.capture.rows.of(p)]
    assert len(rows) == 9
    assert not any(row() is None for row in rows)
    wrapped.step()
    gc.collect()
    assert isinstance(wrapped._gradsurg.latest, DeferredReport)
    assert all(row() is None for row in rows)
    assert wrapped.report is wrapped.report
