"""A run is reproducible, and its count of conflicts is right where the answer is known."""

import pytest
import torch

from benchmarks.quality import train
from benchmarks.quality.problems import problem
from benchmarks.quality.runner import attempt
from benchmarks.quality.search import Trial, config


def brief(method, seed=0, weights=None, steps=20, name="digits"):
    return {**config(problem(name), method, Trial(1e-2, 0.01, weights), seed), "steps": steps}


def without_time(result):
    return {key: value for key, value in result.items() if key != "cpu_ms"}


@pytest.mark.parametrize("method", ["sum", "default", "pcgrad"])
def test_the_same_configuration_gives_the_same_run(method):
    one, two, other = (train.run(brief(method, seed)) for seed in (0, 0, 1))
    assert without_time(one) == without_time(two) != without_time(other)
    assert len(one["valid"]) == len(one["test"]) == train.CHECKPOINTS
    assert one["cpu_ms"] > 0


def test_weights_of_one_are_the_plain_sum():
    assert without_time(train.run(brief("static", weights=(1.0, 1.0, 1.0)))) == without_time(train.run(brief("sum")))


def test_an_error_of_a_method_is_a_result(monkeypatch):
    def fail(*_):
        raise ValueError("the loss of task 'left' is 0.0")

    monkeypatch.setattr(train, "one_step", fail)
    assert attempt(brief("loss")) == {"valid": [], "test": [], "error": "ValueError: the loss of task 'left' is 0.0"}


class Line(torch.nn.Module):
    """One shared number, a head that two tasks never share."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.tensor([1.0]))


class Tug:
    """Two losses that pull the shared number apart; the first also trains a number of its own."""

    def losses(self, net, parts, tasks):
        return {"a": (net.shared + 100 * net.own).sum(), "b": -net.shared.sum()}


def test_only_what_two_tasks_reach_is_counted():
    net = Line()
    rows, shared = train._rows(Tug(), net, {}, ["a", "b"])
    assert shared == [net.shared]
    assert rows.tolist() == [[1.0], [-1.0]]
    cosines = train._cosines(rows, torch.tensor([1.0], dtype=torch.float64))
    assert cosines.tolist() == [1.0, -1.0]
    assert train._share(torch.stack([cosines, cosines.abs()])) == 0.5


def test_single_task_runs_train_that_task_alone():
    result = train.run(brief("single:left"))
    assert result["gradient"] is None
    assert all(len(look) == 1 for look in result["test"])
