"""A penalty added to the total of a later micro-batch: autograd puts its gradient into p.grad before the tasks run."""

import pytest
import torch
from torch import nn

import gradsurg

# A plain sum, so that torch's own accumulation says what p.grad has to be.
PLAIN = {"surgery": "sum", "normalize": "none", "guarantee": "none"}
ROWS = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 1.0]])


def losses_of(w, s, k):
    return {"a": (k + 1) * (ROWS[0] * w).sum() + 2 * s, "b": (ROWS[1] * w).sum() - s}


PENALTIES = {
    "after the total": lambda total, w, s, x: total + w.square().sum(),
    "two of them": lambda total, w, s, x: total + 0.1 * w.square().sum() + 0.2 * (w[0] * s),
    "a parameter": lambda total, w, s, x: total + s,
    "scaled": lambda total, w, s, x: (total + w.square().sum() + s) / 4,
    "of other parameters too": lambda total, w, s, x: total + w.square().sum() + x.square().sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_micro_batches_keep_their_rows(penalty, dtype):
    w, s = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))
    v, t = nn.Parameter(w.detach().clone()), nn.Parameter(s.detach().clone())
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, s, x], lr=0.1), **PLAIN)
    factor = 0.25 if penalty == "scaled" else 1.0
    for k in range(3):
        PENALTIES[penalty](optimizer.total(losses_of(w, s, k)), w, s, x).backward()
        PENALTIES[penalty](sum(losses_of(v, t, k).values()), v, t, y).backward()
        rows = optimizer._gradsurg.capture.rows
        for name, row, scalar in (("a", ROWS[0] * sum(range(1, k + 2)), 2), ("b", ROWS[1] * (k + 1), -1)):
            torch.testing.assert_close(rows[name][w], (factor * row).to(dtype))
            torch.testing.assert_close(rows[name][s], torch.tensor(factor * scalar * (k + 1), dtype=dtype))
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close([w.grad, s.grad], [v.grad, t.grad], rtol=tolerance, atol=tolerance)
    assert x.grad is None or torch.equal(x.grad, y.grad)


def test_the_step_hurts_no_task_of_the_first_micro_batch():
    w = nn.Parameter(torch.zeros(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    # Only the first micro-batch has b, and only the second one a large a.
    optimizer.total({"a": w[0], "b": w[1] - w[0]}).backward()
    (optimizer.total({"a": 9 * w[0]}) + w.square().sum()).backward()
    optimizer.step()
    moved = -w.detach()
    assert float(moved @ torch.tensor([10.0, 0.0])) >= -1e-6
    assert float(moved @ torch.tensor([-1.0, 1.0])) >= -1e-6
    assert moved.norm() > 0


def to_none(w):
    w.grad = None


# Between total() and its backward pass: the usual place in many loops.
ZEROS = {
    "to none": to_none,
    "in place": lambda w: w.grad.zero_(),
    "by foreach": lambda w: torch._foreach_zero_([w.grad]),
    "through data, after NaN": lambda w: w.grad.data.zero_(),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("penalised", [False, True])
def test_what_was_zeroed_after_the_total_was_built_is_gone(zero, penalised):
    w, s, v, t = (nn.Parameter(torch.ones(n)) for n in (3, 1, 3, 1))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, s], lr=0.1))
    reference = gradsurg.wrap(torch.optim.SGD([v, t], lr=0.1))
    first = losses_of(w, s[0], 0)
    if "NaN" in zero:
        first["a"] = first["a"] * float("nan")
    optimizer.total(first).backward()
    total = optimizer.total(losses_of(w, s[0], 1))
    for p in (w, s):
        ZEROS[zero](p)
    (total + w.square().sum() if penalised else total).backward()
    other = reference.total(losses_of(v, t[0], 1))
    (other + v.square().sum() if penalised else other).backward()
    torch.testing.assert_close([w.grad, s.grad], [v.grad, t.grad])
    assert torch.equal(optimizer._gradsurg.capture.rows["a"][w], 2 * ROWS[0])


@pytest.mark.parametrize("penalised", [False, True])
def test_what_torch_cannot_see_is_no_penalty(penalised):
    """Numbers that .data changed before the total was built are foreign, also if a penalty reaches others."""
    w, s, x = (nn.Parameter(torch.ones(n)) for n in (3, 1, 2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, s, x], lr=0.1), **PLAIN)
    optimizer.total(losses_of(w, s[0], 0)).backward()
    w.grad.data.mul_(0.5)
    total = optimizer.total(losses_of(w, s[0], 1))
    (total + x.square().sum() if penalised else total).backward()
    assert w.grad.tolist() == (0.5 * ROWS.sum(0) + 2 * ROWS[0] + ROWS[1]).tolist()
    if not penalised:
        assert torch.equal(optimizer._gradsurg.capture.rows["a"][w], 2 * ROWS[0])


@pytest.mark.parametrize("order", ["one twice", "both built first"])
def test_totals_that_were_built_before_the_rows_came(order):
    w, s, v, t = (nn.Parameter(torch.ones(n)) for n in (3, 1, 3, 1))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, s], lr=0.1), **PLAIN)
    totals = [optimizer.total(losses_of(w, s[0], 0))]
    totals.append(totals[0] if order == "one twice" else optimizer.total(losses_of(w, s[0], 0)))
    for k, total in enumerate(totals):
        (total + w.square().sum()).backward(retain_graph=k == 0)
        (sum(losses_of(v, t[0], 0).values()) + v.square().sum()).backward()
    torch.testing.assert_close([w.grad, s.grad], [v.grad, t.grad])
    assert torch.equal(optimizer._gradsurg.capture.rows["a"][w], 2 * ROWS[0])
