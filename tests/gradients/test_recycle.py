"""Memory is written again where nobody can see it, and nowhere else."""

import pytest
import torch

import gradsurg
from gradsurg.gradients.recycle import FROM, Recycler


def kept(p):
    """Return a store with one tensor for a parameter, and the address of its memory."""
    spare, u = Recycler(), torch.ones_like(p).detach()
    spare.keep([(p, u)])
    return spare, u


def test_a_tensor_that_nobody_refers_to_comes_back():
    p = torch.nn.Parameter(torch.zeros(FROM))
    spare, u = kept(p)
    address = u.data_ptr()
    del u
    (taken,) = spare.take([p])
    assert taken is not None
    assert taken.data_ptr() == address
    assert spare.take([p]) is None  # once: nothing is kept any more


@pytest.mark.parametrize("hold", [lambda u: u, lambda u: u[3:], lambda u: u.detach(), lambda u: u.numpy()])
def test_one_that_somebody_refers_to_does_not(hold):
    p = torch.nn.Parameter(torch.zeros(FROM))
    spare, u = kept(p)
    held = hold(u)
    del u
    assert spare.take([p]) == [None]
    assert float(held[0]) == 1


def test_one_that_is_in_use_as_a_gradient_does_not():
    p = torch.nn.Parameter(torch.zeros(FROM))
    spare, u = kept(p)
    p.grad = u
    del u
    assert spare.take([p]) == [None]


@pytest.mark.parametrize("other", [torch.zeros(FROM, 2), torch.zeros(FROM).double(), torch.zeros(2, FROM).T])
def test_one_of_another_kind_does_not(other):
    p = torch.nn.Parameter(torch.zeros(FROM))
    spare, u = Recycler(), torch.ones_like(other)
    spare.keep([(p, u)])
    del u
    assert spare.take([p]) == [None]


def test_gradients_that_users_keep_stay_as_they_were():
    p = torch.nn.Parameter(torch.zeros(FROM))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1))
    addresses, mine = [], None
    for step in range(4):
        optimizer.zero_grad()
        optimizer.total({"a": (p - 1).square().sum(), "b": ((p - step) * 2).square().sum()}).backward()
        addresses.append(p.grad.data_ptr())
        if step == 1:
            mine = p.grad
            copy = p.grad.clone()
        optimizer.step()
    assert addresses[0] == addresses[1] != addresses[2]
    assert torch.equal(mine, copy)
