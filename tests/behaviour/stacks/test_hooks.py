"""Hooks, checkpoints and unusual graphs: what may run inside a task's backward pass, and what is refused."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from tests.networks import build, data, equal_weights, reference_rows, rows_of, run_backward, same, trained, twins


def wrapped(model, **options):
    return gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.1), **options)


def step_in_backward(parameters):
    """The recipe of PyTorch's tutorial: one optimizer a parameter, stepped by a hook, so that no gradient is kept."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in parameters}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    return [p.register_post_accumulate_grad_hook(hook) for p in parameters]


@pytest.mark.parametrize("way", ["total", "backward", "task"])
@pytest.mark.parametrize("where", ["trunk", "heads", "last"])
def test_an_optimizer_in_the_backward_pass_is_refused_with_reason(way, where):
    model = build()
    optimizer = wrapped(model)
    hooked = {"trunk": model.trunk, "heads": model.heads, "last": model.heads["whole"]}[where]
    handles = step_in_backward(list(hooked.parameters()))
    with pytest.raises(MultiTaskError, match="Remove the hook and call step"):
        run_backward(way, optimizer, model.losses(0))
    for handle in handles:
        handle.remove()
    other = build()
    other.load_state_dict(model.state_dict())
    reference = wrapped(other)
    for o, m in [(optimizer, model), (reference, other)]:  # and nothing is left of it
        o.zero_grad()
        run_backward(way, o, m.losses(1))
        o.step()
    assert equal_weights(model, other)


def test_hooks_that_only_look_are_counted_as_documented():
    # Once a task that reaches the parameter: three for the trunk, one for a head; module hooks likewise.
    model = build()
    optimizer = wrapped(model)
    calls = {"tensor": 0, "accumulated": 0, "module": 0, "head": 0}

    def count(key):
        calls[key] += 1

    model.trunk[0].weight.register_hook(lambda _: count("tensor"))
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda _: count("accumulated"))
    model.trunk[2].register_full_backward_hook(lambda *_: count("module"))
    model.heads["left"].weight.register_hook(lambda _: count("head"))
    optimizer.total(model.losses(0)).backward()
    optimizer.step()
    assert calls == {"tensor": 3, "accumulated": 3, "module": 3, "head": 1}


class Twice(torch.autograd.Function):
    """A function of one's own, of the old kind: without setup_context and vmap, which batched backward passes need."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class Unusual(nn.Module):
    """What batched per-task gradients (functorch's vmap) cannot take: a recurrent cell, a function of one's own, ..."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in ("left", "right")})

    def losses(self, batch):
        z, _ = self.cell(data(batch, 8, 5, 3))
        z = Twice.apply(self.norm(z[:, -1]))
        z.relu_()  # ... an operation in place, and a retained gradient
        z.retain_grad()
        return {name: (head(z) - i).square().mean() for i, (name, head) in enumerate(self.heads.items())}


@pytest.mark.parametrize("way", ["total", "backward", "task"])
def test_graphs_that_batched_gradients_cannot_take(way):
    torch.manual_seed(0)
    model, other = Unusual(), Unusual()
    other.load_state_dict(model.state_dict())
    optimizer = wrapped(model)
    run_backward(way, optimizer, model.losses(0))
    assert same(rows_of(optimizer), reference_rows(other.losses(0), trained(other)))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings(r"ignore:Error detected in \w+Backward:UserWarning")
def test_anomaly_mode_names_the_function_behind_a_nan():
    model, _ = twins()
    optimizer = wrapped(model)
    losses = model.losses(0)
    losses["right"] = losses["right"] + (model.trunk[0].weight.sum() * 0 - 1).sqrt()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="SqrtBackward0"):
        optimizer.total(losses).backward()
    assert all(p.grad is None for p in model.parameters())
