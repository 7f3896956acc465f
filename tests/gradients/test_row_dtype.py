"""row_dtype=torch.bfloat16: what rounded rows still guarantee of the gradients themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurg
from tests.networks import build

# A row differs from its gradient by at most half of bfloat16's last place, 2^-9 of every number, and so of its length.
BOUND = 2.0**-9 + 1e-4


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@given(seed=st.integers(0, 1000), surgery=st.sampled_from(["cone", "upgrad", "mgda", "pcgrad"]))
def test_direction_and_update_hurt_no_gradient_by_more_than_rounding(seed, surgery):
    model = build(seed=seed)
    shared = list(model.trunk.parameters())
    optimizer = gradsurg.wrap(
        torch.optim.Adam(model.parameters(), lr=0.01), row_dtype=torch.bfloat16, surgery=surgery, seed=seed
    )
    for batch in range(3):
        losses = model.losses(seed + batch)
        rows = [flat(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses.values()]
        before = flat(shared)
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        optimizer.step()
        d = before - flat(shared)
        for g in rows:
            assert torch.dot(d, g) >= -BOUND * d.norm() * g.norm()


@pytest.mark.parametrize("cast", [1e-3, 1.0, 1e3])
def test_rows_are_the_gradients_rounded_once(cast):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), row_dtype=torch.bfloat16)
    losses = {name: cast * loss for name, loss in model.losses(0).items()}
    p = model.trunk[0].weight
    expected = {name: torch.autograd.grad(loss, p, retain_graph=True)[0] for name, loss in losses.items()}
    optimizer.backward(losses)
    for name, g in expected.items():
        assert torch.equal(optimizer._gradsurg.capture.rows[name][p], g.bfloat16())
