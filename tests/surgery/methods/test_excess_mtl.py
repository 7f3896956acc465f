"""ExcessMTL with one curvature a parameter, in wrap(): against the paper's equations and the peer, over many steps."""

import copy
import io

import pytest
import torch
from torchjd.aggregation import ExcessMTLWeighting

import gradsurg
from gradsurg.distributed.layout import Layout
from gradsurg.surgery import ExcessMTL
from gradsurg.surgery.methods.excess_mtl import excess_of

TASKS = ("left", "middle", "right", "pixels")
PARTS = [4, 3]
PAPER = ExcessMTL(0.5, curvature="parameter")


def steps(m=4, count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1e-3, 1e-1, 1.0, 10.0, 1.0, 1e2, 1e-2])  # which one number a task cannot see
    return [torch.randn(m, 7, generator=generator, dtype=torch.float64) * spread for _ in range(count)]


def wrapped(surgery=PAPER, dtype=torch.float64, **options):
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in PARTS]
    options = {"normalize": "none", "guarantee": "none", **options}
    return gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1), surgery=surgery, **options)


def train(optimizer, matrices, tasks=TASKS):
    """Hand over the rows of every step; return the weights."""
    found = []
    for J in matrices:
        dtype = optimizer.param_groups[0]["params"][0].dtype
        rows = {name: list(row.to(dtype).split(PARTS)) for name, row in zip(tasks, J, strict=True)}
        optimizer.set_gradients(rows)
        found.append(optimizer.report.weights)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found)


def by_the_paper(matrices, step_size, warmup=1):
    """Equations 6, 7 and 9, and algorithm 1."""
    squares, baselines, logs, found = torch.zeros_like(matrices[0]), [], torch.zeros(len(matrices[0])).double(), []
    for J in matrices:
        squares = squares + J**2
        excess = (J**2 / squares.sqrt()).sum(1)
        if len(baselines) < warmup:
            baselines.append(excess)
        else:
            logs = logs + step_size * excess / torch.stack(baselines).mean(0)
        found.append(logs.softmax(0))
    return torch.stack(found)


@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_papers(seed, warmup):
    matrices = steps(seed=seed)
    found = train(wrapped(ExcessMTL(0.5, warmup, "parameter")), matrices)[:, 0]
    assert torch.allclose(found, by_the_paper(matrices, 0.5, warmup), atol=1e-12)
    peer = ExcessMTLWeighting(robust_step_size=0.5, n_warmup_steps=warmup)
    assert torch.allclose(found, torch.stack([peer(J) for J in matrices]), atol=1e-3)  # it adds 1e-7 to H
    one_number = train(wrapped(ExcessMTL(0.5, warmup)), matrices)[:, 0]
    assert not torch.allclose(found, one_number, atol=1e-2)


def test_each_block_has_its_own():
    matrices = steps()
    found = train(wrapped(granularity="tensor"), matrices)
    for k, part in enumerate([slice(0, 4), slice(4, 7)]):
        assert torch.allclose(found[:, k], by_the_paper([J[:, part] for J in matrices], 0.5), atol=1e-12)


def test_rows_are_measured_after_normalisation():
    matrices = steps()
    found = train(wrapped(normalize="norm"), matrices)[:, 0]
    lengths = [J.norm(dim=1, keepdim=True) for J in matrices]
    equal = [J * n.mean() / n for J, n in zip(matrices, lengths, strict=True)]
    want = by_the_paper(equal, 0.5) * torch.stack([(n.mean() / n)[:, 0] for n in lengths])
    assert torch.allclose(found, want, atol=1e-9)


def test_levels_have_their_own_tasks():
    matrices = steps()
    found = train(wrapped(primary=["left", "middle"], auxiliary="help"), matrices)[:, 0]
    first = by_the_paper([J[:2] for J in matrices], 0.5)
    untouched = (found[:, :2].sum(1) - 1).abs() < 1e-12  # in the other steps the right ones would have hurt them
    assert 3 <= untouched.sum() < len(matrices)
    assert torch.allclose(found[untouched, :2], first[untouched], atol=1e-9)


@pytest.mark.parametrize("way", ["deepcopy", "saved"])
def test_a_resumed_run_is_equal_to_the_bit(way):
    matrices = steps()
    whole = train(wrapped(dtype=torch.float32), matrices)
    optimizer = wrapped(dtype=torch.float32)
    train(optimizer, matrices[:4])
    state = optimizer.state_dict()
    if way == "saved":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    kept = copy.deepcopy(state)
    train(optimizer, matrices[4:])  # whoever holds a state dict keeps its numbers
    resumed = wrapped(dtype=torch.float32)
    resumed.load_state_dict(state)
    assert torch.equal(train(resumed, matrices[4:]), whole[4:])
    entry, want = (each["param_groups"][0]["gradsurg"]["state"]["curvature"] for each in (state, kept))
    assert all(torch.equal(entry[name][k], want[name][k]) for name in TASKS for k in range(2))


def test_tasks_that_come_and_go_keep_theirs():
    matrices = steps(3, 6)
    optimizer = wrapped()
    train(optimizer, matrices[:2], TASKS[:3])
    train(optimizer, [J[:2] for J in matrices[2:4]], TASKS[:2])
    state = optimizer.state_dict()["param_groups"][0]["gradsurg"]["state"]["curvature"]
    want = torch.stack(matrices[:2])[:, 2].square().sum(0).sqrt()
    assert torch.allclose(torch.cat([state["right"][0], state["right"][1]]), want, atol=1e-14)


def test_small_and_missing_gradients():
    tiny = torch.full((3,), 1e-30)  # whose square float32 has no number for
    found, state = excess_of([[tiny, None], [None, torch.zeros(2)]], [1.0, 2.0], ("a", "b"), (0, 1), {})
    assert found == pytest.approx([3e-30, 0.0], rel=1e-6)
    again, _ = excess_of([[tiny, None], [None, torch.ones(2)]], [1.0, 2.0], ("a", "b"), (0, 1), state)
    assert again == pytest.approx([3e-30 / 2**0.5, 4.0], rel=1e-6)
    assert state["b"][1].tolist() == [0.0, 0.0]
    complex_, sparse = torch.tensor([3 + 4j]), torch.tensor([0.0, 2.0]).to_sparse()
    assert excess_of([[complex_, sparse]], [1.0], ("a",), (0, 1), {})[0] == pytest.approx([9.0])
    half, _ = excess_of([[torch.tensor([300.0], dtype=torch.float16)]], [10.0], ("a",), (0,), {})
    assert half == [3000.0]


def test_what_cannot_have_it_says_so(monkeypatch):
    with pytest.raises(ValueError, match="curvature='both' is not known"):
        ExcessMTL(curvature="both")
    trunk = torch.nn.Linear(3, 2)
    optimizer = gradsurg.wrap(torch.optim.SGD(trunk.parameters(), lr=0.1), surgery=PAPER)
    h = trunk(torch.ones(4, 3))
    with pytest.raises(ValueError, match="curvature='task'"):
        optimizer.total([h.sum(), h.square().sum()], features=h)
    optimizer.total([h.sum(), h.square().sum()]).backward()
    optimizer.step()
    session = optimizer._gradsurg.session
    monkeypatch.setattr(session, "lay_out", lambda _: None)
    monkeypatch.setattr(session, "layout", Layout())  # as over several ranks
    with pytest.raises(gradsurg.MultiTaskError, match="curvature='task'"):
        optimizer.total([h.sum(), h.square().sum()])


def test_alone_a_matrix_is_a_first_step():
    J = steps()[0]
    assert torch.equal(gradsurg.combine(J, PAPER), gradsurg.combine(J, "excess_mtl"))
    assert torch.equal(gradsurg.combine(J, PAPER), J.mean(0))
