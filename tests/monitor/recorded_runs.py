"""Short runs with a history attached, and what was recorded as plain values."""

import csv

import torch

import gradsurg
from gradsurg.monitor.files import to_json
from tests.networks import build, trained


def attached(every=1, **options):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), **options)
    return model, optimizer, gradsurg.History(optimizer, every=every)


def do(model, optimizer, *batches, without=()):
    for batch in batches:
        losses = {name: loss for name, loss in model.losses(batch).items() if name not in without}
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        optimizer.step()


def as_values(report):
    """The report's fields with everything as CPU tensors and numbers, to compare to the bit."""
    return {**to_json(report), "losses": {name: loss.double() for name, loss in report.losses.items()}}


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
