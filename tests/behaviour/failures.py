"""Errors of the user's own, and runs that are about to fail beside equal ones that are not."""

import torch

import gradsurg
from tests.networks import equal_weights, run_backward, same, trained, twins

PASSES = ["total", "backward", "task"]


class Mine(Exception):  # noqa: N818
    """What the user's own code raises."""


class Broken(torch.autograd.Function):
    """A node whose backward pass raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Mine("in a backward pass")


def wrapped(model, cls=torch.optim.SGD, **options):
    keywords = {"lr": 0.05} if cls is not torch.optim.SGD else {"lr": 0.05, "momentum": 0.9}
    return gradsurg.wrap(cls(trained(model), **keywords), **options)


def rows_of(optimizer):
    rows = optimizer._gradsurg.capture.rows
    return {name: dict(enumerate(rows[name].values())) for name in rows}


def copy_rows(optimizer):
    return {name: {k: g.clone() for k, g in row.items()} for name, row in rows_of(optimizer).items()}


def good_step(optimizer, model, batch=5):
    optimizer.zero_grad()
    optimizer.total(model.losses(batch)).backward()
    optimizer.step()
    assert optimizer.report.movement is not None


def assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other):
    assert equal_weights(model, other)
    for batch in (5, 6):
        good_step(optimizer, model, batch)
        good_step(reference, other, batch)
        assert equal_weights(model, other)
    assert same(optimizer.state_dict(), reference.state_dict())


def prepare(way="total", steps=2, **options):
    """Two equal runs, some steps in, one about to fail."""
    model, other = twins()
    optimizer, reference = wrapped(model, **options), wrapped(other, **options)
    for batch in range(steps):
        for o, m in [(optimizer, model), (reference, other)]:
            o.zero_grad()
            run_backward(way, o, m.losses(batch))
            o.step()
    return model, optimizer, other, reference
