"""The report of the GPU benchmark: verdicts by the worst case, and files that hold what was measured."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_passes, gpu_report, gpu_training, record
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_training import SMALL

ABOUT = {"date": "2026-01-02T03:04:05+00:00", "card": "NVIDIA Some Card", "driver and clocks": "1.2"}


class Recorder:
    """A Bench that was filled by hand."""

    def __init__(self, results, write=lambda results: None):
        self.results, self.write = results, write

    def keep(self, what, **row):
        self.results.append({"what": what, **row})
        self.write(self.results)


def results(share=0.9, surgery_share=0.04, ours=1.0):
    return [
        {"what": "gramian", "P": "1 M", "m": 4, "share_of_copy": 0.1},  # too small to count
        {"what": "gramian", "P": "25 M", "m": 4, "share_of_copy": share},
        {"what": "combine", "P": "25 M", "m": 4, "share_of_copy": 0.95},
        {"what": "surgery", "by": "gradsurg cone", "m": 4, "seconds": ours},
        {"what": "surgery", "by": "gradsurg, torch path", "m": 4, "seconds": 0.1},  # no peer
        {"what": "surgery", "by": "TorchJD DualProj", "m": 4, "seconds": 4.0},
        {"what": "surgery", "by": "pytorch_optimizer PCGrad", "m": 4, "seconds": 5.0},
        {"what": "step", "model": "ResNet-50", "by": "gradsurg", "surgery_share": 0.01},
        {"what": "step", "model": "ResNet-50", "by": "gradsurg, update", "surgery_share": surgery_share},
        {"what": "step", "model": f"{SMALL}, 4 tasks", "by": "gradsurg", "surgery_share": 0.7},  # calls, not kernels
        {"what": "step", "model": "ResNet-50", "by": "TorchJD", "surgery_share": 0.5},
    ]


@pytest.mark.parametrize(
    ("changes", "want", "worst"),
    [
        ({}, ["met", "met", "met"], [0.9, 0.04, 4.0]),
        ({"share": 0.8, "surgery_share": 0.06, "ours": 2.0}, ["missed"] * 3, [0.8, 0.06, 2.0]),
        ({"share": math.nan, "surgery_share": math.nan, "ours": math.nan}, ["not measured"] * 3, [math.nan] * 3),
    ],
)
def test_targets_are_judged_by_the_worst_case(changes, want, worst):
    bench = Recorder(results(**changes))
    gpu_report.judge(bench)
    targets = bench.results[-3:]
    assert [row["verdict"] for row in targets] == want
    assert [row["worst"] for row in targets] == pytest.approx(worst, nan_ok=True)


def test_without_a_peer_nothing_is_said_of_peers():
    bench = Recorder([row for row in results() if not row.get("by", "").startswith(gpu_report.PEERS)])
    gpu_report.judge(bench)
    assert [row["verdict"] for row in bench.results[-3:]] == ["met", "met", "not measured"]


def test_a_machine_without_the_driver_s_tool(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: its version is part of the answer")
    card = SimpleNamespace(name="Some Card", major=9, minor=0, multi_processor_count=1, total_memory=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setenv("PATH", "")
    assert gpu_report.machine()["driver and clocks"] == "unknown: no nvidia-smi"


def test_a_run_that_fails_leaves_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Bench", lambda rehearse, minutes, write: Recorder([], write))
    monkeypatch.setattr(gpu, "machine", lambda: dict(ABOUT))
    monkeypatch.setattr(gpu_passes, "check_correctness", lambda bench: bench.keep("correct", m=2))

    def measure_copy(bench):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_training, "measure_training", lambda bench: None)
    monkeypatch.setattr(gpu_passes, "measure_copy", measure_copy)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.main([])
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["results"] == [{"what": "correct", "m": 2}]
    assert found["machine"]["ended in"] == "measure copy, by OutOfMemoryError"


def test_what_fails_is_a_row_that_says_so(capsys):
    written = []
    bench = Bench(rehearse=True, write=lambda results: written.append(len(results)))

    def fail():
        raise RuntimeError("no room\nand more")

    bench.attempt("surgery", fail, m=2, by="a peer")
    bench.attempt("surgery", lambda: {"seconds": 1.0}, m=2, by="gradsurg cone")
    assert bench.results == [
        {"what": "surgery", "m": 2, "by": "a peer", "failed": "RuntimeError: no room"},
        {"what": "surgery", "m": 2, "by": "gradsurg cone", "seconds": 1.0},
    ]
    assert written == [1, 2]
    gpu_report.judge(bench)
    assert [row["verdict"] for row in bench.results[-3:]] == ["not measured"] * 3


def test_both_files_hold_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    everything = gpu_report.save(ABOUT, results(share=0.87654321))
    shown = record.record("gpu", gpu_report.tables(ABOUT, results(share=0.87654321)))
    assert json.loads(everything.read_text())["results"] == results(share=0.87654321)
    assert "NVIDIA-Some-Card" in everything.name
    lines = shown.read_text().splitlines()
    assert "card NVIDIA Some Card, driver and clocks 1.2" in lines
    assert lines[lines.index("## gramian") + 2 :][:4] == [
        "| P | m | share_of_copy |",
        "| --- | --- | --- |",
        "| 1 M | 4 | 0.1 |",
        "| 25 M | 4 | 0.8765 |",
    ]
