"""A loss that is NaN or infinite takes its task out of the step, under every normaliser and in every way of passing."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.normalize import NORMALIZERS, PriorLoss

BAD = [float("nan"), float("inf"), float("-inf")]
PRIORS = PriorLoss({"a": 1.0, "b": 2.0, "c": 1.0})
ALL = {name: PRIORS if name == "prior_loss" else kind() for name, kind in NORMALIZERS.items()}


def build(**options):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6))
    return w, gradsurg.wrap(torch.optim.SGD([w], lr=0.05), **options)


def losses(w, k=0):
    return {
        "a": (w - 2 - k).square().sum(),
        "b": (w[:4] + 1).square().sum(),
        "c": 3 * (w[2:] - 3).square().sum() + 1,
    }


def steps(w, optimizer, change):
    for k in range(3):
        optimizer.zero_grad()
        given = losses(w, k)
        if k == 1:
            change(given)
        optimizer.backward(given)
        optimizer.step()
    return w.detach().clone()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("gradient", ["zero", "finite", "not finite"])
@pytest.mark.parametrize("normalize", ALL.values(), ids=ALL)
def test_a_loss_that_is_not_finite_is_absent(normalize, gradient, value):
    def spoil(given):
        part = {"zero": 0 * given["b"], "finite": given["b"], "not finite": given["b"] * value}[gradient]
        given["b"] = part + value

    options = {"normalize": normalize, "nonfinite": "skip_task"}
    w, optimizer = build(**options)
    found = steps(w, optimizer, spoil)
    assert found.isfinite().all()
    assert torch.equal(found, steps(*build(**options), lambda given: given.pop("b")))
    assert optimizer.state_dict()["param_groups"][0]["gradsurg"]["skipped"] == {"b": 1}


@pytest.mark.parametrize("options", [{"batched": True}, {"rotate": 2}, {"refresh_every": 2}], ids=str)
@pytest.mark.parametrize("normalize", ["norm", "dwa"])
def test_in_every_way_of_passing(options, normalize):
    def spoil(given):
        for name in names:
            given[name] = 0 * given[name] + float("nan")

    for names in ("a", "b", "c", "ab"):
        w, optimizer = build(normalize=normalize, nonfinite="skip_task", **options)
        assert steps(w, optimizer, spoil).isfinite().all()
        assert optimizer.state_dict()["param_groups"][0]["gradsurg"]["skipped"] == dict.fromkeys(names, 1)


def test_on_features():
    w, optimizer = build(nonfinite="skip_task")
    h = w * 2
    optimizer.total({"a": h.square().sum(), "b": 0 * h.sum() + float("nan")}, features=h).backward()
    (wanted,) = torch.autograd.grad((2 * w).square().sum(), w)
    assert torch.allclose(w.grad, wanted)
    assert optimizer.report.nonfinite == ("b",)


def test_raise_names_the_task_before_anything_moves():
    w, optimizer = build(nonfinite="raise")
    given = losses(w)
    given["b"] = 0 * given["b"] + float("nan")
    with pytest.raises(MultiTaskError, match=r"losses or gradients of 'b' are not finite"):
        optimizer.backward(given)
    assert w.grad is None
    optimizer.backward(losses(w))
    optimizer.step()


def test_a_task_that_is_skipped_in_one_micro_batch_keeps_the_loss_of_another():
    w, optimizer = build(normalize="loss", nonfinite="skip_task")
    first = losses(w)
    optimizer.backward(first)
    second = losses(w)
    second["b"] = second["b"] * float("nan")
    optimizer.backward(second)
    assert float(optimizer.report.losses["b"]) == first["b"].item()
    optimizer.step()
    assert w.isfinite().all()


def test_micro_batches_need_not_have_all_tasks():
    # Scales by the losses: each task's is the last one of this step that it had.
    w, optimizer = build(normalize="loss", surgery="sum", guarantee="none")
    optimizer.backward({name: losses(w)[name] for name in "ab"})
    optimizer.backward({"b": losses(w, 1)["b"]})
    assert set(optimizer.report.losses) == {"a", "b"}
    ratio = optimizer.report.scales[0][0] / optimizer.report.scales[0][1]
    assert float(ratio) == pytest.approx(losses(w)["b"].item() / losses(w)["a"].item(), rel=1e-5)


def test_two_totals_of_one_backward_pass_have_the_losses_of_both():
    w, optimizer = build(normalize="dwa")
    given = losses(w)
    (optimizer.total({"a": given.pop("a")}) + optimizer.total(given)).backward()
    assert set(optimizer.report.losses) == {"a", "b", "c"}


def test_losses_of_rows_that_were_zeroed_are_forgotten():
    w, optimizer = build()
    optimizer.backward(losses(w))
    w.grad.zero_()
    optimizer.backward({name: losses(w)[name] for name in "ab"})
    assert set(optimizer.report.losses) == {"a", "b"}
