"""What surgeries remember: saved and restored to the bit, kept by task name, one memory a block and a level."""

import io

import pytest
import torch

import gradsurg
from gradsurg.surgery import SURGERIES, GradVac
from gradsurg.surgery.base import ElementwiseSurgery

TASKS = ("left", "right", "pixels", "depth")
REMEMBER = {"gradvac": GradVac(beta=0.3)}  # a beta at which five steps show
REMEMBER |= {name: SURGERIES[name]() for name in ("sdmgrad", "modo", "cr_mogm", "excess_mtl", "pcd")}
ALL = {name: REMEMBER.get(name, kind()) for name, kind in SURGERIES.items()}
WEIGHING = [name for name, kind in SURGERIES.items() if not issubclass(kind, ElementwiseSurgery)]


def rows(step, tasks=TASKS):
    """Return gradients of two parameters that differ from step to step and conflict."""
    drawn = torch.randn(len(TASKS), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    J = dict(zip(TASKS, drawn - 0.8 * drawn.mean(0), strict=True))
    return {name: [J[name][:5].clone(), J[name][5:].clone()] for name in tasks}


def parameters():
    return [torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (5, 4)]


def wrapped(surgery, params, **options):
    return gradsurg.wrap(torch.optim.Adam(params, lr=0.1), surgery=surgery, seed=3, **options)


def train(optimizer, steps, tasks=lambda step: TASKS):
    for step in steps:
        optimizer.zero_grad()
        optimizer.set_gradients(rows(step, tasks(step)))
        optimizer.step()


def state_of(optimizer):
    return optimizer.param_groups[0]["gradsurg"]["state"].get("surgery", {})


def some_tasks(step):
    """All, or all but one: tasks come and go."""
    return [name for i, name in enumerate(TASKS) if i != step % 6]


def resumed(name, params, present, **options):
    """Return parameters of a run that is saved after five steps and goes on for three in fresh objects."""
    first = wrapped(ALL[name], params, **options)
    train(first, range(5), present)
    file = io.BytesIO()
    torch.save({"parameters": [p.detach() for p in params], "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [torch.nn.Parameter(p) for p in saved["parameters"]]
    second = wrapped(ALL[name], others, **options)
    second.load_state_dict(saved["optimizer"])
    train(second, range(5, 8), present)
    return others


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "tensor"}, {"primary": [["left", "depth"], ["right", "pixels"]]}]
)
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_an_uninterrupted_one(name, options):
    if "primary" in options:
        if name not in WEIGHING:
            return  # refused: see test_elementwise.py
        options = options | {"tasks": TASKS}  # a primary may be away at first
    present = (lambda step: TASKS) if "granularity" in options else some_tasks
    straight = parameters()
    train(wrapped(ALL[name], straight, **options), range(8), present)
    others = resumed(name, parameters(), present, **options)
    assert all(map(torch.equal, straight, others))


@pytest.mark.parametrize("name", REMEMBER)
def test_what_is_saved_matters(name):
    params = parameters()
    optimizer = wrapped(REMEMBER[name], params)
    train(optimizer, range(4))
    assert state_of(optimizer)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    amnesiac = wrapped(REMEMBER[name], others)
    amnesiac.load_state_dict(optimizer.state_dict())
    amnesiac.param_groups[0]["gradsurg"]["state"] = {}
    train(amnesiac, range(4, 6))
    train(optimizer, range(4, 6))
    assert not all(map(torch.equal, params, others))


@pytest.mark.parametrize("name", [name for name in ALL if name not in REMEMBER])
def test_the_others_remember_nothing(name):
    optimizer = wrapped(ALL[name], parameters())
    train(optimizer, range(3))
    assert state_of(optimizer) == {}


@pytest.mark.parametrize("name", REMEMBER)
def test_memory_is_kept_by_name_whatever_the_order_of_the_tasks(name):
    if name == "gradvac":
        return  # whom a gradient meets first is drawn by place, so another order is another draw
    params, others = parameters(), parameters()
    train(wrapped(REMEMBER[name], params), range(5))
    turned = [TASKS[step % 4 :] + TASKS[: step % 4] for step in range(5)]
    train(wrapped(REMEMBER[name], others), range(5), lambda step: turned[step])
    for p, q in zip(params, others, strict=True):
        if name == "pcd":
            assert torch.isfinite(q).all()  # its first task is the primary: order matters by definition
        else:
            assert (p - q).abs().max() <= 1e-9


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("auxiliary", ["protect", "help"])
def test_levels_hold_whatever_the_surgery_inside(name, auxiliary):
    """Protect: nobody below is hurt. Help: a lower level takes nothing from a higher one."""
    levels = [[0, 1], [2, 3], [4, 5]]
    for seed in range(4):
        J = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        J -= 0.7 * J.mean(0)
        lengths = J.norm(dim=1)
        u = gradsurg.combine(J, name, primary=levels, auxiliary=auxiliary)
        assert torch.isfinite(u).all()
        if auxiliary == "protect":
            assert (J[2:] @ u / lengths[2:]).min() >= -1e-9 * lengths.sum()
        else:
            first = gradsurg.combine(J[:2], name)
            assert (J[:2] @ (u - first) / lengths[:2]).min() >= -1e-9 * lengths.sum()
            two = gradsurg.combine(J[:4], name, primary=levels[:2], auxiliary="help")
            assert (J[:4] @ (u - two) / lengths[:4]).min() >= -1e-9 * lengths.sum()


@pytest.mark.parametrize("name", WEIGHING)
def test_blocks_are_solved_in_one_call_and_as_if_alone(name, monkeypatch):
    calls = []
    kind = SURGERIES[name]
    plain = kind.weights

    def counted(self, problem, state):
        calls.append(problem.gramian.shape)
        return plain(self, problem, state)

    monkeypatch.setattr(kind, "weights", counted)
    params = parameters()
    optimizer = wrapped(kind(), params, granularity="tensor", normalize="none", guarantee="none")
    optimizer.set_gradients(rows(0))
    assert calls == [(2, 4, 4)]
    for k, p in enumerate(params):
        alone = [torch.nn.Parameter(torch.ones_like(p))]
        one = gradsurg.wrap(torch.optim.SGD(alone, lr=1.0), surgery=kind(), seed=3, normalize="none", guarantee="none")
        one.set_gradients({task: [row[k]] for task, row in rows(0).items()})
        assert (p.grad - alone[0].grad).abs().max() <= 1e-12
