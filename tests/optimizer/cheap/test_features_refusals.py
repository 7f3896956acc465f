"""features=: what cannot be done says why, and leaves everything as it was."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from gradsurg import MultiTaskError
from tests.networks import same
from tests.optimizer.cheap.feature_networks import Bypass, build, by_hand, close, gradients, wrapped


def refusals():
    def detached(m, losses):
        return {"losses": losses, "features": m.h.detach()}, ValueError, "detached"

    def leaf(m, losses):
        return {"losses": losses, "features": m.trunk[0].weight}, ValueError, "a leaf"

    def number(m, losses):
        return {"losses": losses, "features": 3}, ValueError, "features=3"

    def nothing(m, losses):
        return {"losses": losses, "features": []}, ValueError, "features="

    def twice(m, losses):
        return {"losses": losses, "features": [m.h, m.h]}, ValueError, "same tensor twice"

    def hook(m, losses):
        m.h.register_hook(lambda g: g)
        return {"losses": losses, "features": m.h}, ValueError, "hook"

    def unrelated(m, losses):
        return {"losses": losses, "features": m.h + 0}, ValueError, "depends on the features"

    def beside(m, losses):
        return {"losses": {**losses, "norm": m.trunk[0].weight.norm()}, "features": m.h}, ValueError, "'norm'"

    def function(m, losses):
        return {"losses": {**losses, "left": lambda: losses["left"]}, "features": m.h}, ValueError, "function"

    def reentrant(m, losses):
        losses["left"] = checkpoint(m.heads["left"], m.h, use_reentrant=True).sum()
        return {"losses": losses, "features": m.h}, MultiTaskError, "use_reentrant=False"

    return [detached, leaf, number, nothing, twice, hook, unrelated, beside, function, reentrant]


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize("case", refusals(), ids=lambda case: case.__name__)
def test_refusals_say_why_and_leave_everything_as_it_was(case, way):
    model = build()
    optimizer = wrapped(model)
    model.trunk[0].weight.grad = torch.ones_like(model.trunk[0].weight)
    arguments, error, match = case(model, model())
    run = optimizer.backward if way == "backward" else lambda **given: optimizer.total(**given).backward()
    with pytest.raises(error, match=match):
        run(**arguments)
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the total above was never run
        optimizer.total(model(), features=model.h).backward()
        assert close(gradients(model), by_hand(model))
        optimizer.step()


def test_with_elementwise_surgery_nothing_may_be_shared_past_the_features():
    torch.manual_seed(0)
    model = Bypass()
    optimizer = wrapped(model, surgery="graddrop")
    losses = model()
    with pytest.raises(ValueError, match="number by number"):
        optimizer.backward(losses, features=model.h)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"rotate": 1}, "rotate"), ({"refresh_every": 2}, "refresh_every"), ({"granularity": "tensor"}, "granularity")],
)
def test_one_cheap_mode_at_a_time(options, match):
    model = build()
    optimizer = wrapped(model, **options)
    losses = model()
    with pytest.raises(ValueError, match=match):
        optimizer.total(losses, features=model.h)


def test_a_loss_that_is_not_finite():
    for policy, tasks in (("skip_task", ("right", "whole")), ("raise", None)):
        model, reference = build(), build()
        optimizer, other = wrapped(model, nonfinite=policy), wrapped(reference)
        losses = model()
        losses["left"] = losses["left"] * float("nan")
        if tasks is None:
            with pytest.raises(MultiTaskError, match="'left'"):
                optimizer.backward(losses, features=model.h)
            assert all(p.grad is None for p in model.parameters())
        else:
            optimizer.backward(losses, features=model.h)
            good = reference()
            other.backward({name: good[name] for name in tasks}, features=reference.h)
            assert same([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])
            assert optimizer.report.nonfinite == ("left",)


def test_the_update_guarantee_is_let_go_and_said_so():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, guarantee="update")
    with pytest.warns(UserWarning, match="guarantee='update'") as caught:
        optimizer.total(model(), features=model.h).backward()
    assert caught[0].filename == __file__
    optimizer.step()
    assert optimizer.report.movement is None
    optimizer.zero_grad()
    optimizer.total(model(1), features=model.h).backward()  # said once


def test_retain_graph_and_a_graph_that_is_used_up():
    model = build()
    optimizer = wrapped(model)
    losses = model()
    optimizer.backward(losses, features=model.h, retain_graph=True)
    once = [g.clone() for g in gradients(model)]
    optimizer.backward(losses, features=model.h)
    assert close(gradients(model), [2 * g for g in once])
    before = [g.clone() for g in gradients(model)]
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses, features=model.h)
    assert same(gradients(model), before)


def trunk_and_reader():
    w, q = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(4.0))
    h = 1 * w
    return w, q, h, {"a": h[0] * q, "b": h[1] * q}


@pytest.mark.parametrize("declared", ["trunk", "all"])
def test_shared_says_what_is_weighted_past_the_features_too(declared):
    w, q, h, losses = trunk_and_reader()
    plain = sum(torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in losses.values())
    optimizer = gradsurg.wrap(
        torch.optim.SGD([w, q], lr=0.1), shared=[w] if declared == "trunk" else [w, q], surgery="mgda", normalize="none"
    )
    optimizer.total(losses, features=h).backward()
    weights = optimizer.report.weights[0]
    expected = plain if declared == "trunk" else (weights * torch.tensor([1.0, 2.0])).sum()
    assert q.grad.item() == pytest.approx(expected.item())


def test_a_trunk_that_shared_leaves_out_is_refused():
    w, q, h, losses = trunk_and_reader()
    optimizer = gradsurg.wrap(torch.optim.SGD([w, q], lr=0.1), shared=[q])
    with pytest.raises(MultiTaskError, match="before the features are not in shared="):
        optimizer.total(losses, features=h).backward()
    assert w.grad is None
    assert q.grad is None
