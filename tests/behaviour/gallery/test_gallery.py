"""Every script of the gallery in its fast setting: real data, few steps, the whole of the code."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
# script -> rows of the table it prints
SCRIPTS = {
    "crf_tagging": 3,
    "few_shot_mlm": 4,
    "loss_weighting": 18,
    "multitask_pretraining": 4,
    "noisy_labels": 7,
    "pinn": 6,
    "regularizer": 3,
    "text_matching": 7,
    "unargmaxable": 2,
}


@pytest.fixture
def printed(monkeypatch, tmp_path, capsys):
    """Run a script's main() with --fast, check its picture, return the cells of its table's body."""

    def run(name: str) -> list[list[str]]:
        picture = tmp_path / f"{name}.png"
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, "--fast", "--output", str(picture)])
        threads = torch.get_num_threads()
        try:
            importlib.import_module(name).main()
        finally:
            torch.set_num_threads(threads)
        assert picture.read_bytes().startswith(b"\x89PNG")
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_prints_its_table_and_draws(name, printed):
    rows = printed(name)
    assert len(rows) == SCRIPTS[name]
    for row in rows:
        numbers = [float(n) for cell in row[1:] for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", cell)]
        assert numbers, row
        assert "nan" not in " ".join(row)
        assert all(abs(n) < 1e6 for n in numbers)


def test_scales_keep_the_invariances_that_the_page_claims(printed):
    turned = {(way, units): float(angle.rstrip("°")) for way, units, *_, angle in printed("loss_weighting")}
    for way in ("initial loss", "prior loss", "current loss", "gradient norm"):
        assert turned[way, "ink ÷ 256"] == 0
    for way in ("none", "gradient norm"):
        assert turned[way, "pixels + 5"] == 0
    assert turned["current loss", "pixels + 5"] > 1


def test_scripts_stay_short():
    for name in SCRIPTS:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 150, name
