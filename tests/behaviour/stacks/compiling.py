"""What test_compile.py runs in processes of its own, because compiled code and its caches outlive a test.

python tests/behaviour/stacks/compiling.py SCENARIO: raises where something is wrong, and prints "ok".
"""

import sys

import pytest
import torch
import torch._dynamo
import torch._functorch.config as functorch
from torch import nn

import gradsurg


def build():
    """relu reads its own output in the backward pass: what inductor overwrites first where it may."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU())])
    return nn.ModuleDict({"trunk": trunk, "heads": nn.ModuleList(nn.Linear(16, 1) for _ in range(3))})


X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def losses_of(model, trunk):
    z = trunk(X)
    return {f"task{i}": (head(z) - i).square().mean() for i, head in enumerate(model["heads"])}


def check_rows(optimizer, model, trunk):
    """Every row against torch.autograd.grad of the model that was never compiled."""
    optimizer.zero_grad()
    optimizer.total(losses_of(model, trunk)).backward()
    parameters = list(model.parameters())
    for name, loss in losses_of(model, model["trunk"]).items():
        wanted = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        for p, g in zip(parameters, wanted, strict=True):
            have = optimizer._gradsurg.capture.rows[name].get(p)
            if g is None:
                assert have is None, "a parameter that this task does not reach"
            else:
                torch.testing.assert_close(have, g, rtol=1e-4, atol=1e-6)  # float32, fused in another order


def refused(optimizer, model, trunk, match):
    optimizer.zero_grad()
    before = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g
    with pytest.raises(gradsurg.MultiTaskError, match=rf"{match}[\s\S]*prepare_compile\(\)"):
        optimizer.total(losses_of(model, trunk)).backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


def refused_in_task(optimizer, model, trunk):
    optimizer.zero_grad()
    losses = losses_of(model, trunk)
    with pytest.raises(gradsurg.MultiTaskError, match=r"prepare_compile\(\)"), optimizer.task("task0"):
        losses["task0"].backward(retain_graph=True)


def first_layer(model, trunk):
    """The tasks' gradients of one weight, as plain torch gives them."""
    weight = model["trunk"][0].weight
    return [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses_of(model, trunk).values()]


def fresh():
    """Empty caches: right with and without the preparation; whatever ran first."""
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    gradsurg.prepare_compile()
    trunk = torch.compile(model["trunk"])
    sum(losses_of(model, trunk).values()).backward()  # a plain backward pass first
    check_rows(optimizer, model, trunk)
    optimizer.step()
    gradsurg.prepare_compile()  # changes nothing, and forgets nothing
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sum(losses_of(model, trunk).values()).backward()
    check_rows(optimizer, model, trunk)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()  # and now from the caches that were just filled
    check_rows(optimizer, model, trunk)


def unprepared():
    """Fill the caches with code that may overwrite; refused in this process, until it is prepared."""
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    trunk = torch.compile(model["trunk"])
    sum(losses_of(model, trunk).values()).backward()
    refused(optimizer, model, trunk, "runs once")
    refused_in_task(optimizer, model, trunk)


def warm():
    """A process that finds such code in the caches, with and without torch's own advice."""
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    trunk = torch.compile(model["trunk"])
    refused(optimizer, model, trunk, "runs once")
    functorch.donated_buffer = False  # what torch's message says; with these caches, silently wrong
    torch._dynamo.reset()
    assert not torch.allclose(*map(torch.stack, (first_layer(model, trunk), first_layer(model, model["trunk"])))), (
        "torch got this right: the trap that the refusal below is for has gone from this version"
    )
    refused(optimizer, model, trunk, "overwrote")
    refused_in_task(optimizer, model, trunk)
    gradsurg.prepare_compile()
    check_rows(optimizer, model, trunk)
    with optimizer.task("task0"):
        losses_of(model, trunk)["task0"].backward(retain_graph=True)  # allowed now
    optimizer.step()


if __name__ == "__main__":
    {"fresh": fresh, "unprepared": unprepared, "warm": warm}[sys.argv[1]]()
    print("ok")
