"""torch.compile: no path ends in a wrong gradient.

Inductor, whose code overwrites and is cached on disk, runs in processes of its own (compiling.py); what does not depend
on it uses "aot_eager", which traces the same graphs and generates no code.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsurg
from tests.networks import build, data, equal_weights, same, trained, twins

SCENARIOS = Path(__file__).with_name("compiling.py")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(scenario, caches):
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCENARIOS.parents[3]),
        "TORCHINDUCTOR_CACHE_DIR": str(caches),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the pool of compile workers takes longer to start than to compile this
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCENARIOS), scenario], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["ok"]


def test_inductor_with_fresh_caches(tmp_path):
    run("fresh", tmp_path)


def test_inductor_with_caches_that_hold_the_wrong_code(tmp_path):
    run("unprepared", tmp_path)
    run("warm", tmp_path)


def pair(**options):
    model, other = twins()
    return model, other, *(gradsurg.wrap(torch.optim.AdamW(m.parameters(), lr=0.01), **options) for m in (model, other))


def train(optimizer, losses, batch, step=None):
    optimizer.zero_grad()
    optimizer.total(losses(batch)).backward()
    (step or optimizer.step)()


def everything(losses):
    return torch.compile(losses, backend="aot_eager")


def forward_in(model, mode):
    model.train(mode == "train")


@pytest.mark.parametrize("first", ["ours", "plain", "no_grad"])
def test_heads_inside_the_graph_are_each_task_s_own(first):
    # One compiled graph returns zeros for the heads of other tasks; without a look at them, all would be shared.
    gradsurg.prepare_compile()
    model, other, optimizer, reference = pair()
    losses = everything(model.losses)
    if first == "plain":
        sum(losses(7).values()).backward()
    if first == "no_grad":
        with torch.no_grad():
            losses(7)
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.total(losses(batch)).backward()
        reference.zero_grad()
        reference.total(other.losses(batch)).backward()
        rows, wanted = (o._gradsurg.capture.rows for o in (optimizer, reference))
        for name in wanted:
            assert len(rows[name]) == len(wanted[name]) == 6  # four of the trunk, two of its head
        assert same([p.grad for p in trained(model)], [p.grad for p in trained(other)])
        optimizer.step()
        reference.step()
    assert equal_weights(model, other)


def test_what_no_task_reaches_yet_keeps_the_zeros_of_compiled_code():
    # An adapter begins with a factor of zero: the other factor's gradient is zero at first, and plain training sees it.
    gradsurg.prepare_compile()
    down, up = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(3, 4))
    plain_down, plain_up = (torch.nn.Parameter(p.detach().clone()) for p in (down, up))
    optimizer = gradsurg.wrap(torch.optim.AdamW([down, up], lr=0.1, weight_decay=0.1))
    plain = torch.optim.AdamW([plain_down, plain_up], lr=0.1, weight_decay=0.1)

    @torch.compile(backend="aot_eager")
    def losses(down, up):
        z = torch.eye(4) @ down @ up
        return (z[:, 0] - 1).square().mean(), (z[:, 1] + 1).square().mean()

    for step in range(3):
        for o, a, b in [(optimizer, down, up), (plain, plain_down, plain_up)]:
            o.zero_grad()
            left, right = losses(a, b)
            (o.total([left + right]) if o is optimizer else left + right).backward()
            o.step()
        assert torch.equal(down, plain_down), step
        assert torch.equal(up, plain_up), step
    # And both tasks are known to reach both factors from the first number on.
    optimizer.zero_grad()
    optimizer.total(list(losses(down, up))).backward()
    assert len(optimizer._gradsurg.capture.rows.shared([down, up])) == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_compiled_trunk_in_either_mode(mode):
    gradsurg.prepare_compile()
    model, other, optimizer, reference = pair()
    forward_in(model, mode)
    forward_in(other, mode)
    model.trunk.compile(backend="aot_eager")
    for batch in range(2):
        train(optimizer, model.losses, batch)
        train(reference, other.losses, batch)
    assert equal_weights(model, other)


def total_of(model, optimizer, x):
    z = model.trunk(x)
    return optimizer.total({name: (head(z) - i).square().mean() for i, (name, head) in enumerate(model.heads.items())})


@pytest.mark.parametrize("what", ["step", "whole step", "total inside"])
def test_compiled_code_around_ours_leaves_ours_alone(what):
    model, other, optimizer, reference = pair()
    gradsurg.prepare_compile()
    if what == "step":
        compiled_step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
        one = lambda batch: train(optimizer, model.losses, batch, compiled_step)  # noqa: E731
    elif what == "whole step":
        one = torch.compile(lambda batch: train(optimizer, model.losses, batch), backend="aot_eager")
    else:
        total = torch.compile(functools.partial(total_of, model, optimizer), backend="aot_eager")

        def one(batch):
            optimizer.zero_grad()
            total(data(batch, 16, 5)).backward()
            optimizer.step()

    for batch in range(2):
        one(batch)
        if what == "total inside":
            reference.zero_grad()
            total_of(other, reference, data(batch, 16, 5)).backward()
            reference.step()
        else:
            train(reference, other.losses, batch)
    assert optimizer.report.movement is not None
    assert equal_weights(model, other)


@pytest.mark.parametrize("call", ["total", "backward"])
def test_fullgraph_says_where_to_call_it_instead(call):
    model, _, optimizer, _ = pair()
    losses = model.losses(0)
    compiled = torch.compile(lambda: getattr(optimizer, call)(losses), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of it"):
        compiled()


def test_compiled_autograd():
    model, other, optimizer, reference = pair()
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        train(optimizer, model.losses, 0)
    train(reference, other.losses, 0)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] >= 1
    assert equal_weights(model, other)


def test_a_retained_graph_in_a_task_block_is_refused_once_something_compiles():
    # With the switch thrown by hand, torch says nothing, and whether the gradients are right depends on its caches.
    from torch._functorch import config

    model, _, optimizer, _ = pair()
    losses = everything(model.losses)
    with config.patch(donated_buffer=False), torch.compiler.config.patch(cache_key_tag=""):
        kept = losses(0)
        with pytest.raises(gradsurg.MultiTaskError, match="prepare_compile"), optimizer.task("left"):
            kept["left"].backward(retain_graph=True)
        with optimizer.task("left"):  # a graph of its own is no danger
            losses(0)["left"].backward()
    optimizer.step()


def test_without_anything_compiled_a_graph_may_be_retained_in_a_task_block():
    optimizer = gradsurg.wrap(torch.optim.SGD((model := build()).parameters(), lr=0.1))
    from gradsurg.gradients import compile as compiled

    losses = model.losses(0)
    if not compiled.anything_compiled():
        with optimizer.task("left"):
            losses["left"].backward(retain_graph=True)
    assert not any(p._backward_hooks for p in model.parameters())


def test_refresh_every_with_a_compiled_trunk():
    gradsurg.prepare_compile()
    model, other, optimizer, reference = pair(refresh_every=3)
    model.trunk = torch.compile(model.trunk, backend="aot_eager")
    for batch in range(4):
        train(optimizer, model.losses, batch)
        train(reference, other.losses, batch)
        assert optimizer.report.level == reference.report.level
    assert equal_weights(model, other)


def test_refresh_every_refuses_heads_inside_the_graph():
    # One pass would weigh a head's gradient like the trunk's, and in the steps that find weights it is plain.
    gradsurg.prepare_compile()
    model, _, optimizer, _ = pair(refresh_every=3)
    losses = everything(model.losses)
    train(optimizer, losses, 0)
    optimizer.zero_grad()
    given = losses(1)
    with pytest.raises(gradsurg.MultiTaskError, match="compile the shared part and the heads apart"):
        optimizer.backward(given)
    assert all(p.grad is None for p in trained(model))
