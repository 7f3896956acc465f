"""The loggers: TensorBoard for real; wandb and MLflow, which CI does not install, as recorders that are as strict.

The two were also run by hand against wandb 0.31.0 (offline) and mlflow-skinny 3.17.2 (file store) on 2026-11-24.
"""

import re

import pytest
import torch

import gradsurg
from gradsurg import loggers
from tests.networks import build, trained


@pytest.fixture
def run():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01))
    history = gradsurg.History(optimizer, every=2)

    def steps(*batches):
        for batch in batches:
            optimizer.backward({f"{name} (en)": loss for name, loss in model.losses(batch).items()})
            optimizer.step()

    return history, steps


class Recorder:
    def __init__(self):
        self.seen = {}


class WandbRun(Recorder):
    """Drops what comes for a step below the last, as wandb does, and counts a step a call."""

    def __init__(self):
        super().__init__()
        self.axes, self.step = {}, 0

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        step = self.step if step is None else step
        assert step >= self.step
        assert all(isinstance(value, (int, float)) and value == value for value in data.values())
        self.step = step + 1
        for name, value in data.items():
            self.seen.setdefault(name, []).append((data["gradsurg/step"], value))


class Mlflow(Recorder):
    """Refuses the names that MLflow 2 and 3 both refuse."""

    def log_metrics(self, metrics, step=None, synchronous=None):
        assert all(re.fullmatch(r"[/\w.\- ]+", name) for name in metrics)
        for name, value in metrics.items():
            self.seen.setdefault(name, []).append((step, float(value)))


def expected(history, name):
    return [(report.step, pytest.approx(report.scalars()[name])) for report in history.reports]


def test_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    history, steps = run
    with SummaryWriter(str(tmp_path)) as writer:
        steps(0, 1, 2)
        loggers.tensorboard(history, writer)
        loggers.tensorboard(history, writer)  # nothing new: nothing written twice
        steps(3, 4, 5)
        loggers.tensorboard(history, writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = ["loss/left (en)", "norm/left (en)", "weight/whole (en)", "cos_update/right (en)", "conflict_rate"]
    for name in names:
        written = [(event.step, event.value) for event in events.Scalars(f"gradsurg/{name}")]
        assert written == [(step, pytest.approx(value.expected, abs=1e-6)) for step, value in expected(history, name)]
        assert [step for step, _ in written] == [0, 2, 4]


def test_wandb(run):
    history, steps = run
    logger = WandbRun()
    steps(0, 1, 2)
    loggers.wandb(history, logger)
    logger.log({"mine": 1.0, "gradsurg/step": 2})
    steps(3, 4)
    loggers.wandb(history, logger)
    assert logger.axes["gradsurg/*"] == "gradsurg/step"
    assert logger.seen["gradsurg/weight/left (en)"] == expected(history, "weight/left (en)")


def test_mlflow(run):
    history, steps = run
    logger = Mlflow()
    steps(0, 1, 2)
    loggers.mlflow(history, logger)
    loggers.mlflow(history, logger)
    assert logger.seen["gradsurg/weight/left _en_"] == expected(history, "weight/left (en)")
    assert logger.seen["gradsurg/conflict_rate"] == expected(history, "conflict_rate")


@pytest.mark.parametrize("logger", [loggers.tensorboard, loggers.mlflow])
def test_what_is_no_history_is_refused(run, logger):
    with pytest.raises(TypeError, match=r"is a Mlflow: pass a gradsurg\.History, then the logger"):
        logger(Mlflow(), run)


def test_numbers_that_are_not_there_are_left_out():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([a, b], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    optimizer.total({"a": a.sum(), "b": b.sum()}).backward()
    optimizer.step()
    logger = Mlflow()
    loggers.mlflow(history, logger)
    assert "gradsurg/loss/a" in logger.seen
    assert "gradsurg/norm/a" not in logger.seen
