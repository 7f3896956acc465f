"""Importing the library is cheap and pulls in nothing optional."""

import subprocess
import sys

import pytest

OPTIONAL = [
    "accelerate",
    "ignite",
    "lightning",
    "snownlp",
    "tensorboard",
    "transformers",
    "matplotlib",
    "sklearn",
    "scipy",
    "quadprog",
    "torchjd",
    "tqdm",
    "triton",
    "hypothesis",
]


def test_bare_import_with_warnings_as_errors():
    code = (
        "import sys, torch; before = set(sys.modules); import gradsurg; "
        f"new = {{m.partition('.')[0] for m in set(sys.modules) - before}}; print(sorted(new & set({OPTIONAL!r})))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_are_all_there():
    import gradsurg

    for name in gradsurg.__all__:
        assert getattr(gradsurg, name) is not None


@pytest.mark.parametrize("name", ["wrap", "unwrap", "total", "backward", "report", "weights", "combine", "check_sync"])
def test_public_functions_have_examples(name):
    import gradsurg

    doc = getattr(gradsurg, name).__doc__
    assert doc
    assert ">>>" in doc or name in ("total", "backward", "report")
