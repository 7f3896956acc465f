"""A default step stays as easy to follow as it is: it enters no more files, and none of them more often."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.flow import calls_before_backward, default_step, flow

# Raise none of these numbers. Before the modules were put into rooms, a step entered 40 files in 256 stays, and the
# first backward pass came 6 calls deep.
FILES = 33
STAYS = 160
DEPTH = 3  # calls of ours, by total(losses).backward() and by backward(losses) alike


# In a process of its own: once something is compiled, every row is also searched for zeros of other tasks' heads.
COUNT = """
import json
from benchmarks.flow import default_step, flow, off
step, optimizer = default_step()
counted = flow(step)
conflict = bool((optimizer.report.gramian < 0).any())
print(json.dumps([len(counted.files), counted.stays.total(), [f for f in counted.files if off(f)], conflict]))
"""


def test_a_step_enters_few_files_and_seldom():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    files, stays, of_options_that_are_off, conflict = json.loads(done.stdout)
    assert conflict  # without one a step is shorter
    assert files <= FILES
    assert stays <= STAYS
    assert not of_options_that_are_off


@pytest.mark.parametrize("by_total", [True, False])
def test_few_calls_lead_to_the_first_backward_pass(by_total):
    stack = calls_before_backward(default_step(by_total=by_total)[0])
    assert 1 <= len(stack) <= DEPTH, stack


def test_stays_are_counted_where_the_file_changes():
    step, _ = default_step()
    counted = flow(step)
    assert counted.calls[0] == ("optimizer/optimizer.py", "zero_grad")
    changes = sum(a != b for (a, _), (b, _) in zip(counted.calls, counted.calls[1:], strict=False))
    assert counted.stays.total() == changes + 1


def test_the_engine_holds_few_things():
    _, optimizer = default_step()
    assert len(vars(optimizer._gradsurg)) <= 12
