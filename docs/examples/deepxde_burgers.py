"""DeepXDE with its losses apart: Burgers' equation as in DeepXDE's own example, trained by a wrapped optimizer.

DeepXDE adds up the losses inside its train_step. It takes any torch optimizer, and lets train_step be replaced: a few
lines hand the losses over by name. Geometry, points, network, callbacks, saving and plots stay DeepXDE's.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("DDE_BACKEND", "pytorch")  # before the import

import deepxde as dde
import numpy as np
import torch
from torch import Tensor

import gradsurg

NAMES = ("equation", "boundary", "start")


def burgers(inside: int) -> Any:
    """Return DeepXDE's description of the problem: the equation and two conditions, so three losses."""

    def equation(x: Tensor, u: Tensor) -> Tensor:
        u_x, u_t = dde.grad.jacobian(u, x, i=0, j=0), dde.grad.jacobian(u, x, i=0, j=1)
        return u_t + u * u_x - 0.01 / np.pi * dde.grad.hessian(u, x, i=0, j=0)

    area = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))
    boundary = dde.icbc.DirichletBC(area, lambda x: 0, lambda _, on_boundary: on_boundary)
    start = dde.icbc.IC(area, lambda x: -np.sin(np.pi * x[:, 0:1]), lambda _, on_initial: on_initial)
    return dde.data.TimePDE(area, equation, [boundary, start], num_domain=inside, num_boundary=80, num_initial=160)


def losses_apart(model: Any, optimizer: gradsurg.MultiTaskOptimizer, names: tuple[str, ...]) -> None:
    """Let a compiled model hand its losses over by name."""

    def train_step(inputs: Any, targets: Any, _: Any) -> None:
        x = torch.as_tensor(inputs).requires_grad_()
        losses = model.data.losses_train(targets, model.net(x), dde.losses.get("MSE"), x, model)
        optimizer.zero_grad()
        optimizer.total(dict(zip(names, losses, strict=True))).backward()
        optimizer.step()
        dde.grad.clear()  # the derivatives that DeepXDE remembers belong to this step

    model.train_step = train_step


def main() -> None:
    """Train and print the losses by name, as DeepXDE and as the wrapped optimizer see them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--points", type=int, default=2540)
    chosen = parser.parse_args()
    dde.config.set_random_seed(0)
    net = dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")
    optimizer = gradsurg.wrap(torch.optim.Adam(net.parameters(), lr=1e-3))
    model = dde.Model(burgers(chosen.points), net)
    model.compile(optimizer)
    losses_apart(model, optimizer, NAMES)
    history, _ = model.train(iterations=chosen.iterations, display_every=max(chosen.iterations // 4, 1))
    for name, first, last in zip(NAMES, history.loss_train[0], history.loss_train[-1], strict=True):
        print(f"{name}: {first:.2e} -> {last:.2e}")
    print(optimizer.report)


if __name__ == "__main__":
    main()
