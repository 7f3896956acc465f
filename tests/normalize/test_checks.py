"""What normalisers refuse: losses and options they cannot use, and the next step after it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gradsurg
from gradsurg.normalize import (
    DWA,
    FAMO,
    IMTLL,
    STCH,
    GeneralizedMean,
    GradNorm,
    InitialLoss,
    LogVariances,
    Norm,
    PriorLoss,
    Tchebycheff,
    Uncertainty,
)
from tests.matrices import draw
from tests.networks import TASKS, build, equal_weights, same, twins
from tests.normalize.normalizers import ALL, NEED_LOSSES, NEED_POSITIVE, state_of, train, wrapped


@pytest.mark.parametrize(
    ("wrong", "way"), [(0.0, "total"), (-1.5, "backward"), (math.nan, "total"), (math.inf, "backward")]
)
@pytest.mark.parametrize("name", NEED_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused_and_the_next_step_works(name, wrong, way):
    if name not in NEED_POSITIVE and math.isfinite(wrong):
        return
    model, twin = twins()
    optimizer, undisturbed = wrapped(model, ALL[name]), wrapped(twin, ALL[name])
    for each, its in ((model, optimizer), (twin, undisturbed)):
        train(each, its, range(2))
        its.total(each.losses(2)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    before = copy.deepcopy(optimizer.param_groups[0]["gradsurg"])
    losses = model.losses(3)
    # The value is wrong, the gradient is not: nothing but the normaliser can notice.
    losses["right"] = losses["right"] - losses["right"].detach() + wrong
    run = optimizer.total(losses).backward if way == "total" else lambda: optimizer.backward(losses)
    with pytest.raises(ValueError, match=rf"normalize='{name}': the loss of task 'right' is {wrong!r}") as caught:
        run()
    if math.isfinite(wrong):
        assert "needs a positive one" in str(caught.value)
        assert "normalize='norm'" in str(caught.value)
    assert same([p.grad for p in model.parameters()], gradients)
    assert same(optimizer.param_groups[0]["gradsurg"], before)
    train(model, optimizer, range(4, 6))
    train(twin, undisturbed, range(4, 6))
    assert equal_weights(model, twin)
    assert same(state_of(optimizer), state_of(undisturbed))


@pytest.mark.parametrize("name", ["tchebycheff", "stch"])
def test_the_others_take_negative_losses(name):
    J = draw("random", 3, 8, 0)
    losses = torch.tensor([-3.0, -1.0, 0.0], dtype=torch.float64)
    weights = gradsurg.weights(J @ J.T, "sum", normalize=name, losses=losses)
    assert int(weights.argmax()) == 2


@pytest.mark.parametrize("name", NEED_LOSSES)
def test_gradients_without_losses_are_refused_and_the_next_step_works(name):
    model = build("all shared")
    optimizer = wrapped(model, ALL[name])
    rows = {task: [torch.ones_like(p) for p in model.parameters()] for task in TASKS}
    with pytest.raises(
        ValueError, match=rf"normalize='{name}' reads the values of the losses.*'right'.*total\(losses\)"
    ):
        optimizer.set_gradients(rows)
    assert all(p.grad is None for p in model.parameters())
    with optimizer.task("left"):
        model.losses(0)["left"].backward()
    alone = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="reads the values of the losses"), optimizer.task("right"):
        model.losses(0)["right"].backward()
    assert same([p.grad for p in model.parameters()], alone)
    with pytest.raises(ValueError, match=r"losses= in gradsurg\.weights"):
        gradsurg.weights(torch.eye(3), normalize=ALL[name])
    train(model, optimizer, range(2))
    assert optimizer.report.tasks == TASKS


@pytest.mark.parametrize("name", NEED_LOSSES)
def test_losses_of_the_wrong_number_are_refused(name):
    normalizer = ALL[name]
    with pytest.raises(ValueError, match=r"losses has shape \(2,\): pass one number per task, 3"):
        gradsurg.weights(torch.eye(3), normalize=normalizer, losses=torch.ones(2))


def test_prior_loss_without_a_value():
    model = build()
    optimizer = wrapped(model, PriorLoss({"left": 1.0}))
    with pytest.raises(ValueError, match=r"no value for task 'right' \(given: \['left'\]\).*class_entropy"):
        optimizer.total(model.losses(0)).backward()
    assert all(p.grad is None for p in model.parameters())


WRONG_OPTIONS = [
    (lambda: Norm(smoothing=1.0), r"Norm\(smoothing\)=1.0: pass a finite number, at least 0, below 1"),
    (lambda: Norm(smoothing=-0.1), "smoothing"),
    (lambda: Norm(smoothing="0.9"), "smoothing"),
    (lambda: InitialLoss(steps=0), r"steps\)=0: .*at least 1"),
    (lambda: InitialLoss(steps=2.5), "whole number"),
    (lambda: PriorLoss({"a": 0.0}), r"PriorLoss\(values\)\['a'\]=0.0: .*above 0"),
    (lambda: PriorLoss({"a": math.nan}), "above 0"),
    (lambda: PriorLoss({1: 1.0}), "keys are task names"),
    (lambda: PriorLoss([1.0]), "dict from task name"),
    (lambda: GeneralizedMean(math.nan), "gamma"),
    (lambda: GeneralizedMean(math.inf), "gamma"),
    (lambda: DWA(temperature=0), "temperature.*above 0"),
    (lambda: DWA(period=0), "period"),
    (lambda: DWA(period=1.5), "whole number"),
    (lambda: Uncertainty(rate=0), "rate"),
    (lambda: Uncertainty(classification="left"), "list of strings"),
    (lambda: GradNorm(alpha=-1), "alpha.*at least 0"),
    (lambda: GradNorm(rate=math.inf), "rate"),
    (lambda: FAMO(rate=-1), "rate"),
    (lambda: FAMO(decay=-1), "decay"),
    (lambda: IMTLL(rate=0), "rate"),
    (lambda: STCH(mu=0), "mu.*above 0"),
    (lambda: STCH(ideal={"a": math.inf}), "ideal"),
    (lambda: Tchebycheff(ideal=3), "dict from task name"),
    (lambda: LogVariances(["a", "a"]), "different task names"),
    (lambda: LogVariances(["a"], classification=["b"]), "names 'b', but the tasks are"),
]


@pytest.mark.parametrize(("make", "message"), WRONG_OPTIONS)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
