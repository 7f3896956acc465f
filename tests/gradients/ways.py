"""The ways in which gradients come in, and a wrapped optimizer that takes them."""

import torch

import gradsurg
from tests.networks import trained

WAYS = ["total", "backward", "task", "set_gradients"]
# Ways that run backward passes of ours or of the user's.
PASSES = ["total", "backward", "task"]


def wrapped(model, cls=torch.optim.SGD, lr=0.1, **options):
    return gradsurg.wrap(cls(trained(model), lr=lr), **options)


def gradients(model):
    return [p.grad for p in model.parameters()]


def clear(route, model, optimizer):
    owner, _, kind = route.partition(" ")
    if owner == "optimizer":
        optimizer.zero_grad(set_to_none=kind == "none")
    elif owner == "model":
        model.zero_grad(set_to_none=kind == "none")
    else:
        for p in model.parameters():
            if route == "by hand zeros":
                p.grad.zero_()
            else:
                p.grad = None if route == "by hand none" else torch.zeros_like(p)
