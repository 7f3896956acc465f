"""features=: weights from the gradients of a shared representation, and one backward pass before it."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from tests.networks import data, equal_weights, same
from tests.optimizer.cheap.feature_networks import Bypass, build, by_hand, close, gradients, wrapped


@given(seed=st.integers(0, 1000), surgery=st.sampled_from(["cone", "upgrad", "mgda", "sum"]))
def test_the_trunk_gets_what_surgery_on_the_features_makes(seed, surgery):
    model = build(seed)
    expected = by_hand(model, seed, surgery=surgery, guarantee="gradient")
    optimizer = wrapped(model, surgery=surgery)
    optimizer.total(model(seed), features=model.h).backward()
    assert close(gradients(model), expected)
    n = len(list(model.trunk.parameters()))
    assert same(gradients(model)[n:], expected[n:])  # heads: to the bit
    assert optimizer.report.level == "features"
    assert optimizer.report.direction_cosines.min() >= -1e-4
    assert "features" in str(optimizer.report)


@pytest.mark.parametrize("surgery", ["graddrop", "pcgrad"])
def test_total_and_backward_are_the_same(surgery):
    one, other = build(), build()
    a, b = wrapped(one, torch.optim.Adam, surgery=surgery), wrapped(other, torch.optim.Adam, surgery=surgery)
    for batch in range(3):
        a.zero_grad()
        b.zero_grad()
        a.total(one(batch), features=one.h).backward()
        gradsurg.backward(b, other(batch), features=[other.h])
        a.step()
        b.step()
    assert equal_weights(one, other)


def test_one_task_is_the_plain_optimizer_to_the_bit():
    model, plain = build(tasks=("left",)), build(tasks=("left",))
    optimizer, reference = wrapped(model, torch.optim.AdamW), torch.optim.AdamW(plain.parameters(), lr=0.1)
    for batch in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        optimizer.total(model(batch), features=model.h).backward()
        plain(batch)["left"].backward()
        optimizer.step()
        reference.step()
    assert equal_weights(model, plain)


def test_one_pass_before_the_features_whatever_the_number_of_tasks():
    model = build()
    passes = []
    model.trunk[0].weight.register_hook(lambda _: passes.append("trunk"))
    model.heads["left"].weight.register_hook(lambda _: passes.append("head"))
    losses = model()
    model.h.grad_fn.register_prehook(lambda _: passes.append("features"))
    wrapped(model).total(losses, features=model.h).backward()
    assert passes == ["head", "features", "trunk"]


def test_leaves_outside_the_optimizer():
    """A head that another optimizer trains: its plain gradient; what lies before the features: the weighted one."""
    model, reference = build(), build()
    inside = [p for p in model.parameters() if p is not model.heads["left"].weight]
    optimizer = gradsurg.wrap(torch.optim.SGD(inside, lr=0.1))
    model.heads["left"].weight.grad = torch.ones_like(model.heads["left"].weight)
    optimizer.total(model(), features=model.h).backward()
    wrapped(reference).total(reference(), features=reference.h).backward()
    reference.heads["left"].weight.grad += 1
    assert close(gradients(model), gradients(reference))


def test_micro_batches_have_their_own_surgery_and_add_up():
    model = build()
    expected = [a + b for a, b in zip(by_hand(model, 0, scale=0.5), by_hand(model, 1, scale=0.5), strict=True)]
    optimizer = wrapped(model)
    with optimizer.accumulate():  # nothing can wait: the graph of a micro-batch is gone with it
        (optimizer.total(model(0), features=model.h) / 2).backward()
    (optimizer.total(model(1), features=model.h) / 2).backward()
    assert close(gradients(model), expected)


def test_a_penalty_beside_it_and_a_plain_loss_are_added_untouched():
    model = build()
    expected = by_hand(model)
    penalty = [torch.zeros_like(g) for g in expected]
    penalty[0] = 3 * 2 * model.trunk[0].weight.detach()
    optimizer = wrapped(model)
    losses = model()
    square = model.trunk[0].weight.square().sum
    (square() + optimizer.total(losses, features=model.h, plain=2 * square())).backward()
    assert close(gradients(model), [a + b for a, b in zip(expected, penalty, strict=True)])


def test_beside_ordinary_rows_in_one_step():
    """Rows that wait are operated on first; both results stand in p.grad, and the next step is clean."""
    model = build()
    first = build()
    a = wrapped(first)
    a.total(first(0)).backward()
    expected = [x + y for x, y in zip(gradients(first), by_hand(model, 1), strict=True)]
    optimizer = wrapped(model)
    with optimizer.accumulate():
        optimizer.total(model(0)).backward()
    optimizer.total(model(1), features=model.h).backward()
    assert close(gradients(model), expected)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.total(model(2)).backward()
    assert optimizer.report.level == "gradients"


def test_two_totals_in_one_backward_pass():
    model = build()
    ordinary = build()
    a = wrapped(ordinary)
    a.total(ordinary(0)).backward()
    expected = [x + y for x, y in zip(gradients(ordinary), by_hand(model, 1), strict=True)]
    optimizer = wrapped(model)
    first = optimizer.total(model(0))
    second = optimizer.total(model(1), features=model.h)
    (first + second).backward()
    assert close(gradients(model), expected)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    model, plain = build(), build()
    optimizer, reference = wrapped(model), wrapped(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = model()
    if overflow:
        losses["left"] = losses["left"] * float("inf")
    scaler.scale(optimizer.total(losses, features=model.h)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    if overflow:
        assert equal_weights(model, plain)
        assert scaler.get_scale() == 512
    else:
        reference.total(plain(), features=plain.h).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        assert close([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])


class Pyramid(nn.Module):
    """Features made from one another: the tasks read different ones, and the first reads all."""

    def __init__(self):
        super().__init__()
        self.low, self.middle, self.high = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])

    def forward(self, batch=0):
        a = torch.tanh(self.low(data(batch, 16, 5)))
        b = torch.tanh(self.middle(a))
        c = torch.tanh(self.high(b))
        self.features = [a, b, c]
        reads = {"all": a + b + c, "low": a, "high": c}
        y = data(batch + 1000, 3, 16, 1)
        return {k: (head(z) - t).square().mean() for (k, z), head, t in zip(reads.items(), self.heads, y, strict=True)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_features_made_from_one_another(order):
    """With w = 1 (surgery "sum", no normalisation) the result is the plain gradient: nothing is counted twice."""
    torch.manual_seed(0)
    model = Pyramid()
    optimizer = wrapped(model, surgery="sum", normalize="none", guarantee="none")
    expected = torch.autograd.grad(sum(model().values()), list(model.parameters()))
    losses = model()
    optimizer.total(losses, features=[model.features[i] for i in order]).backward()
    assert close([p.grad for p in model.parameters()], expected)
    G = optimizer.report.gramian
    assert G[1, 2] == 0  # "low" and "high" read different features, although one is made from the other
    assert G[0, 1] != 0


def test_what_is_reached_past_the_features_takes_the_same_weights():
    torch.manual_seed(0)
    model = Bypass()
    optimizer = wrapped(model)
    losses = model()
    rows = {
        k: torch.autograd.grad(v, list(model.parameters()), retain_graph=True, allow_unused=True)
        for k, v in losses.items()
    }
    optimizer.total(losses, features=model.h).backward()
    weights = dict(zip(optimizer.report.tasks, optimizer.report.weights[0].tolist(), strict=True))
    shared = {id(p) for p in [*model.trunk.parameters(), *model.decoder.parameters()]}
    for k, p in enumerate(model.parameters()):
        terms = [
            (weights[name] if id(p) in shared else 1.0) * row[k] for name, row in rows.items() if row[k] is not None
        ]
        assert torch.allclose(p.grad, sum(terms), rtol=1e-5, atol=1e-6)


def test_a_task_with_parameters_of_its_own_only():
    model = build()
    alone = nn.Linear(2, 1)
    optimizer = gradsurg.wrap(torch.optim.SGD([*model.parameters(), *alone.parameters()], lr=0.1))
    losses = {**model(), "alone": alone(data(3, 4, 2)).square().mean()}
    expected = torch.autograd.grad(losses["alone"], list(alone.parameters()), retain_graph=True)
    optimizer.total(losses, features=model.h).backward()
    assert same([p.grad for p in alone.parameters()], list(expected))
    assert "alone" not in optimizer.report.tasks


def test_gradients_that_torch_hands_out_expanded():
    """p.grad must be a tensor of its own: clipping writes into it."""
    model = build()
    bias = nn.Parameter(torch.zeros(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([*model.parameters(), bias], lr=0.1))
    losses = model()
    losses["left"] = losses["left"] + bias.sum()
    optimizer.total(losses, features=model.h).backward()
    torch.nn.utils.clip_grad_norm_([bias], 0.5)
    assert torch.allclose(bias.grad, torch.full((2,), 0.5 / 2**0.5), rtol=1e-4)


def test_preferences_of_a_single_task_and_of_several():
    model, plain = build(tasks=("left",)), build(tasks=("left",))
    optimizer = wrapped(model, preferences={"left": 2.0})
    optimizer.total(model(), features=model.h).backward()
    (2.0 * plain()["left"]).backward()
    assert close(gradients(model), gradients(plain))


def test_checkpointed_trunk_and_heads():
    model = build()
    expected = by_hand(model)
    x, targets = data(0, 16, 5), data(1000, 3, 16, 2)
    h = checkpoint(model.trunk, x.requires_grad_(), use_reentrant=True)
    losses = {
        name: scale * (checkpoint(head, h, use_reentrant=False) - y).square().mean()
        for (name, head), y, scale in zip(model.heads.items(), targets, (1.0, 5.0, 0.2), strict=True)
    }
    wrapped(model).total(losses, features=h).backward()
    assert close(gradients(model), expected)


def test_pairwise_surgery_is_projected_on_the_features():
    """guarantee="update" becomes "gradient" there: pcgrad by itself promises nothing for three tasks."""
    worst = []
    for guarantee in ("none", "update"):
        cosines = []
        for seed in range(20):
            model = build(seed)
            optimizer = gradsurg.wrap(
                torch.optim.SGD(model.parameters(), lr=0.1), surgery="pcgrad", guarantee=guarantee, seed=seed
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.total(model(seed), features=model.h).backward()
            cosines.append(optimizer.report.direction_cosines.min().item())
        worst.append(min(cosines))
    assert worst[1] >= -1e-4


def test_the_features_keep_their_own_grad():
    model = build()
    optimizer = wrapped(model)
    optimizer.total(model(), features=model.h).backward()
    assert not model.h.retains_grad
    losses = model()
    model.h.retain_grad()
    optimizer.total(losses, features=model.h).backward()
    assert model.h.grad.shape == model.h.shape
