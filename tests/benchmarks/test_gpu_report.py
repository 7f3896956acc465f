"""The report of the GPU benchmark: verdicts by the worst case, and files that hold what was measured."""

import json
import math

import pytest

from benchmarks import gpu_report, record
from benchmarks.gpu_training import SMALL

ABOUT = {"date": "2026-01-02T03:04:05+00:00", "card": "NVIDIA Some Card", "driver and clocks": "1.2"}


class Recorder:
    """A Bench that was filled by hand."""

    def __init__(self, results):
        self.results = results

    def keep(self, what, **row):
        self.results.append({"what": what, **row})


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


def test_both_files_hold_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    everything, shown = gpu_report.save(ABOUT, results(share=0.87654321))
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
