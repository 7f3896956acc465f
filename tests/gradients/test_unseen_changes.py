"""What users do to p.grad through .data, .numpy() or raw memory counts as it does in a plain backward."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg.gradients import capture
from gradsurg.normalize import NORMALIZERS, PriorLoss


def _through_numpy(g):
    g.numpy()[...] = 0


def _a_part_through_numpy(g):
    g.numpy()[:2] = 0


CHANGES = {
    "data.zero_": lambda g: g.data.zero_(),
    "data.mul_": lambda g: g.data.mul_(0.5),
    "data.neg_": lambda g: g.data.neg_(),
    "data.clamp_": lambda g: g.data.clamp_(-0.5, 0.5),
    "data mask": lambda g: g.data[1:].zero_(),
    "numpy": _through_numpy,
    "part by numpy": _a_part_through_numpy,
    "_foreach_mul_": lambda g: torch._foreach_mul_([g.data], 0.5),
    "clip_grad_norm_ of data": lambda g: g.data.mul_(0.1 / g.norm()),
    "storage": lambda g: g.untyped_storage().fill_(0),
    "nothing": lambda g: None,
}
# A plain sum, so that torch's own accumulation says what p.grad has to be.
PLAIN = {"surgery": "sum", "normalize": "none", "guarantee": "none"}
VECTORS = [torch.tensor(v) for v in ([1.0, 1.0, 2.0], [0.0, 1.0, -1.0])]


@pytest.fixture(params=["read", "not read"])
def reading(request, monkeypatch):
    if request.param == "not read":  # as on a device
        monkeypatch.setattr(capture, "_may_be_read", lambda answer: False)


def losses_of(w):
    return [(v * w).sum() for v in VECTORS]


@pytest.mark.parametrize("options", [{}, {"batched": True}, {"granularity": "tensor"}, {"tasks": ["a", "b"]}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_between_two_backward_passes(reading, change, options):
    w, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w, head], lr=0.1), **PLAIN, **options)
    plain = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    for k in range(3):
        a, b = losses_of(w)
        optimizer.backward({"a": a + head.square().sum(), "b": b})
        a, b = losses_of(plain[0])
        (a + b + plain[1].square().sum()).backward()
        if k < 2:
            for p in (w, head, *plain):
                CHANGES[change](p.grad)
    torch.testing.assert_close([w.grad, head.grad], [p.grad for p in plain], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", CHANGES)
def test_beside_a_penalty_of_its_own(reading, change):
    w, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), **PLAIN)
    for k in range(2):
        w.square().sum().backward()
        optimizer.total(dict(zip("ab", losses_of(w), strict=True))).backward()
        (sum(losses_of(plain)) + plain.square().sum()).backward()
        if k == 0:
            for p in (w, plain):
                CHANGES[change](p.grad)
    torch.testing.assert_close(w.grad, plain.grad, rtol=1e-6, atol=1e-7)


def test_of_sparse_gradients():
    table, plain = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)
    plain.load_state_dict(table.state_dict())
    optimizer = gradsurg.wrap(torch.optim.SGD(table.parameters(), lr=0.1), **PLAIN)
    for k in range(2):
        rows = table(torch.tensor([0, 3]))
        optimizer.backward({"a": rows.sum(), "b": rows.square().sum()})
        rows = plain(torch.tensor([0, 3]))
        (rows.sum() + rows.square().sum()).backward()
        if k == 0:
            for module in (table, plain):
                module.weight.grad = module.weight.grad.coalesce()
                module.weight.grad._values().data.mul_(0.5)
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad.to_dense())


@pytest.mark.parametrize("zero", ["data.zero_", "numpy", "None"])
@pytest.mark.parametrize("surgery", ["cone", "sum", "graddrop"])
def test_a_batch_with_nan_can_be_skipped(reading, zero, surgery):
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), surgery=surgery)
    fresh = gradsurg.wrap(torch.optim.SGD([other], lr=0.1), surgery=surgery)
    a, b = losses_of(w)
    optimizer.backward({"a": a * float("nan"), "b": b})
    if zero == "None":
        w.grad = None
    else:
        CHANGES[zero](w.grad)
    optimizer.backward(dict(zip("ab", losses_of(w), strict=True)))
    fresh.backward(dict(zip("ab", losses_of(other), strict=True)))
    assert torch.equal(w.grad, other.grad)


@pytest.mark.parametrize(
    ("surgery", "normalize", "size"),
    [
        *((method.name, "norm", 300) for method in gradsurg.methods() if method.kind == "surgery"),
        *(("cone", normalize, 300) for normalize in NORMALIZERS),
        ("cone", "norm", 300_000),
    ],
)
def test_rows_that_no_one_touched_stay_live(surgery, normalize, size):
    # The surgery that is done once more must be the same to the bit, with what it remembers and what it draws.
    torch.manual_seed(0)
    w = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(size))]
    scales = PriorLoss({"a": 1.0, "b": 2.0, "c": 3.0}) if normalize == "prior_loss" else normalize
    optimizer = gradsurg.wrap(torch.optim.SGD(w, lr=1e-3), surgery=surgery, normalize=scales)
    for _ in range(2):
        optimizer.zero_grad()
        flat = torch.cat([p.flatten() for p in w])
        losses = {"a": (flat - 1).square().mean(), "b": (flat + 1).square().mean(), "c": flat[:7].square().sum() + 1}
        optimizer.backward(losses)
        assert optimizer._gradsurg.capture.is_live()
        w[1].grad.data[5].add_(1)
        assert not optimizer._gradsurg.capture.is_live()
        optimizer.step()
