"""Whatever a training loop does, in whatever order: with surgery="sum", p.grad is what plain torch would have.

The oracle is torch itself on a twin, which runs loss.backward() wherever this library is given losses. It knows nothing
of rows, foreign gradients or waiting, so whatever they lose or count twice shows.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradsurg
from tests.networks import TASKS, Heads, reference_rows

# float64: the sums are the same up to their order, so a few units of 1e-16 of the largest terms.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}

NAMES = st.sets(st.sampled_from(TASKS), min_size=1).map(sorted)
ACTIONS = st.one_of(
    st.tuples(st.just("total"), NAMES),
    st.tuples(st.just("scaled"), NAMES),
    st.tuples(st.just("backward"), NAMES),
    st.tuples(st.just("task"), NAMES),
    st.tuples(st.just("set_gradients"), NAMES),
    st.tuples(st.just("with penalty"), NAMES),
    st.tuples(st.just("with plain"), NAMES),
    st.tuples(st.just("deferred"), NAMES),
    st.tuples(st.just("fails"), NAMES),
    st.tuples(st.sampled_from(["plain", "plain", "head", "clip", "step", "step", "copy"]), st.none()),
    st.tuples(st.just("zero"), st.sampled_from(["optimizer none", "optimizer zeros", "model none", "model zeros"])),
)


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError


class Pair:
    """Two equal models: one trained with the library, one with torch alone."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = Heads().double()
        self.twin = copy.deepcopy(self.model)
        options = {"surgery": "sum", "normalize": "none", "guarantee": "none", **options}
        self.optimizer = gradsurg.wrap(torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9), **options)
        self.twin_optimizer = torch.optim.SGD(self.twin.parameters(), lr=0.05, momentum=0.9)
        self.batch = 0

    @property
    def waiting(self):
        return self.optimizer._gradsurg.step.pending

    def losses(self, model, names):
        every = model.losses(self.batch, dtype=torch.float64)
        return {name: every[name] for name in names}

    def act(self, action, detail):
        self.batch += 1
        getattr(self, action.replace(" ", "_"))(detail)

    def torch_backward(self, names, scale=1.0, penalty=None):
        loss = sum(self.losses(self.twin, names).values()) * scale
        (loss if penalty is None else loss + penalty(self.twin)).backward()

    def total(self, names):
        self.optimizer.total(self.losses(self.model, names)).backward()
        self.torch_backward(names)

    def scaled(self, names):
        (self.optimizer.total(self.losses(self.model, names)) / 3).backward()
        self.torch_backward(names, 1 / 3)

    def backward(self, names):
        self.optimizer.backward(self.losses(self.model, names))
        self.torch_backward(names)

    def task(self, names):
        for name, loss in self.losses(self.model, names).items():
            with self.optimizer.task(name):
                loss.backward(retain_graph=True)
        self.torch_backward(names)

    def set_gradients(self, names):
        self.optimizer.set_gradients(reference_rows(self.losses(self.model, names), list(self.model.parameters())))
        self.torch_backward(names)

    def with_penalty(self, names):
        if self.waiting:  # rows and p.grad may then be out of step in torch's own order of events
            return
        (penalty_of(self.model) + self.optimizer.total(self.losses(self.model, names))).backward()
        self.torch_backward(names, penalty=penalty_of)

    def with_plain(self, names):
        self.optimizer.total(self.losses(self.model, names), plain=penalty_of(self.model)).backward()
        self.torch_backward(names, penalty=penalty_of)

    def deferred(self, names):
        with self.optimizer.accumulate():
            self.total(names)

    def fails(self, names):
        losses = self.losses(self.model, names)
        losses[names[-1]] = Boom.apply(losses[names[-1]])
        with pytest.raises(ArithmeticError):
            self.optimizer.total(losses).backward()

    def plain(self, _):
        for model in (self.model, self.twin):
            penalty_of(model).backward()

    def head(self, _):
        for model in (self.model, self.twin):
            model.heads["left"].weight.square().sum().backward()

    def clip(self, _):
        if self.waiting:  # refused; see test_capture
            return
        for model in (self.model, self.twin):
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def copy(self, _):
        if self.waiting:  # a copy starts without rows
            return
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        self.twin.zero_grad()  # torch copies parameters without their gradients

    def step(self, _):
        self.optimizer.step()
        self.twin_optimizer.step()

    def zero(self, route):
        owner, kind = route.split()
        for model, optimizer in [(self.model, self.optimizer), (self.twin, self.twin_optimizer)]:
            (model if owner == "model" else optimizer).zero_grad(set_to_none=kind == "none")

    def check(self):
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
            if not self.waiting:
                have = torch.zeros_like(p) if p.grad is None else p.grad
                want = torch.zeros_like(q) if q.grad is None else q.grad
                torch.testing.assert_close(have, want, **TOLERANCE, msg=lambda text, name=name: f"{name}.grad: {text}")
                assert q.grad is not None or p.grad is None, f"{name}.grad should be None"


def penalty_of(model):
    return sum(p.square().sum() for p in model.trunk.parameters())


def run(actions, **options):
    pair = Pair(**options)
    for action, detail in actions:
        pair.act(action, detail)
        pair.check()


@given(st.lists(ACTIONS, max_size=14))
def test_any_order_of_events(actions):
    run(actions)


@given(st.lists(ACTIONS, max_size=10))
def test_any_order_of_events_with_declared_tasks(actions):
    run(actions, tasks=list(TASKS))


@given(st.lists(ACTIONS, max_size=10), st.sampled_from(["skip_task", "raise"]))
def test_any_order_of_events_under_other_policies(actions, nonfinite):
    run(actions, nonfinite=nonfinite)
