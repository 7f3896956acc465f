"""Optimizers that people use now: each step compared with a solution of its own, then saved, resumed and repeated."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch

import gradsurg
from tests.behaviour.failures import Mine
from tests.nearest import default_direction, gradients_of, nearest_without_conflict, vector

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they use what torch deprecates while they are imported
    import pytorch_optimizer
    import schedulefree
    import torchao.optim

# Tasks read nearly the same output and want it elsewhere, so that they are in conflict from the first step on.
MIXED = torch.ones(3, 3) + 0.3 * torch.eye(3)
APART = torch.tensor([2.0, -2.0, 0.5])


class Net(torch.nn.Module):
    """No heads: every task reaches every parameter."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))

    def losses(self, batch):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(16, self.body[0].in_features, generator=generator)
        targets = torch.randn(16, 3, generator=generator)
        errors = self.body(x) @ MIXED - targets - APART
        return dict(zip(("left", "right", "whole"), errors.square().mean(0), strict=True))


def all_of(cls, **options):
    return lambda model: cls(model.parameters(), **options)


def by_shape(cls, matrices, rest=None, **options):
    """Give matrices to one parameter group and vectors to another."""

    def make(model):
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == 2], **matrices},
            {"params": [p for p in model.parameters() if p.ndim < 2], **(rest or {})},
        ]
        return cls(groups if rest is not None else groups[:1], **options)

    return make


# One row per optimizer: how it is made for a model.
ROWS = {
    "Muon": by_shape(getattr(torch.optim, "Muon", None), {}, lr=0.02),  # it takes matrices only
    "Muon with AdamW": by_shape(pytorch_optimizer.Muon, {"use_muon": True}, {"use_muon": False}, lr=0.02),
    "SOAP": all_of(pytorch_optimizer.SOAP, lr=0.01, precondition_frequency=3),
    "Lion": all_of(pytorch_optimizer.Lion, lr=0.003),
    "Prodigy": all_of(pytorch_optimizer.Prodigy, lr=1.0, d0=1e-3),
    "D-Adaptation": all_of(pytorch_optimizer.DAdaptAdam, lr=1.0, d0=1e-3),
    "Schedule-Free SGD": all_of(schedulefree.SGDScheduleFree, lr=0.02),
    "Schedule-Free AdamW": all_of(schedulefree.AdamWScheduleFree, lr=0.03, foreach=False),
    "Schedule-Free AdamW foreach": all_of(schedulefree.AdamWScheduleFree, lr=0.03, foreach=True),
    "Schedule-Free RAdam": all_of(schedulefree.RAdamScheduleFree, lr=0.01),
    "pytorch_optimizer's Schedule-Free": all_of(pytorch_optimizer.ScheduleFreeAdamW, lr=0.03),
    "AdamW8bit": all_of(torchao.optim.AdamW8bit, lr=0.01),
    "GaLore": by_shape(
        pytorch_optimizer.GaLore, {"rank": 3, "update_proj_gap": 4, "scale": 1.0, "projection_type": "std"}, {}, lr=0.01
    ),
    "Adan": all_of(pytorch_optimizer.Adan, lr=0.01),
}
SCHEDULE_FREE = [name for name in ROWS if "Schedule-Free" in name]


@pytest.fixture(autouse=True)
def without_compilation():
    """torchao compiles its step for each shape, which takes longer than all these tests together."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(name, model=None):
    # torchao keeps its state in 8 bits from 4096 numbers on.
    model = Net(64 if "bit" in name else 12) if model is None else copy.deepcopy(model)
    optimizer = ROWS[name](model)
    if name in SCHEDULE_FREE:
        optimizer.train()
    return model, optimizer


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def bits(optimizer):
    return [p.detach().clone() for p in parameters_of(optimizer)]


def same(one, other):
    return all(map(torch.equal, bits(one), bits(other)))


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        losses = model.losses(batch)
        wrapped = isinstance(optimizer, gradsurg.MultiTaskOptimizer)
        (optimizer.total(losses) if wrapped else losses["left"]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ROWS)
def test_each_step_is_the_independent_solution_and_hurts_no_task(name):
    model, optimizer = build(name)
    optimizer = gradsurg.wrap(optimizer)
    would_hurt = 0
    for batch in range(12):
        parameters, losses = parameters_of(optimizer), model.losses(batch)
        J = gradients_of(losses.values(), parameters)
        # The bare optimizer at the same place, to step with the same p.grad.
        _, bare = build(name, model)
        bare.load_state_dict(copied(optimizer.state_dict()))
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        wanted = default_direction(J)
        error = np.linalg.norm(vector([p.grad for p in parameters]) - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted)

        for p, q in zip(parameters_of(bare), parameters, strict=True):
            p.grad = q.grad.clone()
        before = vector(parameters)
        optimizer.step()
        bare.step()
        moved, alone = before - vector(parameters), before - vector(parameters_of(bare))
        rates = [np.full(p.numel(), float(g["lr"])) for g in optimizer.param_groups for p in g["params"]]
        wanted = nearest_without_conflict(alone, J, np.concatenate(rates) / max(map(np.max, rates)))
        # Parameters are stored in float32.
        place = 2**-23 * np.linalg.norm(before)
        assert np.linalg.norm(moved - wanted) <= 1e-5 * np.linalg.norm(alone) + place
        assert moved.any() == alone.any()  # some only prepare themselves in their first steps
        norms = np.linalg.norm(J, axis=1)
        assert (J @ moved >= -1e-4 * norms * np.linalg.norm(moved)).all()
        would_hurt += (J @ alone < -1e-3 * norms * np.linalg.norm(alone)).any()
    assert would_hurt > 0


def copied(state_dict):
    """Return what a file gives back. A plain deepcopy fails for the states of torchao."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ROWS)
def test_one_task_is_the_plain_optimizer_to_the_bit(name):
    model, optimizer = build(name)
    other, plain = build(name)
    optimizer = gradsurg.wrap(optimizer)
    for batch in range(4):
        optimizer.zero_grad()
        optimizer.total({"left": model.losses(batch)["left"]}).backward()
        optimizer.step()
        train(other, plain, [batch])
        assert same(optimizer, plain)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("options", [{}, {"normalize": "dwa", "rotate": 1}], ids=["default", "with memory"])
def test_a_resumed_run_is_the_same_to_the_bit(name, options):
    model, optimizer = build(name)
    optimizer = gradsurg.wrap(optimizer, **options)
    train(model, optimizer, range(5))
    averaging = name in SCHEDULE_FREE
    if averaging:  # their authors ask to save in evaluation mode
        optimizer.eval()
    saved = copied((model.state_dict(), optimizer.state_dict()))
    other, resumed = build(name)
    resumed = gradsurg.wrap(resumed, **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each in (optimizer, resumed) if averaging else ():
        each.train()
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert same(optimizer, resumed)
    assert resumed.report.step == 9


@pytest.mark.parametrize("name", ROWS)
def test_an_atomic_step_that_fails_can_be_tried_again(name):
    model, optimizer = build(name)
    cls = type(optimizer)

    def step(self, closure=None):
        cls.step(self, closure)
        if failing:
            raise Mine

    optimizer.__class__ = type(f"Failing{cls.__name__}", (cls,), {"step": step})
    optimizer = gradsurg.wrap(optimizer, atomic=True)
    other, undisturbed = build(name)
    undisturbed = gradsurg.wrap(undisturbed)
    for batch in range(6):
        failing = batch in (0, 3)
        if failing:
            before = bits(optimizer)
            with pytest.raises(Mine):
                train(model, optimizer, [batch])
            assert all(map(torch.equal, before, bits(optimizer)))
            failing = False
            optimizer.step()
        else:
            train(model, optimizer, [batch])
        train(other, undisturbed, [batch])
        assert same(optimizer, undisturbed)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_evaluation_mode_shows_the_average_and_comes_back(name):
    model, optimizer = build(name)
    _, plain = build(name, model)
    optimizer = gradsurg.wrap(optimizer)
    train(model, optimizer, range(5))
    plain.load_state_dict(copied(optimizer.state_dict()))
    for p, q in zip(parameters_of(plain), parameters_of(optimizer), strict=True):
        p.data.copy_(q.data)
    for turn in ("eval", "train", "eval"):
        getattr(optimizer, turn)()
        getattr(plain, turn)()
        assert same(optimizer, plain)


@pytest.mark.parametrize("name", [name for name in SCHEDULE_FREE if "pytorch" not in name])
def test_a_step_in_evaluation_mode_is_refused_by_its_own_error(name):
    model, optimizer = build(name)
    optimizer = gradsurg.wrap(optimizer)
    train(model, optimizer, range(2))
    optimizer.eval()
    before = bits(optimizer)
    with pytest.raises(Exception, match="train mode"):
        train(model, optimizer, [2])
    assert all(map(torch.equal, before, bits(optimizer)))
    optimizer.train()
    train(model, optimizer, [2])
    assert optimizer.report.step == 2
