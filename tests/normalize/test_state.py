"""What normalisers remember: saved and restored to the bit, kept by task, advanced once a step."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch

import gradsurg
from gradsurg.normalize import DWA, FAMO, InitialLoss, LogVariances, Norm, PriorLoss, RandomWeights
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import SURGERIES
from gradsurg.surgery.pipeline import Pipeline
from tests.matrices import FAMILIES, draw
from tests.networks import TASKS, build, equal_weights, same, twins
from tests.normalize.normalizers import ALL, ONES, STATEFUL, is_plain, some_tasks, state_of, train, wrapped

RUNS = [(name, "model", some_tasks) for name in ALL]
RUNS += [(name, "tensor", lambda batch: TASKS) for name in STATEFUL]


@pytest.mark.parametrize(("name", "granularity", "tasks"), RUNS)
def test_a_resumed_run_is_an_uninterrupted_one(name, tasks, granularity):
    straight, resumed = twins()
    train(straight, wrapped(straight, ALL[name], granularity=granularity), range(8), tasks)

    first = wrapped(resumed, ALL[name], granularity=granularity)
    train(resumed, first, range(5), tasks)
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = build(seed=1)
    other.load_state_dict(saved["model"])
    second = wrapped(other, ALL[name], granularity=granularity)
    second.load_state_dict(saved["optimizer"])
    assert same(state_of(second), state_of(first))
    train(other, second, range(5, 8), tasks)
    assert equal_weights(straight, other)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_is_saved_is_plain_and_matters(name):
    """Without the saved state the resumed run would differ: the test above could not pass by chance."""
    model = build()
    optimizer = wrapped(model, STATEFUL[name])
    train(model, optimizer, range(4))
    state = state_of(optimizer)
    assert state
    assert is_plain(state)
    assert json.loads(json.dumps(state)) == state
    forgetful = copy.deepcopy(model)
    amnesiac = wrapped(forgetful, STATEFUL[name])
    amnesiac.load_state_dict(optimizer.state_dict())
    amnesiac.param_groups[0]["gradsurg"]["state"] = {}
    train(forgetful, amnesiac, range(7, 9))
    train(model, optimizer, range(7, 9))
    assert not equal_weights(model, forgetful)


@pytest.mark.parametrize("name", [name for name in ALL if name not in STATEFUL])
def test_the_others_remember_nothing(name):
    model = build()
    optimizer = wrapped(model, ALL[name])
    train(model, optimizer, range(3))
    assert state_of(optimizer) == {}


def memory_of(state, task):
    return state.get("logits", state).get(task)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_task_that_is_away_keeps_its_memory(name):
    model = build()
    optimizer = wrapped(model, STATEFUL[name])
    train(model, optimizer, range(3))
    before = memory_of(state_of(optimizer), "right")
    assert before is not None
    train(model, optimizer, range(3, 6), lambda batch: ["whole", "left"])
    kept = memory_of(state_of(optimizer), "right")
    assert kept == before, "also of gradnorm, which rescales to Σ w = m among the tasks present"
    assert memory_of(state_of(optimizer), "left") != before
    train(model, optimizer, range(6, 8))
    report = optimizer.report
    assert bool(torch.isfinite(report.scales).all())
    assert bool((report.scales > 0).all())


def test_each_task_counts_its_own_steps():
    """With the others always there, a task that is there every other step has half their history."""
    losses = {"a": [4.0, 2.0, 2.0, 1.0], "b": [1.0, 9.0, 3.0, 9.0]}
    present = [("a", "b"), ("a",), ("a", "b"), ("a",)]
    for normalizer in (InitialLoss(steps=2), DWA()):
        state = {}
        for t, tasks in enumerate(present):
            values = torch.tensor([losses[name][t] for name in tasks], dtype=torch.float64)
            m = len(tasks)
            problem = Problem(torch.eye(m).double(), ONES[:m], tasks, values)
            _, state = normalizer.scales(problem, state)
        if isinstance(normalizer, DWA):
            assert state["b"]["means"] == [1.0, 3.0]
            assert state["a"]["means"] == [2.0, 1.0]
        else:
            assert state == {"a": {"sum": 6.0, "count": 2}, "b": {"sum": 4.0, "count": 2}}


def test_initial_losses_are_no_longer_read_once_measured():
    problem = Problem(torch.eye(3).double(), ONES, TASKS, ONES * 2)
    _, state = InitialLoss().scales(problem, {})
    unread = Problem(torch.eye(3).double(), ONES, TASKS, None)
    scales, _ = InitialLoss().scales(unread, state)
    assert scales.tolist() == [1.0] * 3


def test_famo_does_not_judge_a_task_by_a_loss_from_before_it_went_away():
    famo = FAMO()

    def step(state, tasks, losses):
        m = len(tasks)
        losses = torch.tensor(losses, dtype=torch.float64)
        return famo.scales(Problem(torch.eye(m).double(), ONES[:m], tuple(tasks), losses), state)[1]

    state = step(step({}, "abc", [1.0, 2.0, 3.0]), "ab", [2.0, 1.0])
    returned = step(state, "abc", [2.0, 1.5, 1e6])
    assert returned["logits"]["c"] == state["logits"]["c"]
    assert returned["logits"]["a"] != state["logits"]["a"]


def test_a_smoothed_norm_leaves_steps_with_zero_gradient_out():
    norm = Norm(smoothing=0.5)

    def step(state, norms):
        G = torch.diag(torch.tensor(norms, dtype=torch.float64).square())
        return norm.scales(Problem(G, ONES[:2], ("a", "b")), state)

    _, state = step({}, [3.0, 1.0])
    scales, asleep = step(state, [0.0, 1.0])
    assert asleep["a"] == state["a"]
    assert scales[0] == 0
    scales, _ = step(asleep, [3.0, 1.0])
    assert float(scales[1] / scales[0]) == pytest.approx(3.0, rel=1e-14)


def test_a_smoothed_norm_is_right_from_a_tasks_first_step():
    """Bias correction: a task that joins late is not taken for a quiet one."""
    norm, state = Norm(smoothing=0.9), {}
    for _ in range(5):
        _, state = norm.scales(Problem(torch.eye(2).double() * 4, ONES[:2], ("a", "b")), state)
    scales, _ = norm.scales(Problem(torch.eye(3).double() * 4, ONES, ("a", "b", "c")), state)
    assert scales.tolist() == pytest.approx([1.0] * 3, rel=1e-14)


def test_blocks():
    """Scales have shape (blocks, m): norms apart in each block, losses and learned weights alike in all."""
    J = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = J @ J.mT
    losses = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for name, normalizer in ALL.items():
        state = {}
        for _ in range(3):
            scales, state = normalizer.scales(Problem(G, ONES, TASKS, losses), state)
            assert scales.shape == (4, 3), name
            if name == "norm":
                for block in range(4):
                    alone, _ = Norm().scales(Problem(G[block], ONES, TASKS), {})
                    assert (scales[block] - alone).abs().max() < 1e-12  # the norms stay, so does their average
            else:
                assert torch.equal(scales, scales[:1].expand(4, 3)), name
        if name == "gradnorm":
            whole = G.sum(0, keepdim=True)
            alone = {}
            for _ in range(3):
                _, alone = normalizer.scales(Problem(whole, ONES, TASKS, losses), alone)
            for task in TASKS:
                assert alone[task]["value"] == pytest.approx(state[task]["value"], rel=1e-12)


def test_a_changed_number_of_blocks_starts_the_average_afresh():
    norm = Norm(smoothing=0.9)
    three = torch.eye(3).double() * torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)[:, None, None]
    _, state = norm.scales(Problem(three, ONES, TASKS), {})
    _, fresh = norm.scales(Problem(three[:2], ONES, TASKS), {})
    _, changed = norm.scales(Problem(three[:2], ONES, TASKS), state)
    assert changed == fresh
    assert len(state["left"]["average"]) == 3


@pytest.mark.parametrize("name", ALL)
def test_options_are_copied_with_the_optimizer(name):
    normalizer = ALL[name]
    assert pickle.loads(pickle.dumps(normalizer)) == normalizer == copy.deepcopy(normalizer)
    values = {"left": 1.0}
    prior = PriorLoss(values)
    values["left"] = -1.0
    assert prior.values == {"left": 1.0}


@pytest.mark.parametrize("surgery", ["sum", "cone", "upgrad", "pcgrad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_guarantee_holds_on_top_of_every_normaliser(family, surgery):
    """Also for tasks that a normaliser silences: a scale of nothing must not take the protection away."""
    J = draw(family, 3, 10, 1)
    losses = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)
    for name, normalizer in ALL.items():
        pipeline = Pipeline(normalizer, SURGERIES[surgery](), guarantee="gradient")
        weights = pipeline.direction(Problem(J @ J.T, ONES, TASKS, losses), {}).weights
        u = weights @ J
        norms = J.norm(dim=1)
        if float(u.norm()) > 1e-9 * float((weights.abs() * norms).sum()):
            cosines = J @ u / (norms * u.norm())
            assert cosines[norms > 0].min() >= -1e-6, name


def test_log_variances_are_trained_by_the_same_optimizer():
    """Kendall's form proper: model and log-variances under one Adam, equal to plain training of the summed loss."""
    model, twin = twins()
    variances = LogVariances(TASKS, classification=["left"])
    parameters = [*model.parameters(), *variances.parameters()]
    optimizer = gradsurg.wrap(torch.optim.Adam(parameters, lr=0.02), normalize="none", surgery="sum", guarantee="none")
    logs = {task: torch.zeros((), requires_grad=True) for task in TASKS}
    plain = torch.optim.Adam([*twin.parameters(), *logs.values()], lr=0.02)
    for batch in range(20):
        optimizer.zero_grad()
        optimizer.total(variances(model.losses(batch))).backward()
        optimizer.step()
        plain.zero_grad()
        factor = {"left": 1.0, "right": 0.5, "whole": 0.5}
        sum(factor[t] * torch.exp(-logs[t]) * loss + logs[t] / 2 for t, loss in twin.losses(batch).items()).backward()
        plain.step()
    for value, task in zip(variances.values, TASKS, strict=True):
        assert value.item() == pytest.approx(logs[task].item(), abs=1e-5)
        assert abs(value.item()) > 0.01, "it must have learned something"
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-4


def test_log_variances_know_their_tasks():
    with pytest.raises(ValueError, match="names the task 'b', but the tasks are"):
        LogVariances(["a"])({"b": torch.ones(())})
    assert len(list(LogVariances(["left.eye", "right eye"]).parameters())) == 2


@pytest.mark.parametrize("normalizer", [RandomWeights(), STATEFUL["famo"], STATEFUL["norm"]])
def test_accumulated_micro_batches_advance_the_state_once(normalizer):
    model = build()
    optimizer = wrapped(model, normalizer)
    for batch in range(3):
        optimizer.total(model.losses(batch)).backward()
    scales = optimizer.report.scales
    optimizer.step()
    state = state_of(optimizer)
    if isinstance(normalizer, FAMO):
        assert [memory["steps"] for memory in state["logits"].values()] == [0, 0, 0]
    elif isinstance(normalizer, Norm):
        assert state["left"]["weight"] == [pytest.approx(0.2)]
    else:
        draws = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        published = torch.softmax(draws, 0)
        assert (scales[0] / scales[0].sum() - published).abs().max() < 1e-12
