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


def overflowing(w, scale=1e5):
    return {"loud": scale * w.sum(), "calm": w.square().sum()}


@pytest.mark.parametrize("options", [{}, {"batched": True}, {"rotate": 2}], ids=str)
def test_a_gradient_that_does_not_fit_is_refused_by_name(options):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.Adam([w], lr=0.1), row_dtype=torch.float16, **options)
    with pytest.raises(gradsurg.MultiTaskError, match=r"row_dtype=torch.float16.*'loud'.*65504.*bfloat16"):
        optimizer.total(overflowing(w)).backward()
    assert w.grad is None
    assert torch.equal(w, torch.ones(3))
    optimizer.total(overflowing(w, 1.0)).backward()
    optimizer.step()
    assert w.isfinite().all()


def test_a_task_that_does_not_fit_can_be_skipped():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), row_dtype=torch.float16, nonfinite="skip_task")
    optimizer.backward(overflowing(w))
    assert optimizer.report.nonfinite == ("loud",)
    assert torch.equal(w.grad, torch.full((3,), 2.0))


def test_nor_does_a_sum_of_micro_batches():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.Adam([w], lr=0.1), row_dtype=torch.float16)
    optimizer.backward(overflowing(w, 4e4))
    before = w.grad.clone()
    with pytest.raises(gradsurg.MultiTaskError, match="'loud'"):
        optimizer.backward(overflowing(w, 4e4))
    assert torch.equal(w.grad, before)
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(overflowing(w, 4e4))
        optimizer.backward({"loud": 4e4 * w.sum()})
    with pytest.raises(gradsurg.MultiTaskError, match="'loud'"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3))


def test_on_features():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.Adam([w], lr=0.1), row_dtype=torch.float16)
    h = w * 1.0
    with pytest.raises(gradsurg.MultiTaskError, match="'loud'"):
        optimizer.total(overflowing(h), features=h).backward()
    assert w.grad is None


def test_a_scaler_sees_the_infinity_and_a_gradient_that_is_infinite_itself_is_passed_on():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.Adam([w], lr=0.1), row_dtype=torch.float16)
    (optimizer.total(overflowing(w, 10.0)) * 2.0**16).backward()
    assert not w.grad.isfinite().all()
    optimizer.zero_grad()
    optimizer.total(overflowing(w, float("inf"))).backward()
    assert optimizer.report.nonfinite == ("loud",)


def test_what_shared_leaves_out_keeps_its_gradients():
    torch.manual_seed(0)
    trunk, neck, a, b = (torch.nn.Linear(4, n) for n in (4, 4, 1, 1))
    parameters = [p for module in (trunk, neck, a, b) for p in module.parameters()]
    optimizer = gradsurg.wrap(torch.optim.Adam(parameters), shared=trunk, row_dtype=torch.bfloat16)
    h = neck(trunk(torch.randn(8, 4)).tanh())
    losses = {"a": a(h).mean(), "b": b(h).square().mean()}
    wanted = torch.autograd.grad(sum(losses.values()), list(neck.parameters()), retain_graph=True)
    optimizer.total(losses).backward()
    torch.testing.assert_close([p.grad for p in neck.parameters()], list(wanted))
    rows = optimizer._gradsurg.capture.rows
    assert {rows[name][trunk.weight].dtype for name in rows} == {torch.bfloat16}
    optimizer.step()
