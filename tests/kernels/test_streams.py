"""Which stream and which device are asked, told by a torch.cuda that only takes notes."""

from collections import OrderedDict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from gradsurg.guarantee.movement import DeferredMovement, catch_up, stream_of
from gradsurg.linalg.kernels import table
from gradsurg.optimizer.report import DeferredReport, Report

CARD = torch.device("cuda:1")


@pytest.fixture
def card(monkeypatch):
    """Two cards, the first of which is current; on the second, a stream is being captured."""
    current, waited = [torch.device("cuda:0")], []

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    def current_stream(device):
        return SimpleNamespace(device=device, cuda_stream=7, wait_stream=waited.append)

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == CARD)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(table, "_captured", [])
    return waited


def test_a_capture_on_a_card_that_is_not_current_is_noticed(card):
    first, second = ([], [])
    assert table._cached("addresses", CARD, lambda: first, fleeting=True) is first
    assert table._cached("addresses", CARD, lambda: second, fleeting=True) is second
    assert table._captured == [first, second]


def test_a_capture_takes_the_items_that_other_streams_uploaded(card, monkeypatch):
    """The stream of a capture is a new one; items made again for every graph would use up the reserve."""
    items, addresses, others = [1], [2], [3]
    monkeypatch.setattr(table, "_tables", OrderedDict({("items", 3): items, ("addresses", 3): addresses}))
    assert table._cached("items", CARD, lambda: others) is items
    assert table._cached("addresses", CARD, lambda: others, fleeting=True) is others
    assert table._captured == [items, others]


def test_a_report_waits_for_the_streams_that_it_was_made_on(card):
    streams = [stream_of(CARD), stream_of(CARD)]
    catch_up(streams[0])
    assert card == streams[:1]
    numbers = torch.ones(1, 2), torch.ones(1), torch.tensor([True]), torch.tensor([False])
    movements = tuple(DeferredMovement(*numbers, stream) for stream in streams)
    report = DeferredReport(0, lambda: Report(0, (), {}, *[torch.ones(())] * 5), movements).read()
    assert report.movement.inner.tolist() == [2.0, 2.0]
    assert card == [streams[0], *streams]


def test_on_the_cpu_there_are_none():
    assert stream_of(torch.device("cpu")) is None
    catch_up(None)
