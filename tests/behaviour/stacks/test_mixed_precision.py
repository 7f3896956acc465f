"""torch.amp.GradScaler and half precision, beyond what test_capture.py has: clipping, accumulation, 16-bit rows."""

import pytest
import torch
from torch import nn

import gradsurg
from tests.networks import build, data, equal_weights, rows_of, same, trained, twins


def scaler_of(scale=1024.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_unscaling_twice_is_refused_whatever_name_the_optimizer_goes_by():
    # There is no inner optimizer to unscale beside the wrapped one: wrap() gives back the object it was given.
    model = build()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gradsurg.wrap(bare)
    scaler = scaler_of()
    scaler.scale(optimizer.total(model.losses(0))).backward()
    scaler.unscale_(bare)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    norms = [p.grad.norm() for p in model.parameters()]
    scaler.step(optimizer)  # does not unscale again
    assert same(norms, [p.grad.norm() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_recipe_under_autocast(accumulate):
    # scale, backward, unscale_, clip, step, update. The scale is a power of two: only norms of scaled rows may round.
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=0.01))
    reference = gradsurg.wrap(torch.optim.AdamW(other.parameters(), lr=0.01))
    scaler = scaler_of()
    for step in range(3):
        for o, m in [(optimizer, model), (reference, other)]:
            o.zero_grad()
            for part in range(accumulate):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    losses = m.losses(10 * step + part)
                total = o.total(losses) / accumulate
                (scaler.scale(total) if o is optimizer else total).backward()
            if o is optimizer:
                scaler.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            if o is optimizer:
                scaler.step(o)
                scaler.update()
            else:
                o.step()
        assert optimizer.report.movement is not None
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float32


def test_an_overflow_in_one_micro_batch_skips_the_step_and_backs_off():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    scaler = scaler_of()
    before = [p.detach().clone() for p in model.parameters()]
    for part in range(2):
        losses = model.losses(part)
        if part == 0:
            losses["left"] = losses["left"] + model.trunk[0].weight.sum() * float("inf")
        scaler.scale(optimizer.total(losses)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert same(before, [p.detach() for p in model.parameters()])
    assert scaler.get_scale() == 512.0
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale(optimizer.total(model.losses(2))).backward()
    scaler.step(optimizer)
    assert not same(before, [p.detach() for p in model.parameters()])


class Half(nn.Module):
    """Parameters of 16 bits, and gradients whose squares do not fit: 1e4 entries of about 30 make 1e7, over 65504."""

    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(10_000, dtype=dtype))

    def losses(self):
        a, b = data(0, 2, 10_000) * 30
        return {"a": (a.to(self.w.dtype) * self.w).sum(), "b": (b.to(self.w.dtype) * self.w).sum()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits_are_measured_in_more(dtype):
    model = Half(dtype)
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=1e-3))
    optimizer.total(model.losses()).backward()
    rows = [row[0] for row in rows_of(optimizer).values()]
    assert all(row.dtype == dtype for row in rows)
    exact = torch.stack(rows).double()
    torch.testing.assert_close(optimizer.report.gramian, exact @ exact.T, rtol=1e-6, atol=0)  # of numbers up to 1e7
    optimizer.step()
    assert model.w.isfinite().all()
    assert (optimizer.report.update_cosines >= -1e-2).all()


def test_a_scaler_says_of_float16_gradients_what_it_always_says():
    # Master weights in float32 are what it is made for; we neither hide that nor make it worse.
    model = Half(torch.float16)
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=1e-3))
    scaler = scaler_of(2.0)
    scaler.scale(optimizer.total(model.losses())).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_one_scaler_over_a_wrapped_and_a_plain_optimizer():
    model, other = twins()
    scaler = scaler_of()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.trunk.parameters(), lr=0.1))
    heads = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    scaler.scale(optimizer.total(model.losses(0))).backward()
    for o in (optimizer, heads):
        scaler.step(o)
    scaler.update()
    # The heads are outside the wrapped optimizer, and get what a plain backward pass of the sum gives them.
    sum(other.losses(0).values()).backward()
    plain = torch.optim.SGD(other.heads.parameters(), lr=0.1)
    plain.step()
    assert equal_weights(model.heads, other.heads)
    assert all(not torch.equal(p, q) for p, q in zip(trained(model.trunk), trained(other.trunk), strict=True))
