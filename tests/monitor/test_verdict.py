"""The verdict: on gradients made to be in a known relation, it says what they are made to be."""

import pytest
import torch

import gradsurg
from gradsurg.monitor.advice import pairs
from gradsurg.monitor.verdict import verdict


def run(rows, steps=12, names="abc", optimizer=torch.optim.SGD, **options):
    """Record steps on the gradients that rows(step) gives, one row a task."""
    w = torch.nn.Parameter(torch.zeros(rows(0).shape[1]))
    wrapped = gradsurg.wrap(optimizer([w], lr=0.1), **options)
    history = gradsurg.History(wrapped, every=1)
    for step in range(steps):
        wrapped.set_gradients({name: [row] for name, row in zip(names, rows(step), strict=False)})
        wrapped.step()
        wrapped.zero_grad()
    return history.reports


def text(reports, heading):
    return " ".join(verdict(reports)[heading])


def test_peace():
    reports = run(lambda _: torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.1]]))
    assert "No two tasks fight" in text(reports, "Which tasks fight")
    assert "Too few conflicts" in text(reports, "When")
    assert "as it was in 100% of the steps" in text(reports, "What the surgery changed")
    assert "get on" in text(reports, "What to try")


def test_who_fights_and_when():
    def rows(step):
        return torch.tensor([[1.0, 0.0], [-0.5 if step >= 8 else 0.5, 1.0], [0.1, 0.1]])

    reports = run(rows)
    (first, *_) = pairs(reports)
    assert first.tasks == ("a", "b")
    assert first.share == pytest.approx(4 / 12)
    assert first.thirds == pytest.approx((0, 0, 1))
    assert "a and b" in text(reports, "Which tasks fight")
    assert "in conflict in 33% of the steps" in text(reports, "Which tasks fight")
    assert "The other 2 pairs hardly conflict." in text(reports, "Which tasks fight")
    assert "a and b: more and more (0% of the first third of the run, 0%, 100%)" in text(reports, "When")


def test_steps_without_cosines_do_not_count_as_peace():
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1e-3), refresh_every=4)
    history = gradsurg.History(optimizer, every=1)
    for _ in range(8):
        optimizer.zero_grad()
        optimizer.total({"a": w[0] + 0.1 * w[1], "b": -w[0] + 0.1 * w[1]}).backward()
        optimizer.step()
    assert [report.level for report in history.reports].count("reused weights") == 6
    (pair,) = pairs(history.reports)
    assert (len(pair.thirds), pair.share) == (2, 1.0)


def test_change_is_that_of_the_sum():
    reports = run(lambda _: torch.tensor([[1.0, 0.0], [-2.0, 1.0]]), normalize="none", names="ab")
    t, u = torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 1.0])
    assert reports[0].change == pytest.approx(float((u - t).norm() / t.norm()))
    assert "changed it by 71% of its length" in text(reports, "What the surgery changed")
    assert "No recorded update raised" in text(reports, "What the surgery changed")


def test_opposition_and_standstill():
    reports = run(lambda _: torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), names="ab")
    advice = text(reports, "What to try")
    assert "a and b want nearly opposite things" in advice
    assert "In 100% of the steps no direction helped every task" in advice


def test_noise():
    generator = torch.Generator().manual_seed(0)
    reports = run(lambda _: torch.randn(2, 4000, generator=generator), steps=30, names="ab")
    assert "noise of the batch" in text(reports, "What to try")


@pytest.mark.parametrize(
    ("normalize", "said"), [("norm", "normalisation evens that out"), ("none", "normalize='norm'")]
)
def test_loudness(normalize, said):
    reports = run(lambda _: torch.tensor([[100.0, 0.0], [0.5, 0.5]]), normalize=normalize, names="ab")
    advice = text(reports, "What to try")
    assert "a is about 141 times as long as that of b" in advice
    assert said in advice


def test_what_nobody_guards_is_said():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
    reports = run(lambda _: rows, guarantee="none", surgery="sum", normalize="none", names="ab")
    assert "was not measured" in text(reports, "What the surgery changed")
    assert "guarantee='update'" in text(reports, "What to try")


def test_hurt_auxiliaries_are_named():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])  # a, and what b adds without hurting a: (1, 1), which hurts b
    reports = run(lambda _: rows, primary="a", auxiliary="help", normalize="none", names="ab")
    assert "still raised, to first order: b (100% of the steps)" in text(reports, "What the surgery changed")


def test_layers_that_conflict_are_named():
    """Four blocks, conflict in one."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    wrapped = gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1), granularity="tensor")
    history = gradsurg.History(wrapped, every=1)
    agree = torch.tensor([[1.0, 0.2], [1.0, 0.1]])
    fight = torch.tensor([[1.0, 0.1], [-1.0, 0.5]])
    for _ in range(6):
        wrapped.set_gradients({name: [agree[k], agree[k], fight[k], agree[k]] for k, name in enumerate(("a", "b"))})
        wrapped.step()
        wrapped.zero_grad()
    assert "A copy of parameter 2 for each task" in text(history.reports, "What to try")


def test_not_finite():
    rows = torch.tensor([[1.0, 0.0], [0.5, 1.0], [float("nan"), 0.0]])
    reports = run(lambda _: rows, nonfinite="skip_task")
    assert "c: NaN or infinite gradients in 12 of 12" in text(reports, "What to try")


def test_nothing_to_judge():
    with pytest.raises(ValueError, match="nothing to judge"):
        verdict([])
    with pytest.raises(ValueError, match="nothing to judge"):
        verdict(run(lambda _: torch.ones(1, 3)))
