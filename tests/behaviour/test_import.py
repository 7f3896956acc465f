"""Importing the library is cheap and pulls in nothing optional."""

import inspect
import subprocess
import sys

OPTIONAL = [
    "accelerate",
    "ignite",
    "lightning",
    "snownlp",
    "tensorboard",
    "transformers",
    "matplotlib",
    "sklearn",
    "schedulefree",
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


def test_public_names_are_documented_with_an_example():
    import gradsurg

    for name in gradsurg.__all__:
        public = getattr(gradsurg, name)
        if inspect.isclass(public) or inspect.isfunction(public):
            doc = public.__doc__ or ""
            # Those of the three are at the first; a MultiTaskOptimizer is never built, and a Problem is handed in.
            assert ">>>" in doc or name in ("backward", "report", "MultiTaskOptimizer", "Problem"), name
