"""Optimizers whose step can be watched, and made to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.behaviour.failures import Mine

# How the next step of any Fragile fails: "at once", or "half way", with only the first parameter group moved.
FAILING: list[str] = []
WATCHERS: list[Callable[[torch.optim.Optimizer], None]] = []


class Fragile(torch.optim.Optimizer):
    """The first base of optimizers whose step can be made to fail, and that tell with which p.grad they step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for watcher in WATCHERS:
            watcher(self)
        if not FAILING:
            super().step()
            return value
        if FAILING[0] == "half way":
            groups, self.param_groups = self.param_groups, self.param_groups[:1]
            try:
                super().step()
            finally:
                self.param_groups = groups
        raise Mine("in step")
