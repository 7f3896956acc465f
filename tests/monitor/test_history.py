"""The history: which steps it records, that it holds what the reports said, that it is bounded and copied."""

import copy
import gc
import pickle

import pytest
import torch

import gradsurg
from gradsurg.monitor.files import PackedReport
from tests.monitor.recorded_runs import as_values, attached, do
from tests.networks import build, same


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_it_holds_every_kth_report_as_it_was(granularity):
    model, optimizer, history = attached(every=3, granularity=granularity)
    seen = []
    for batch in range(8):
        do(model, optimizer, batch)
        seen.append(optimizer.report)
    assert [report.step for report in history.reports] == [0, 3, 6]
    for kept, was in zip(history.reports, seen[::3], strict=True):
        assert same(as_values(kept), as_values(was))
        assert same(kept.cosines, was.cosines)
        assert same(kept.update_cosines, was.update_cosines)
        assert kept.scalars() == was.scalars()
        assert str(kept) == str(was)


def test_what_is_kept_is_a_copy():
    losses = torch.tensor([1.0, 2.0])
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    optimizer.backward({"a": (w * losses).sum(), "b": w[0] ** 2})
    optimizer.step()
    optimizer.report.gramian.zero_()
    optimizer.report.losses["a"].zero_()
    (kept,) = history.reports
    assert float(kept.losses["a"]) == 3.0
    assert (kept.norms > 0).all()


def test_tasks_may_come_and_go(tmp_path):
    model, optimizer, history = attached()
    do(model, optimizer, 0)
    do(model, optimizer, 1, without=("left",))
    do(model, optimizer, 2, without=("left", "right"))
    do(model, optimizer, 3)
    expected = [("left", "right", "whole"), ("right", "whole"), ("whole",), ("left", "right", "whole")]
    assert [report.tasks for report in history.reports] == expected
    history.save(tmp_path / "h.jsonl")
    assert [report.tasks for report in gradsurg.History.load(tmp_path / "h.jsonl").reports] == expected


def test_steps_without_surgery_are_not_recorded_again():
    model, optimizer, history = attached()
    do(model, optimizer, 0)
    optimizer.zero_grad()
    sum(model.losses(1).values()).backward()
    optimizer.step()
    assert len(history) == 1


def test_micro_batches_are_one_record():
    model, optimizer, history = attached()
    for batch in range(3):
        optimizer.total(model.losses(batch)).backward()
    optimizer.step()
    assert len(history) == 1


def test_several_optimizers_are_recorded_once_and_complete():
    model = build()
    optimizers = gradsurg.wrap(
        [torch.optim.SGD(model.trunk[0].parameters(), lr=0.1), torch.optim.SGD(model.trunk[2].parameters(), lr=0.1)]
    )
    history = gradsurg.History(optimizers[0], every=1)
    optimizers[0].backward(model.losses(0))
    optimizers[0].step()
    assert len(history) == 0
    optimizers[1].step()
    assert len(history) == 1
    assert same(as_values(history.reports[0]), as_values(optimizers[0].report))


def test_it_sees_through_proxies_and_refuses_bare_optimizers():
    class Proxy:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    _, optimizer, _ = attached()
    assert repr(gradsurg.History(Proxy(optimizer))) == "History of 0 reports, every=10"
    with pytest.raises(TypeError, match=r"gradsurg\.wrap"):
        gradsurg.History(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


@pytest.mark.parametrize(("options", "message"), [({"every": 0}, "every=0"), ({"every": True}, "every=True")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        gradsurg.History(None, **options)
    with pytest.raises(ValueError, match="megabytes"):
        gradsurg.History(None, megabytes=0)
    with pytest.raises(ValueError, match="do a step first"):
        gradsurg.History().record()


def test_memory_is_bounded_and_the_whole_run_stays_in_view():
    model, optimizer, _ = attached()
    do(model, optimizer, 0)
    history = gradsurg.History(megabytes=0.05)
    for step in range(1000):
        history.record(gradsurg.Report(**{**vars(optimizer.report), "step": step}))
    assert sum(PackedReport(report).nbytes for report in history.reports) <= 0.05 * 2**20
    steps = [report.step for report in history.reports]
    assert len(steps) >= 8
    assert steps[0] == 0
    assert steps[-1] >= 900
    assert history.every >= 32


def test_thinned_recording_goes_on_at_the_wider_pace():
    model, optimizer, _ = attached()
    history = gradsurg.History(optimizer, every=1, megabytes=0.02)  # room for eight
    do(model, optimizer, *range(40))
    steps = [report.step for report in history.reports]
    assert history.every >= 4
    assert all(step % history.every == 0 for step in steps)


def test_close_and_deletion_end_it():
    model, optimizer, history = attached()
    do(model, optimizer, 0)
    history.close()
    do(model, optimizer, 1)
    assert len(history) == 1
    history.record()
    assert len(history) == 2
    other = gradsurg.History(optimizer, every=1)
    do(model, optimizer, 2)
    assert len(other) == 1
    del other
    gc.collect()
    do(model, optimizer, 3)


def test_copies_hold_the_reports_and_neither_side_disturbs_the_other():
    model, optimizer, history = attached()
    do(model, optimizer, 0, 1)
    copies = [pickle.loads(pickle.dumps(history)), copy.deepcopy(history)]
    twin = copy.deepcopy(optimizer)  # a hooked optimizer still copies, without the hook
    assert pickle.loads(pickle.dumps(optimizer)).state_dict().keys() == twin.state_dict().keys()
    do(model, optimizer, 2)
    assert len(history) == 3
    for each in copies:
        assert len(each) == 2
        assert all(same(as_values(a), as_values(b)) for a, b in zip(each.reports, history.reports[:2], strict=True))


def test_blocks_are_named_by_the_model_or_the_optimizer():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), granularity="tensor")
    plain, named = gradsurg.History(optimizer, every=1), gradsurg.History(optimizer, every=1, model=model)
    do(model, optimizer, 0)
    assert plain.reports[0].blocks == tuple(f"parameter {k}" for k in range(4))
    assert named.reports[0].blocks == ("trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias")
    optimizer = gradsurg.wrap(torch.optim.SGD(model.named_parameters(), lr=0.1), granularity="tensor")
    do(model, optimizer, 0)
    assert optimizer.report.blocks == named.reports[0].blocks
    groups = [{"params": list(part.parameters())} for part in (model.heads, model.trunk[0], model.trunk[2])]
    optimizer = gradsurg.wrap(torch.optim.SGD(groups, lr=0.1), granularity="group")
    do(model, optimizer, 0)
    assert optimizer.report.blocks == ("group 1", "group 2")


def test_a_reader_gets_each_report_once():
    class Reader:
        pass

    model, optimizer, history = attached()
    one, two = Reader(), Reader()
    do(model, optimizer, 0, 1)
    assert [report.step for report in history.new(one)] == [0, 1]
    do(model, optimizer, 2)
    assert [report.step for report in history.new(one)] == [2]
    assert [report.step for report in history.new(two)] == [0, 1, 2]
    assert history.new(one) == []


def test_recording_reads_nothing_off_the_device():
    """The meta device stands in for a GPU: it runs everything, and whatever reads a number off it raises."""
    model, optimizer, _ = attached()
    do(model, optimizer, 0)
    report = optimizer.report
    elsewhere = {name: value.to("meta") for name, value in vars(report).items() if torch.is_tensor(value)}
    losses = {name: loss.to("meta") for name, loss in report.losses.items()}
    on_device = gradsurg.Report(**{**vars(report), **elsewhere, "losses": losses})
    with pytest.raises(RuntimeError, match="meta"):
        bool(on_device.square > 0)
    history = gradsurg.History(megabytes=0.02)
    for _ in range(20):
        history.record(on_device)
    assert 0 < len(history) < 20
    with pytest.raises(NotImplementedError, match="meta"):
        history.reports  # noqa: B018
