"""p.grad has the strides that autograd would give it, in every way of filling it; fused optimizers rely on them."""

import pytest
import torch
from torch import nn

import gradsurg

WAYS = ["total", "backward", "task", "set_gradients", "features", "plain"]
OPTIONS = [
    {},
    {"batched": True},
    {"surgery": "graddrop"},
    {"surgery": "trimmed_mean"},
    {"granularity": "tensor"},
    {"margin": 0.1},
    {"surgery": "pcgrad", "normalize": "none"},
    {"row_dtype": torch.bfloat16},
    {"refresh_every": 2},
    {"rotate": 1},
]


class Net(nn.Module):
    """Tensors of every layout: channels last, transposed, with gaps, expanded to one number, large and small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3), nn.Tanh())
        self.wide = nn.Conv2d(16, 24, 3)
        self.turned = nn.Parameter(torch.randn(5, 24).T)
        self.gaps = nn.Parameter(torch.randn(24, 10)[:, ::2])
        self.heads = nn.ModuleList(nn.Conv2d(24, 2, 1) for _ in range(3))
        self.to(memory_format=torch.channels_last)

    def features(self, x):
        return self.wide(self.trunk(x))

    def losses(self, h):
        flat = h.mean((2, 3)) @ self.turned + h.mean((2, 3)) @ self.gaps
        return {
            str(i): (head(h) - i).square().mean() + (flat[:, i] + i - 1).square().mean()
            for i, head in enumerate(self.heads)
        }


def fill(way, model, optimizer, x):
    h = model.features(x)
    losses = model.losses(h)
    if way == "total":
        optimizer.total(losses).backward()
    elif way == "backward":
        optimizer.backward(losses)
    elif way == "features":
        optimizer.total(losses, features=h).backward()
    elif way == "plain":
        optimizer.total(losses, plain=model.turned.square().sum() + model.wide.weight.square().sum()).backward()
    elif way == "task":
        for name, loss in losses.items():
            with optimizer.task(name):
                loss.backward(retain_graph=True)
    else:
        parameters = list(model.parameters())
        rows = {n: torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for n, v in losses.items()}
        # As functorch and hand-written code return them: contiguous.
        optimizer.set_gradients({n: [g if g is None else g.contiguous() for g in row] for n, row in rows.items()})


def refused(way, options):
    cheap = {"refresh_every", "rotate"} & set(options)
    number_by_number = {"graddrop", "trimmed_mean"} & set(map(str, options.values()))
    return (way in ("task", "set_gradients", "features") and cheap) or (
        way == "features" and ("granularity" in options or number_by_number)
    )


@pytest.mark.parametrize(
    ("way", "options"), [(w, o) for w in WAYS for o in OPTIONS if not refused(w, o)], ids=lambda value: str(value)
)
def test_strides_are_those_of_autograd(way, options):
    model, plain, x = Net(), Net(), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    sum(plain.losses(plain.features(x)).values()).backward()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=1e-3), **options)
    for _ in range(2):
        for _ in range(2):  # also where a gradient is added to one that stands there
            fill(way, model, optimizer, x)
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                if p.grad is not None or "rotate" not in options:  # with rotate=, a head may not be due
                    assert p.grad.stride() == q.grad.stride(), name
                    assert p.grad.dtype == p.dtype
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("way", "options"),
    [("total", {"batched": True}), ("total", {"surgery": "graddrop"}), ("set_gradients", {}), ("features", {})],
)
def test_a_fused_optimizer_does_the_same_step(way, options):
    steps = []
    for fused in (False, True):
        model, x = Net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        del model.gaps  # a fused optimizer misreads gaps in plain torch too
        model.gaps = nn.Parameter(torch.ones(24, 5))
        optimizer = gradsurg.wrap(
            torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused), seed=0, guarantee="gradient", **options
        )
        fill(way, model, optimizer, x)
        optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_leaves_outside_the_optimizer():
    model, plain, x = Net(), Net(), torch.randn(4, 3, 8, 8)
    optimizer = gradsurg.wrap(torch.optim.SGD([model.turned], lr=0.1), batched=True)
    optimizer.backward(model.losses(model.features(x)))
    sum(plain.losses(plain.features(x)).values()).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.stride() == q.grad.stride(), name
