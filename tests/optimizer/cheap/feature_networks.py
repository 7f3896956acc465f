"""A network whose representation is given as features=, and what must come out, computed by hand."""

import torch
from torch import nn

import gradsurg
from tests.networks import Heads, data

TASKS = ("left", "right", "whole")


class Net(Heads):
    """Heads, with what the heads read."""

    def forward(self, batch=0):
        x, targets = data(batch, 16, 5), data(batch + 1000, len(self.heads), 16, 2)
        self.h = self.trunk(x)
        return {
            name: scale * (head(self.h) - target).square().mean()
            for (name, head), target, scale in zip(self.heads.items(), targets, (1.0, 5.0, 0.2), strict=False)
        }


def build(seed=0, tasks=TASKS):
    torch.manual_seed(seed)
    return Net(tasks)


def wrapped(model, cls=torch.optim.SGD, lr=0.1, **options):
    return gradsurg.wrap(cls(model.parameters(), lr=lr), **options)


def by_hand(model, batch=0, scale=1.0, **options):
    """The same with torch.autograd.grad and gradsurg.combine: what must come out, in p.grad's place."""
    losses = {name: loss * scale for name, loss in model(batch).items()}
    J = torch.stack([torch.autograd.grad(loss, model.h, retain_graph=True)[0].flatten() for loss in losses.values()])
    u = gradsurg.combine(J, normalize="norm", **options).view_as(model.h)
    trunk = torch.autograd.grad(model.h, list(model.trunk.parameters()), u, retain_graph=True)
    heads = torch.autograd.grad(sum(losses.values()), list(model.heads.parameters()))
    return [*trunk, *heads]


def gradients(model):
    return [p.grad for p in [*model.trunk.parameters(), *model.heads.parameters()]]


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6 * y.abs().max().item()) for x, y in zip(a, b, strict=True))


class Bypass(nn.Module):
    """A loss that reads the features and, past them, the trunk's own parameters; a decoder two tasks share."""

    def __init__(self):
        super().__init__()
        self.trunk, self.decoder = nn.Linear(5, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])

    def forward(self, batch=0):
        x, y = data(batch, 16, 5), data(batch + 1000, 3, 16, 1)
        self.h = torch.tanh(self.trunk(x))
        deeper = torch.tanh(self.decoder(self.h))
        return {
            "skip": (self.heads[0](self.h + self.trunk(x)) - y[0]).square().mean(),
            "deep": (self.heads[1](deeper) - y[1]).square().mean(),
            "deeper": (self.heads[2](deeper) + 3 * y[2]).square().mean(),
        }
