"""Every normaliser with options under which it remembers something, and training with it."""

from __future__ import annotations

import torch

import gradsurg
from gradsurg.normalize import DWA, FAMO, IMTLL, NORMALIZERS, GradNorm, InitialLoss, Norm, PriorLoss, Uncertainty
from tests.networks import TASKS

PRIORS = PriorLoss({"left": 1.0, "right": 5.0, "whole": 0.2})
STATEFUL = {
    "norm": Norm(smoothing=0.8),
    "initial_loss": InitialLoss(steps=6),
    "dwa": DWA(period=2),
    "uncertainty": Uncertainty(rate=0.1, classification=("left",)),
    "gradnorm": GradNorm(rate=0.1),
    "famo": FAMO(rate=0.1),
    "imtl_l": IMTLL(rate=0.1),
}
ALL = {name: STATEFUL.get(name, PRIORS if name == "prior_loss" else kind()) for name, kind in NORMALIZERS.items()}
NEED_POSITIVE = ["loss", "initial_loss", "generalized_mean", "dwa", "uncertainty", "gradnorm", "famo", "imtl_l"]
NEED_LOSSES = [*NEED_POSITIVE, "tchebycheff", "stch"]
ONES = torch.ones(3, dtype=torch.float64)


def wrapped(model, normalizer, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return gradsurg.wrap(optimizer, normalize=normalizer, surgery="pcgrad", **options)


def train(model, optimizer, batches, tasks=lambda batch: TASKS):
    for batch in batches:
        optimizer.zero_grad()
        losses = model.losses(batch)
        optimizer.total({name: losses[name] for name in tasks(batch)}).backward()
        optimizer.step()


def state_of(optimizer):
    return optimizer.param_groups[0]["gradsurg"]["state"]["normalize"]


def is_plain(value):
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if type(value) is list else type(value) in (int, float, str)


def some_tasks(batch):
    """All, or all but one: tasks come and go."""
    return [name for i, name in enumerate(TASKS) if i != batch % 5]
