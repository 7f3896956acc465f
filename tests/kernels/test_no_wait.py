"""Nothing on a CUDA step's way waits for the device, read from the source: the part of the proof that needs no run.

tests/kernels/interpreted/steps.py has the other part: whole steps in which a mode notices what is read back.
"""

import ast
from pathlib import Path

import pytest

import gradsurg

HOME = Path(gradsurg.__file__).parent

# What a step on CUDA runs after the losses: everything in these files, unless it is named below.
HOT = [
    "guarantee/update_cuda.py",
    "optimizer/direction_cuda.py",
    "guarantee/movement.py",
    "linalg/kernels/combine.py",
    "linalg/kernels/cone.py",
    "linalg/kernels/dispatch.py",
    "linalg/kernels/gramian.py",
    "linalg/kernels/inner.py",
    "linalg/kernels/left.py",
    "linalg/kernels/moved.py",
    "linalg/kernels/table.py",
    "surgery/pipeline.py",
    "surgery/priority.py",
    "gradients/capture.py",
    "gradients/total.py",
    "optimizer/cheap/batched.py",
    "gradients/graph.py",
    "gradients/rows.py",
    "optimizer/backward.py",
    "optimizer/step.py",
    "optimizer/step.py",
    "optimizer/engine.py",
    "guarantee/constraint.py",
    "normalize/none.py",
    "normalize/norm.py",
    "surgery/methods/cone.py",
    "surgery/methods/mean.py",
    "surgery/methods/mgda.py",
    "surgery/base.py",
    "surgery/methods/sum.py",
    "surgery/methods/upgrad.py",
]

# Functions that may wait, each with its reason.
ALLOWED = {
    "optimizer/direction_cuda.py": {
        "_on_the_host": "methods whose `waits` is True find their weights there",
        "_constraint_on_the_host": "foreign tensor classes, and more than 32 tasks",
        "_fetched": "runs when somebody reads the report",
    },
    "linalg/kernels/table.py": {"_upload": "a table in host memory, before it is copied without waiting"},
    "surgery/pipeline.py": {
        "settled": "the functional form, not a step",
        "_quick": "where the solvers are the host's",
    },
    "gradients/capture.py": {"_change": "flags in host memory; over ranks they are exchanged in a later micro-batch"},
    "gradients/rows.py": {"is_finite": "nonfinite='skip_task' and 'raise'", "_overflows": "row_dtype=torch.float16"},
    "optimizer/step.py": {"unmoved": "gradients that came before a closure: SAM"},
    "surgery/base.py": {"check_gramian": "the functional form; a matrix on a device is not read"},
    "normalize/norm.py": {"_smoothed": "smoothing > 0, for which `waits` is True"},
}

METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero"}
REDUCTIONS = {"any", "all", "isfinite", "isnan", "isinf", "equal", "allclose"}


def is_torch(node):
    return isinstance(node, ast.Name) and node.id == "torch"


def reads_a_tensor(node):
    """Whether an expression that is asked for its truth is, by its form, a tensor's: x.any(), torch.isfinite(x) …"""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in REDUCTIONS:
            return True
    return False


def complaints(tree):
    """Yield (function, line, what) for each construct that would make the host wait."""

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                if called.attr in METHODS:
                    yield function, node.lineno, f".{called.attr}()"
                made = is_torch(called.value) and called.attr in {"tensor", "as_tensor"}
                if made and any(k.arg == "device" for k in node.keywords):
                    yield function, node.lineno, f"torch.{called.attr}(…, device=…), a copy from pageable memory"
                if made and not any(k.arg == "device" for k in node.keywords) and function is not None:
                    yield function, node.lineno, f"torch.{called.attr}(…), which is on the CPU"
            if isinstance(called, ast.Name) and called.id in {"bool", "float", "int"} and node.args:
                argument = node.args[0]
                if isinstance(argument, ast.BinOp) or reads_a_tensor(argument):
                    yield function, node.lineno, f"{called.id}(…) of what may be a tensor"
        tests = [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)) else []
        if any(reads_a_tensor(test) for test in tests):
            yield function, node.lineno, "the truth of a tensor"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, None)


def is_kernel(node):
    return any("jit" in ast.dump(decorator) for decorator in getattr(node, "decorator_list", ()))


def host_code(path):
    """Return the syntax tree without kernels, which run on the device, and without docstrings' examples."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_kernel(node)]
    return tree


@pytest.mark.parametrize("name", HOT)
def test_nothing_reads_a_number_back(name):
    allowed = ALLOWED.get(name, {})
    found = list(complaints(host_code(HOME / name)))
    assert [one for one in found if one[0] not in allowed] == []


def test_what_is_allowed_is_there_and_needs_to_be():
    for name, functions in ALLOWED.items():
        tree = host_code(HOME / name)
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        complained = {function for function, _, _ in complaints(tree)}
        assert set(functions) <= there & complained, name


WAITING = [
    "x.item()",
    "x.tolist()",
    "x.cpu()",
    "bool((x < 0).any())",
    "float(a @ b)",
    "int(a + b)",
    "torch.nonzero(x)",
    "torch.equal(x, y)",
    "torch.tensor([1.0], device=x.device)",
    "torch.tensor([1.0])",
    "1 if torch.isfinite(x).all() else 2",
]


@pytest.mark.parametrize("line", WAITING)
def test_the_check_notices(line):
    assert list(complaints(ast.parse(f"def f(x, y, a, b):\n    return {line}")))


def test_the_check_lets_pass_what_stays_on_the_device():
    code = "def f(x, y):\n    z = torch.where((x < 0).any(-1), x, y)\n    return z.sum() if x.ndim > 1 else z"
    assert not list(complaints(ast.parse(code)))
