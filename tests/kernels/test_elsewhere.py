"""Every option and every way in, on a device that is not the CPU and has no kernels of ours."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import gradsurg
from tests.kernels.elsewhere import DEVICE, Elsewhere

CPU = torch.device("cpu")
HOW = ["foreach", "fused"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self, z):
        errors = [(head(z).squeeze(-1) - k).square().mean() for k, head in enumerate(self.heads)]
        return dict(zip("abc", errors, strict=True))


def total(optimizer, net, x):
    optimizer.total(net.losses(net.trunk(x))).backward()


def backward(optimizer, net, x):
    optimizer.backward(net.losses(net.trunk(x)))


def functions(optimizer, net, x):
    optimizer.backward({name: lambda name=name: net.losses(net.trunk(x))[name] for name in "abc"})


def task(optimizer, net, x):
    losses = net.losses(net.trunk(x))
    for name, loss in losses.items():
        with optimizer.task(name):
            loss.backward(retain_graph=name != "c")


def set_gradients(optimizer, net, x):
    declared = optimizer._gradsurg.options.shared
    wanted = list(net.parameters() if declared is None else declared)
    losses = net.losses(net.trunk(x))
    rows = {n: torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) for n, loss in losses.items()}
    optimizer.set_gradients(rows)


def features(optimizer, net, x):
    z = net.trunk(x)
    optimizer.total(net.losses(z), features=z).backward()


def accumulate(optimizer, net, x):
    with optimizer.accumulate():
        total(optimizer, net, x)
    total(optimizer, net, 0.5 * x)


def micro_batches(optimizer, net, x):
    total(optimizer, net, x)
    total(optimizer, net, 0.5 * x)


def closure(optimizer, net, x):
    """Fill p.grad inside step(); see `trained`."""
    optimizer.zero_grad()
    total(optimizer, net, x)
    return 0.0


WAYS = [total, backward, functions, task, set_gradients, features, accumulate, micro_batches, closure]
# Of each option of wrap, what is not the default; "shared" and "model" stand for the trunk and the model.
OPTIONS = [
    {},
    {"normalize": "none", "surgery": "upgrad"},
    {"primary": "a"},
    {"primary": [["a"], ["b", "c"]], "auxiliary": "help"},
    {"preferences": {"a": 2.0, "b": 0.0}},
    {"guarantee": "gradient"},
    {"guarantee": "none"},
    {"margin": 0.2},
    {"margin": {"a": 0.3}, "granularity": "tensor"},
    {"granularity": "group"},
    {"model": "model"},
    {"tasks": ["a", "b", "c"]},
    {"shared": "trunk"},
    {"row_dtype": torch.bfloat16},
    {"nonfinite": "skip_task"},
    {"atomic": True},
    {"backend": "torch"},
    {"backend": "triton"},
    {"surgery": "random", "seed": 5},
    {"refresh_every": 2},
    {"rotate": 1},
    {"batched": True},
    {"check_sync_every": 2},
]
METHODS = [{method.kind: method.name} for method in gradsurg.methods() if method.kind == "surgery"] + [
    {"normalize": method.name} for method in gradsurg.methods() if method.kind != "surgery"
]


def trained(device, way, how, options):
    """Return parameters, report and warnings of two steps, or what was raised before anything moved."""
    net = Net().to(device)
    start = [p.detach().clone() for p in net.parameters()]
    x = torch.linspace(-1, 1, 40).reshape(8, 5).to(device)
    modules = {"shared": net.trunk, "model": net}
    given = {name: modules.get(name, value) for name, value in options.items()}
    groups = [
        {"params": [*net.trunk[0].parameters()]},
        {"params": [*net.trunk[2].parameters(), *net.heads.parameters()]},
    ]
    groups[1]["lr"] = 0.02
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            optimizer = gradsurg.wrap(torch.optim.AdamW(groups, lr=0.05, **({how: True} if how else {})), **given)
            for _ in range(2):
                if way is closure:
                    optimizer.step(lambda: closure(optimizer, net, x))
                else:
                    optimizer.zero_grad()
                    way(optimizer, net, x)
                    assert optimizer.report is None or optimizer.report.movement is None
                    optimizer.step()
        except (ValueError, gradsurg.MultiTaskError) as error:
            assert all(map(torch.equal, start, (p.detach() for p in net.parameters())))
            return str(error)
    return [p.detach().cpu() for p in net.parameters()], str(optimizer.report), [str(each.message) for each in said]


@pytest.fixture(autouse=True)
def fused_there(monkeypatch):
    """Let torch's fused optimizers run on the stand-in."""
    devices = torch_optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*devices, DEVICE.type])


def check(way, how, options):
    want = trained(CPU, way, how, options)
    with Elsewhere():
        mine = trained(DEVICE, way, how, options)
    if isinstance(want, str) or isinstance(mine, str):
        assert str(mine).replace(str(DEVICE), "cpu") == want
        return
    for a, b in zip(mine[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert mine[1:] == want[1:]


def test_the_table_has_every_option():
    options = {name for each in OPTIONS for name in each}
    assert options == {*inspect.signature(gradsurg.wrap).parameters} - {"optimizer"}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_does_what_it_does_on_the_cpu(options, way, how):
    check(way, how, options)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_method_does_what_it_does_on_the_cpu(options):
    check(total, "", options)


def test_the_stand_in_lets_nothing_be_mixed():
    with Elsewhere() as device:
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            there + torch.ones(3)
        assert device.reads == 0
        assert float((2 * there).sum()) == 6
        assert device.reads == 1
