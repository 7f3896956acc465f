"""Runs the tests of interpreted/ where Triton interprets its kernels: that is decided when they are decorated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels are tested where it is")

HERE = Path(__file__).parent
FILES = ["gramians", "combinations", "movements", "cones", "guards", "metrics", "steps", "reports"]


def run(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = HERE.parents[1]
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=root, capture_output=True, text=True
    )


def pytest_of(name, marks):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, HERE / "interpreted" / f"{name}.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    pytest_of(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gramians", "cones"])
def test_interpreted_for_more_tasks(name):
    pytest_of(name, "slow")


def test_reading_past_the_end_would_be_a_fault():
    """The control of guards.py: the pages do guard."""
    done = run("-m", "tests.kernels.interpreted.guards")
    assert done.returncode == -11, done.stdout + done.stderr


def test_importing_the_library_imports_no_triton():
    code = "import sys, gradsurg, gradsurg.linalg.kernels.dispatch; assert 'triton' not in sys.modules"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
