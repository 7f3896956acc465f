"""Whole steps of a wrapped optimizer by the kernels against the torch path, and that nothing in them waits."""

from contextlib import nullcontext

import pytest
import torch

import gradsurg
from gradsurg import gramian as host
from gradsurg.guarantee import guard as guard_on_the_host
from gradsurg.onboard.guarantee import guard
from gradsurg.rows import TaskRows
from tests.kernels.interpreted import harness  # noqa: F401 (has the interpreter round bfloat16 as hardware does)
from tests.waiting import WaitError, no_waiting

ADAM, SGD = torch.optim.Adam, torch.optim.SGD


class Model(torch.nn.Module):
    """A trunk with parameters of two dtypes, in two orders of elements, and a scalar; three heads."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def parameter(*shape, dtype=torch.float32):
            return torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype))

        self.first = torch.nn.Parameter(torch.randn(6, 5, generator=draw).T)
        self.second = parameter(6, 4, dtype=torch.bfloat16)
        self.shift = parameter()
        self.heads = torch.nn.ParameterList([parameter(4) for _ in range(3)])
        self.x, self.y = torch.randn(8, 5, generator=draw), torch.randn(3, 8, generator=draw)

    def losses(self):
        h = torch.tanh(self.x @ self.first + self.shift)
        h = (h.bfloat16() @ self.second).float()
        return {name: (h @ self.heads[i] - self.y[i]).square().mean() for i, name in enumerate("abc")}


def trained(backend, optimizer, steps, watched=False, **options):
    """Return what p.grad was after the first surgery, the parameters and the report after its step, and the optimizer.

    Further steps only show that they run: where a parameter of 16 bits was rounded the other way, they part.
    """
    model = Model()
    kind, settings = optimizer
    groups = [{"params": [model.first, model.shift]}, {"params": [model.second, *model.heads], "lr": 0.02}]
    wrapped = gradsurg.wrap(kind(groups, lr=0.05, **settings), backend=backend, **options)
    first: list = []
    for step in range(steps):
        wrapped.zero_grad()
        losses = model.losses()
        with no_waiting() if watched and step == steps - 1 else nullcontext():
            wrapped.total(losses).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            wrapped.step()
        first = first or [gradients, [p.detach().clone() for p in model.parameters()], wrapped.report]
    return *first, wrapped


def close(mine, theirs, tolerance):
    eps = torch.finfo(theirs.dtype).eps if theirs.dtype == torch.bfloat16 else tolerance
    return bool(((mine - theirs).abs() <= eps * theirs.abs().max()).all())


WITHOUT_WAITING = [
    ({"surgery": "cone"}, (ADAM, {})),
    ({"surgery": "upgrad", "normalize": "none", "granularity": "group"}, (SGD, {"momentum": 0.9})),
    ({"surgery": "mgda", "guarantee": "gradient", "preferences": {"b": 2.0}}, (torch.optim.RMSprop, {})),
    ({"surgery": "sum", "granularity": "tensor"}, (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True})),
    ({"surgery": "mean", "primary": "b", "auxiliary": "help", "row_dtype": torch.bfloat16}, (SGD, {})),
    ({"surgery": "cone", "primary": [["a"], ["b"]], "guarantee": "none"}, (SGD, {"nesterov": True, "momentum": 0.5})),
]


@pytest.mark.parametrize(("options", "optimizer"), WITHOUT_WAITING)
def test_the_same_step_as_with_torch_and_nothing_waits(options, optimizer):
    gradients, mine, report, _ = trained("triton", optimizer, 2, watched=True, **options)
    wanted_gradients, theirs, wanted, _ = trained("torch", optimizer, 1, **options)
    # Sums of bfloat16 rows are off by 4e-7, which surgery multiplies by as much as tasks cancel.
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


def test_a_method_that_waits_is_called_so_and_does():
    assert {method.name for method in gradsurg.methods() if not method.waits} == {
        *("sum", "mean", "cone", "upgrad", "mgda"),
        *("none", "norm"),
    }
    with pytest.raises(WaitError, match="onboard"):
        trained("triton", (SGD, {}), 1, watched=True, surgery="pcgrad")
    _, mine, report, _ = trained("triton", (SGD, {}), 1, surgery="pcgrad")
    _, theirs, _, _ = trained("torch", (SGD, {}), 1, surgery="pcgrad")
    assert report.path == "triton"
    assert all(close(p, q, 2e-5) for p, q in zip(mine, theirs, strict=True))


def test_the_torch_path_would_wait():
    with pytest.raises(WaitError):
        trained("torch", (SGD, {}), 1, watched=True)


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
    G = torch.stack([host.gramian([[row[k]] for row in rows], exact=True) for k in range(count)])
    finite, ones = torch.tensor(True), [1.0] * count
    movement = guard(rows, G, before, mine, ones, list(range(count)), None, finite, 1e-13)
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
    guard(rows, G, before, untouched, ones, list(range(count)), None, torch.tensor(False), 1e-13)
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


def test_rows_are_let_go_while_a_report_is_unread():
    model = Model()
    wrapped = gradsurg.wrap(SGD(model.parameters(), lr=0.1), backend="triton")
    wrapped.total(model.losses()).backward()
    wrapped.step()
    later = wrapped._gradsurg.latest
    held = [cell.cell_contents for cell in later.make.__closure__]
    patients = [value for value in held if hasattr(value, "rows")]
    assert len(patients) == 1
    assert isinstance(patients[0].rows, TaskRows)
    assert not len(patients[0].rows)
    assert not patients[0].parameters
    assert wrapped.report is wrapped.report
