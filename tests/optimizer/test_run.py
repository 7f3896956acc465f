"""Run and Step: what one backward and one optimizer step know, and let go."""

import pytest
import torch

from gradsurg import MultiTaskError
from gradsurg.optimizer.run import Run, Step


def losses():
    w = torch.ones(2, requires_grad=True)
    return {"a": w.sum(), "b": None, "c": torch.ones(()), "d": lambda: w.prod()}


def test_absent_tasks_are_those_without_a_loss_that_trains():
    run = Run(losses())
    assert list(run.present) == ["a", "d"]
    assert list(run.tensors) == ["a", "c"]


def test_a_run_of_its_own_may_come_again_and_finishes_at_once():
    run, done = Run(losses()), []
    run.begin(None)
    run.end()
    run.begin(None)
    run.when_done(lambda: done.append("finished"), lambda: done.append("abandoned"))
    assert done == ["finished"]
    assert list(run.losses) == ["a", "b", "c", "d"]


@torch.no_grad()
def test_a_nested_run_lets_its_losses_go_unless_they_are_kept(monkeypatch):
    run = Run(losses(), nested=True)
    monkeypatch.setattr("gradsurg.optimizer.run.graph_is_kept", lambda: True)
    run.begin(torch.ones(()))
    run.end()
    assert run.retain_graph
    assert run.losses
    monkeypatch.setattr("gradsurg.optimizer.run.graph_is_kept", lambda: False)
    run.begin(torch.ones(()))
    run.end()
    assert not run.losses
    with pytest.raises(MultiTaskError, match="a second time"):
        run.begin(torch.ones(()))


def test_a_nested_run_cannot_be_differentiated():
    with pytest.raises(MultiTaskError, match="create_graph=True"):
        Run(losses(), nested=True).begin(torch.ones(()))


def test_a_fresh_step_waits_for_nothing():
    step = Step()
    assert not any((step.losses, step.skipped, step.pending, step.entered, step.stepped, step.unrun))
    assert step.constraint is None
    assert step.next_state is None
