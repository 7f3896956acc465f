"""How gradients come in: four ways, one set of rows, in whatever state torch is."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from tests.gradients.ways import PASSES, WAYS, gradients, wrapped
from tests.networks import (
    MODELS,
    Heads,
    build,
    data,
    equal_weights,
    reference_rows,
    rows_of,
    run_backward,
    same,
    trained,
    twins,
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_equal_autograd_grad_to_the_bit(way, kind):
    model, other = twins(kind)
    optimizer = wrapped(model)
    run_backward(way, optimizer, model.losses(0))
    want = reference_rows(other.losses(0), trained(other))
    assert same(rows_of(optimizer), want)
    assert [g is None for row in want.values() for g in row].count(False) > 2


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("kind", MODELS)
def test_every_way_writes_the_same_gradient(way, kind):
    model, other = twins(kind)
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    run_backward("total", reference, other.losses(0))
    assert same(gradients(model), gradients(other))
    optimizer.step()
    reference.step()
    assert equal_weights(model, other)


@pytest.mark.parametrize("way", WAYS)
def test_task_specific_parameters_get_their_own_gradient_to_the_bit(way):
    model, other = twins()
    model.unused, other.unused = nn.Linear(2, 2), nn.Linear(2, 2)
    run_backward(way, wrapped(model, preferences={"left": 3.0}), model.losses(0))
    for name, loss in other.losses(0).items():
        loss.backward(retain_graph=True)
        head, own = model.heads[name], other.heads[name]
        assert same(gradients(head), gradients(own))
    assert all(p.grad is None for p in model.unused.parameters())
    assert not same(gradients(model.trunk), gradients(other.trunk)), "the tasks agree: nothing was put to the test"


@pytest.mark.parametrize("way", WAYS)
def test_frozen_and_unused_parameters_keep_no_gradient(way):
    model = build("patchy")
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))  # the frozen ones too
    losses = model.losses(0)
    if way == "set_gradients":
        optimizer.set_gradients(reference_rows(losses, trained(model)))
    else:
        run_backward(way, optimizer, losses)
    assert all(p.grad is None for m in (model.frozen, model.unused) for p in m.parameters())
    assert all(p.grad is not None for m in (model.conv, model.heads) for p in m.parameters())
    assert model.conv.weight.grad.stride() == model.conv.weight.stride()
    frozen = [p.clone() for p in model.frozen.parameters()]
    optimizer.step()
    assert same(frozen, list(model.frozen.parameters()))


@pytest.mark.parametrize("way", PASSES)
def test_parameters_outside_the_optimizer_get_the_ordinary_gradient(way):
    model, plain = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.trunk[2].parameters(), lr=0.1))
    for batch in range(2):  # it accumulates, as ordinary gradients do
        run_backward(way, optimizer, model.losses(batch))
        for i, loss in enumerate(plain.losses(batch).values()):
            loss.backward(retain_graph=i < 2)
    assert same(gradients(model.trunk[0]), gradients(plain.trunk[0]))
    assert same(gradients(model.heads), gradients(plain.heads))


@pytest.mark.parametrize("way", PASSES)
def test_dropout_and_other_forward_randomness_is_drawn_once(way):
    model = build()
    model.trunk.insert(1, nn.Dropout(0.5))
    optimizer = wrapped(model)
    losses = model.losses(0)
    want = reference_rows(losses, trained(model))
    run_backward(way, optimizer, losses)
    assert same(rows_of(optimizer), want)


# Inside the outer of two reentrant checkpoints grad mode is off, which the inner one remarks on; it is harmless.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", PASSES)
def test_rows_through_nested_checkpoints(way, reentrant):
    model, other = twins()

    def run(m, batch):
        x = data(batch, 16, 5).requires_grad_()  # reentrant checkpoints need an input that does

        def inner(h):
            return checkpoint(m.trunk[2], checkpoint(m.trunk[1], h, use_reentrant=reentrant), use_reentrant=reentrant)

        z = checkpoint(lambda x: inner(m.trunk[0](x)), x, use_reentrant=reentrant)
        return {n: (h(z) - data(i, 16, 2)).square().mean() for i, (n, h) in enumerate(m.heads.items())}

    optimizer = wrapped(model)
    run_backward(way, optimizer, run(model, 0))
    z = other.trunk(data(0, 16, 5))
    want = {n: (h(z) - data(i, 16, 2)).square().mean() for i, (n, h) in enumerate(other.heads.items())}
    assert same(rows_of(optimizer), reference_rows(want, trained(other)))


def test_total_itself_inside_a_reentrant_checkpoint():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    start = torch.zeros((), requires_grad=True)
    checkpoint(lambda s: optimizer.total(model.losses(0)) + 0 * s, start, use_reentrant=True).backward()
    run_backward("backward", reference, other.losses(0))
    assert same(gradients(model), gradients(other))


@pytest.mark.parametrize("way", PASSES)
def test_parameter_hooks_run_once_a_task_and_see_its_gradient(way):
    model, other = twins()
    optimizer, seen, posted = wrapped(model), [], []
    p = model.trunk[0].weight
    p.register_hook(lambda g: seen.append(g.clone()))
    p.register_post_accumulate_grad_hook(lambda q: posted.append(q.grad.clone()))
    run_backward(way, optimizer, model.losses(0))
    want = [row[0] for row in reference_rows(other.losses(0), [other.trunk[0].weight]).values()]
    assert same(seen, want)
    assert same(posted, want)


def test_ways_in_can_be_mixed_within_a_step():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses = model.losses(0)
    optimizer.backward({"left": losses["left"]}, retain_graph=True)
    with optimizer.task("right"):
        losses["right"].backward(retain_graph=True)
    optimizer.total({"whole": losses["whole"]}).backward()
    run_backward("backward", reference, other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    assert same(gradients(model), gradients(other))


@pytest.mark.parametrize("kind", ["heads", "sparse"])
def test_parameters_declared_not_shared_get_the_plain_sum(kind):
    model, other = twins(kind)
    shared = [] if kind == "sparse" else list(model.trunk[0].parameters())
    if kind == "sparse":  # something else must be shared: shared=[] is a mistake
        model.extra = nn.Parameter(torch.ones(3))
        shared = [model.extra]
    optimizer = wrapped(model, shared=shared)
    run_backward("backward", optimizer, model.losses(0))
    for i, loss in enumerate(other.losses(0).values()):
        loss.backward(retain_graph=i < 2)
    want = {n: p.grad for n, p in other.named_parameters()}
    for name, p in model.named_parameters():
        if not any(p is s for s in shared):
            torch.testing.assert_close(p.grad.to_dense(), want[name].to_dense(), rtol=1e-6, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("way", PASSES)
def test_autocast(way):
    model, other = twins()
    optimizer = wrapped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, want = model.losses(0), other.losses(0)
    run_backward(way, optimizer, losses)
    assert same(rows_of(optimizer), reference_rows(want, trained(other)))
    assert not same(rows_of(optimizer), reference_rows(other.losses(0), trained(other))), "autocast did nothing"


def test_anomaly_mode():
    model, other = twins()
    optimizer, calm = wrapped(model), wrapped(other)
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_backward("total", optimizer, model.losses(0))
    run_backward("total", calm, other.losses(0))
    optimizer.step()
    calm.step()
    assert equal_weights(model, other)


def test_rows_are_those_of_the_batch_norm_in_training():
    model = Heads()
    model.trunk.insert(1, nn.BatchNorm1d(7))
    optimizer = wrapped(model)
    run_backward("total", optimizer, model.losses(0))
    assert model.trunk[1].num_batches_tracked == 1  # one forward, however many tasks


# -- L-BFGS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "search"),
    # A line search does not get anywhere on gradients that pile up, so "never" is without one.
    [("optimizer", None), ("model", None), ("never", None), ("optimizer", "strong_wolfe"), ("model", "strong_wolfe")],
)
def test_a_step_of_lbfgs_is_that_of_one_weighted_sum(zero, search):
    """Value and gradient of every evaluation belong to the weights of the first: a line search relies on it."""
    model = build("all shared")
    options = {"lr": 0.5, "max_iter": 5, "line_search_fn": search}
    optimizer = gradsurg.wrap(torch.optim.LBFGS(model.parameters(), **options), guarantee="gradient")
    plain = build("all shared")
    reference = torch.optim.LBFGS(plain.parameters(), **options)
    evaluations = []
    for batch in range(4):
        before = [p.detach().clone() for p in trained(model)]
        values = []

        def closure(batch=batch, values=values):
            if zero != "never":  # without it gradients pile up from one evaluation to the next, the rows must not
                (optimizer if zero == "optimizer" else model).zero_grad()
            total = optimizer.total(model.losses(batch))
            total.backward()
            evaluations.append(batch)
            values.append(total.detach())
            return total

        returned = optimizer.step(closure)
        assert returned.detach() == values[0]  # what the closure returned, not what the line search was given
        assert any(not torch.equal(b, p) for b, p in zip(before, trained(model), strict=True))
        weights = optimizer.report.weights[0] * len(optimizer.report.tasks) / optimizer.report.weights[0].sum()

        def weighted(batch=batch, weights=weights):
            if zero != "never":
                reference.zero_grad()
            losses = plain.losses(batch)
            total = sum(float(w) * losses[name] for w, name in zip(weights, optimizer.report.tasks, strict=True))
            total.backward()
            return total

        reference.step(weighted)
        if zero != "never":
            for p, q in zip(trained(model), trained(plain), strict=True):
                assert (p - q).abs().max() <= 2e-3 * q.abs().max()  # float32 sums in another order, through 20 steps
    assert len(evaluations) > 8, "one evaluation a step would prove nothing"
