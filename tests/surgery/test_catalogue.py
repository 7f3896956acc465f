"""The list of methods says what is there, and every name in it works."""

import torch

import gradsurg
from gradsurg.normalize import NORMALIZERS
from gradsurg.surgery import SURGERIES
from tests.networks import build


def test_every_registered_method_is_listed_once():
    listed = [(method.kind, method.name) for method in gradsurg.methods()]
    assert listed == [("surgery", name) for name in SURGERIES] + [("normalizer", name) for name in NORMALIZERS]


def test_every_method_is_described_in_one_line():
    for method in gradsurg.methods():
        assert method.paper
        assert method.promise
        assert "\n" not in method.promise
        assert len(method.promise) <= 160


def test_options_are_those_of_the_class():
    for name, cls in SURGERIES.items():
        (method,) = (m for m in gradsurg.methods() if m.kind == "surgery" and m.name == name)
        assert cls(**method.options) == cls()


def test_every_surgery_works_in_wrap():
    for name in SURGERIES:
        model = build("heads")
        optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=1e-2), surgery=name, seed=1)
        for batch in range(3):
            optimizer.zero_grad()
            optimizer.total(model.losses(batch)).backward()
            optimizer.step()
            assert optimizer.report.update_cosines.min() >= -1e-4, name
