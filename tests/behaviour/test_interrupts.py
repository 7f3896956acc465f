"""Ctrl-C may come between any two lines of a step: the next step works all the same."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch

import gradsurg
from tests.networks import build, equal_weights, trained

# Here are the flags and what a step holds; what comes after them are pure functions.
OURS = tuple(os.path.join(os.path.dirname(gradsurg.__file__), room) + os.sep for room in ("optimizer", "gradients"))
# Each way tries every seventh line, another one than the others: most lines are those of all ways.
EVERY = 7


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of ours is about to run that has not run before."""

    def __init__(self, at):
        self.at, self.seen = at, set()

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def total(optimizer, model):
    optimizer.total(model.losses(1)).backward()
    optimizer.step()


def functions(optimizer, model):
    optimizer.backward({name: lambda name=name: model.losses(1)[name] for name in ("left", "right")})
    optimizer.step()


def task(optimizer, model):
    for name in ("left", "right"):
        with optimizer.task(name):
            model.losses(1)[name].backward()
    optimizer.step()


def accumulate(optimizer, model):
    with optimizer.accumulate():
        optimizer.total(model.losses(1)).backward()
    optimizer.total(model.losses(2)).backward()
    optimizer.step()


def features(optimizer, model):
    h = model.trunk(torch.ones(3, 5))
    optimizer.total({name: head(h).square().mean() for name, head in model.heads.items()}, features=h).backward()
    optimizer.step()


# Python cannot raise in __del__.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", [total, functions, task, accumulate, features])
def test_after_an_interrupt_at_any_line_the_next_step_is_that_of_a_fresh_optimizer(way):
    at, came = (total, functions, task, accumulate, features).index(way) % EVERY - EVERY + 1, True
    while came:
        at, came = at + EVERY, False
        model = build()
        optimizer = gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05))
        interrupt = Interrupt(at)
        before = sys.gettrace()
        try:
            sys.settrace(interrupt)
            way(optimizer, model)
        except KeyboardInterrupt:
            came = True
        finally:
            sys.settrace(before)
        # Not seen by the caller if it came where Python cannot raise, such as in __del__.
        came = came or len(interrupt.seen) >= at
        other = copy.deepcopy(model)
        twin = gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05))
        for o, m in ((optimizer, model), (twin, other)):
            o.zero_grad()
            o.total(m.losses(3)).backward()
            torch.nn.utils.clip_grad_norm_(trained(m), 0.1)
            o.step()
            with o.task("left"):
                m.losses(4)["left"].backward()
        assert equal_weights(model, other), sorted(interrupt.seen)[-1]
        assert all(
            torch.equal(p.grad, q.grad) if p.grad is not None else q.grad is None
            for p, q in zip(trained(model), trained(other), strict=True)
        )
    assert at > 100
