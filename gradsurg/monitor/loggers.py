"""Writing a history to a logger: losses, norms, weights and cosines per task, and the conflict rate.

Each function writes what was recorded since its last call with the same logger: call it once per epoch, for example.
Each call waits for the device once. No logging package is imported here: you hand over the logger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from gradsurg.monitor.history import History

__all__ = ["mlflow", "tensorboard", "wandb"]


def tensorboard(history: History, writer: Any, prefix: str = "gradsurg/") -> None:
    """Write to a torch.utils.tensorboard.SummaryWriter, or anything with its add_scalar.

    Args:
        history: The recorded reports.
        writer: The writer; a Lightning TensorBoardLogger has it as `.experiment`.
        prefix: Before each name, such as "loss/left", "cos_update/left" or "conflict_rate".

    Example:
        >>> import gradsurg
        >>> def after_each_epoch(history, writer):
        ...     gradsurg.loggers.tensorboard(history, writer)
    """
    for step, scalars in _new(history, writer):
        for name, value in scalars.items():
            writer.add_scalar(prefix + name, value, step)


def wandb(history: History, run: Any, prefix: str = "gradsurg/") -> None:
    """Write to a Weights & Biases run: what wandb.init() returned.

    The curves get an x axis of their own, "gradsurg/step". A run drops values that are logged for an earlier step than
    its last one. The entries of a history come late and count as steps, so log your own values without step=, against
    an x axis of their own (define_metric), or give the history a run of its own.

    Args:
        history: The recorded reports.
        run: The run.
        prefix: Before each name; should end in "/".

    Example:
        >>> import gradsurg
        >>> def after_each_epoch(history, run):
        ...     gradsurg.loggers.wandb(history, run)
    """
    axis = f"{prefix}step"
    run.define_metric(axis)
    run.define_metric(f"{prefix}*", step_metric=axis)
    for step, scalars in _new(history, run):
        run.log({axis: step, **{prefix + name: value for name, value in scalars.items()}})


def mlflow(history: History, client: Any, prefix: str = "gradsurg/") -> None:
    """Write to the active MLflow run: pass the module `mlflow`, or anything with its log_metrics.

    Args:
        history: The recorded reports.
        client: The module.
        prefix: Before each name. Characters that MLflow refuses in names become "_".

    Example:
        >>> import gradsurg
        >>> def after_each_epoch(history, mlflow):
        ...     gradsurg.loggers.mlflow(history, mlflow)
    """
    for step, scalars in _new(history, client):
        allowed = {re.sub(r"[^\w\-. /]", "_", prefix + name): value for name, value in scalars.items()}
        client.log_metrics(allowed, step=step)


def _new(history: History, logger: Any) -> Iterator[tuple[int, dict[str, float]]]:
    given: object = history
    if not isinstance(given, History):
        raise TypeError(f"the first argument is a {type(given).__name__}: pass a gradsurg.History, then the logger")
    for report in history.new(logger):
        # NaN means that the step has no such number; in the curve that is a gap and not a value.
        yield report.step, {name: value for name, value in report.scalars().items() if not math.isnan(value)}
