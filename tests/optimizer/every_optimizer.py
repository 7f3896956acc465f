"""Every optimizer that torch ships, models that suit them, and training with or without wrap()."""

import copy

import pytest
import torch
from torch import nn

import gradsurg
from tests.networks import build, trained, twins

# (class, options), one row per way in which the step's code differs. `fused` where the CPU has it.
DENSE = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "foreach": True}),
    ("Adam", {"lr": 0.01, "fused": True}),
    ("Adam", {"lr": 0.01, "maximize": True}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("Adam", {"lr": torch.tensor(0.01), "fused": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "foreach": False, "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "fused": True}),
    ("NAdam", {"lr": 0.01}),
    ("NAdam", {"lr": 0.01, "foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.01, "foreach": True, "maximize": True}),
    ("Adamax", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01, "foreach": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "fused": True, "lr_decay": 0.1}),
    ("Adadelta", {"lr": 1.0}),
    ("Adadelta", {"lr": 1.0, "foreach": True, "maximize": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "foreach": True}),
    ("Rprop", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01, "foreach": True}),
    ("ASGD", {"lr": 0.01, "t0": 2.0}),
    ("ASGD", {"lr": 0.01, "foreach": True, "weight_decay": 0.1}),
    ("Adafactor", {"lr": 0.01}),
    ("Adafactor", {"lr": 0.01, "foreach": True, "weight_decay": 0.1}),
    ("LBFGS", {"lr": 0.5, "max_iter": 4}),
    ("LBFGS", {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
]
# Optimizers that take only some parameters, with the model that has nothing else.
SPECIAL = [
    ("SparseAdam", {"lr": 0.05}, "sparse"),
    ("SparseAdam", {"lr": 0.05, "maximize": True}, "sparse"),
    ("SGD", {"lr": 0.1}, "sparse"),
    ("Adagrad", {"lr": 0.1}, "sparse"),
    ("Muon", {"lr": 0.02}, "matrices"),
    ("Muon", {"lr": 0.02, "nesterov": False, "weight_decay": 0.0}, "matrices"),
]


def _id(row):
    return " ".join([row[0], *(f"{k}={v}" for k, v in row[1].items() if k != "lr" or torch.is_tensor(v)), *row[2:]])


ROWS = [
    pytest.param(
        *row, id=_id(row), marks=pytest.mark.filterwarnings("ignore:a step of LBFGS evaluates the losses many")
    )
    for row in [*((*r, "heads") for r in DENSE), *SPECIAL]
    if hasattr(torch.optim, row[0])  # Muon came with torch 2.9
]


def make(name, options, model):
    options = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    return getattr(torch.optim, name)(trained(model), **options)


def models(kind, seed=0):
    if kind == "matrices":
        torch.manual_seed(seed)
        model = build("heads", seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
        return model, copy.deepcopy(model)
    return twins(kind, seed)


def train(optimizer, model, losses, batches, clip=None):
    """Train with total(losses), or with the only loss where the optimizer is plain."""
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            given = losses(model, batch)
            if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
                total = optimizer.total(given)
            else:
                (total,) = given.values()
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return total

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def one_task(model, batch):
    return {"all": sum(model.losses(batch).values())}


def several(model, batch):
    return model.losses(batch)


def states(optimizer):
    """Optimizer state in the order of the parameters; LBFGS keeps its own under its first parameter."""
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
