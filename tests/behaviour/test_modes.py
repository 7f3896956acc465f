"""A call under inference_mode or FakeTensorMode leaves nothing behind that later steps would trip over."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradsurg
from gradsurg.linalg.buffers import BUFFERS
from gradsurg.linalg.kernels import table

MODES = {"inference": torch.inference_mode, "fake": FakeTensorMode, "no grad": torch.no_grad}
SURGERIES = [method.name for method in gradsurg.methods() if method.kind == "surgery"]


@pytest.fixture
def cold():
    for kept in (BUFFERS._buffers, BUFFERS._latest, table._tables):
        kept.clear()


def matrix(m=5, n=40_000):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


def everything():
    """The functional form of every surgery, and steps of an optimizer on small and large tensors."""
    for surgery in SURGERIES:
        gradsurg.combine(matrix(), surgery=surgery)
    gradsurg.weights(matrix() @ matrix().T, margin=0.1)
    J = matrix(12, 3)
    gradsurg.combine(J, surgery="upgrad", guarantee="gradient")
    torch.manual_seed(0)
    for surgery in ("cone", "graddrop"):
        w = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(300_000)), nn.Parameter(torch.randn(7))]
        optimizer = gradsurg.wrap(torch.optim.SGD(w, lr=0.1), surgery=surgery)
        for _ in range(2):
            optimizer.zero_grad()
            flat = torch.cat([p.flatten() for p in w])
            optimizer.backward({"a": (flat - 1).square().mean(), "b": (flat + 1).square().mean(), "c": flat.mean()})
            optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_what_was_cold_is_not_poisoned(cold, mode):
    with MODES[mode](), contextlib.suppress(Exception):  # not all of it can be done with fake numbers
        everything()
    for surgery in SURGERIES:
        with MODES[mode](), contextlib.suppress(Exception):
            gradsurg.combine(matrix(), surgery=surgery)
    everything()


@pytest.mark.parametrize("mode", ["inference", "no grad"])
def test_the_answers_are_those_outside_whatever_was_warm(mode):
    everything()
    want = [gradsurg.combine(matrix(), surgery=surgery) for surgery in SURGERIES]
    with MODES[mode]():
        found = [gradsurg.combine(matrix(), surgery=surgery) for surgery in SURGERIES]
    again = [gradsurg.combine(matrix(), surgery=surgery) for surgery in SURGERIES]
    for a, b, c in zip(want, found, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    everything()


def test_set_gradients_takes_inference_tensors_but_is_not_called_under_inference_mode():
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    with torch.inference_mode():
        rows = {"a": [torch.ones(3)], "b": [torch.full((3,), 2.0)]}
        with pytest.raises(gradsurg.MultiTaskError, match=r"inference_mode.*call it outside"):
            optimizer.set_gradients(rows)
    assert w.grad is None
    optimizer.set_gradients(rows)
    w.grad.mul_(2)
    optimizer.step()


def test_tables_of_the_kernels_are_not_kept_from_inference_mode(cold):
    with torch.inference_mode():
        assert table.constant([1.0, 2.0], torch.device("cpu")).is_inference()
    assert not table.constant([1.0, 2.0], torch.device("cpu")).is_inference()
