"""The house keeps its plan: rooms on floors, imports that only go down, short files, and a test for every module.

Everything is read from the source with ast: nothing of gradsurg is imported, so that a circle is reported as one.
"""

from __future__ import annotations

import ast
import re
import symtable
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradsurg"
TESTS = ROOT / "tests"

# From the ground up. A module imports from its own room and from lower floors; `__init__` is gradsurg/__init__.py.
FLOORS = [
    ("errors", "solvers"),
    ("linalg", "normalize"),
    ("gradients", "surgery"),
    ("distributed",),
    ("guarantee",),
    ("optimizer",),
    ("monitor",),
    ("__init__",),
    ("demo",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The ground floor has no room below it: errors.py is a leaf, and what stands beside it may use it.
LEAF = "errors"
ROOMS = [room for rooms in FLOORS for room in rooms if not room.startswith("__") and room != LEAF]
# Folders of tests that are no room: what crosses rooms, the Triton twins of linalg, and what is not in the package.
OTHER_TESTS = {"behaviour", "kernels", "benchmarks", "docs"}

MOST_ENTRIES = 14
MOST_LINES = 300
MOST_TEST_LINES = 400
# Packages whose __init__ is an interface for users; every other __init__ holds a docstring and nothing else.
INTERFACES = {"gradsurg", "gradsurg.surgery", "gradsurg.normalize", "gradsurg.monitor.plot"}
# Names that the old house had for its things.
OLD_WORDS = "surgeon|patient|aside|glance|onboard|judgement|incoming|enclosing|findings|spare"
OLD = re.compile(rf"(?<![a-z])(?:{OLD_WORDS})(?![a-z])", re.IGNORECASE)

# Modules that no test file is named after, and the test that covers each of them. "room.*" is all other modules of a
# package whose tests go through a table of them.
COVERED = {
    "gradsurg": "tests/behaviour/test_import.py",
    "gradsurg.__main__": "tests/demo/test_digits.py",
    "gradsurg.errors": "tests/optimizer/test_options.py",
    "gradsurg.demo.table": "tests/demo/test_digits.py",
    "gradsurg.distributed.averaging": "tests/distributed/test_cheap.py",
    "gradsurg.distributed.buckets": "tests/distributed/test_promises.py",
    "gradsurg.distributed.check_sync": "tests/distributed/test_refusals.py",
    "gradsurg.distributed.collectives": "tests/distributed/test_refusals.py",
    "gradsurg.distributed.ddp_exchange": "tests/distributed/test_ddp.py",
    "gradsurg.distributed.ddp_reducer": "tests/distributed/test_ddp.py",
    "gradsurg.distributed.detect": "tests/distributed/test_refusals.py",
    "gradsurg.distributed.layout": "tests/distributed/test_ddp.py",
    "gradsurg.distributed.modules": "tests/distributed/test_fsdp.py",
    "gradsurg.distributed.session": "tests/distributed/test_promises.py",
    "gradsurg.optimizer.proxies": "tests/optimizer/test_wrap.py",
    "gradsurg.gradients.compile": "tests/behaviour/stacks/test_compile.py",
    "gradsurg.gradients.dtensor": "tests/distributed/test_fsdp.py",
    "gradsurg.gradients.graph": "tests/optimizer/cheap/test_batched.py",
    "gradsurg.gradients.hooks": "tests/behaviour/stacks/test_hooks.py",
    "gradsurg.gradients.param_groups": "tests/optimizer/test_every_optimizer.py",
    "gradsurg.gradients.reachability": "tests/gradients/test_losses.py",
    "gradsurg.guarantee.constraint": "tests/guarantee/test_update.py",
    "gradsurg.guarantee.movement": "tests/guarantee/test_update.py",
    "gradsurg.linalg.elementwise": "tests/surgery/test_elementwise.py",
    "gradsurg.linalg.measure": "tests/distributed/test_promises.py",
    "gradsurg.linalg.reference": "tests/linalg/test_gramian.py",
    "gradsurg.linalg.kernels.*": "tests/kernels/test_interpreter.py",
    "gradsurg.monitor.advice": "tests/monitor/test_verdict.py",
    "gradsurg.monitor.plot.*": "tests/monitor/test_plot.py",
    "gradsurg.normalize": "tests/normalize/test_published.py",
    "gradsurg.normalize.*": "tests/normalize/test_published.py",
    "gradsurg.optimizer.direction": "tests/kernels/test_dispatch.py",
    "gradsurg.optimizer.direction_cuda": "tests/kernels/interpreted/steps.py",
    "gradsurg.optimizer.engine": "tests/behaviour/test_flow.py",
    "gradsurg.optimizer.inputs": "tests/kernels/test_dispatch.py",
    "gradsurg.optimizer.recording": "tests/optimizer/test_report.py",
    "gradsurg.optimizer.report_table": "tests/optimizer/test_report.py",
    "gradsurg.optimizer.step": "tests/behaviour/test_failures_in_step.py",
    "gradsurg.solvers.bargain": "tests/surgery/test_published_fair.py",
    "gradsurg.solvers.pivoting": "tests/solvers/test_nonnegative.py",
    "gradsurg.solvers.problem": "tests/surgery/test_pipeline.py",
    "gradsurg.solvers.pseudoinverse": "tests/surgery/test_published_geometry.py",
    "gradsurg.solvers.rows": "tests/solvers/test_nonnegative.py",
    "gradsurg.solvers.tolerances": "tests/surgery/test_pipeline_small.py",
    "gradsurg.surgery": "tests/surgery/test_conformance.py",
    "gradsurg.surgery.base": "tests/surgery/test_functional.py",
    "gradsurg.surgery.blockwise": "tests/surgery/test_conformance.py",
    "gradsurg.surgery.methods.*": "tests/surgery/test_conformance.py",
}


class Import(NamedTuple):
    """One name that a file imports from gradsurg."""

    file: Path
    line: int
    module: str
    name: str | None

    @property
    def target(self) -> str:
        """The module whose file is meant: a submodule, if the name is one."""
        inner = f"{self.module}.{self.name}"
        return inner if inner in files() else self.module

    def __str__(self) -> str:
        what = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{shown(self.file)}:{self.line}: {what}"


@cache
def files() -> dict[str, Path]:
    """Every module of gradsurg by its dotted name, packages by their __init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(path: Path) -> list[Import]:
    """What a file imports from gradsurg, at its top, under TYPE_CHECKING or inside of functions."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{shown(path)}:{node.lineno} imports relatively: write gradsurg.room.module in full"
            found += [Import(path, node.lineno, node.module or "", alias.name) for alias in node.names]
    return [each for each in found if each.module.partition(".")[0] == "gradsurg"]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    """The first folder below gradsurg, or the file there."""
    return module.split(".")[1] if "." in module else "__init__"


def defined(module: str) -> set[str]:
    """The names that a module makes at its top level, and those that it exports by __all__."""
    path = files()[module]
    symbols = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec").get_symbols()
    return exported(module) | {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}


def exported(module: str) -> set[str]:
    """What __all__ lists."""
    for node in tree(files()[module]).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def none(problems: list[str]) -> None:
    """Fail with all problems at once, one per line."""
    assert not problems, f"{len(problems)} found\n" + "\n".join(problems)


# -- rooms and floors ----------------------------------------------------------------------------------------------


def test_few_entries_at_the_top():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    known = {*ROOMS, "errors.py", "__init__.py", "__main__.py", "py.typed"}
    none([f"gradsurg/{name}: no such room in FLOORS; move it into one" for name in entries if name not in known])
    assert len(entries) <= MOST_ENTRIES, f"{len(entries)} entries at the top of gradsurg/, at most {MOST_ENTRIES}"
    assert len(FLOORS) <= 10


def test_imports_go_down():
    problems = []
    for module, path in files().items():
        for each in imports(path):
            mine, other = room_of(module), room_of(each.target)
            if mine == other or other == LEAF or FLOOR[other] < FLOOR[mine]:
                continue
            problems.append(
                f"{each}: {mine} is on floor {FLOOR[mine]} and {other} on floor {FLOOR[other]}; "
                f"pass it in as an argument, or move what is needed to a lower floor"
            )
    none(problems)


def test_no_circle_of_files():
    graph: dict[str, dict[str, Import]] = {module: {} for module in files()}
    for module, path in files().items():
        for each in imports(path):
            if each.target != module:
                graph[module].setdefault(each.target, each)
    circles = sorted((shortest_circle(graph, start) for start in graph), key=len)
    # One import often closes many circles: each is told in the shortest of them only.
    told: dict[frozenset[Import], str] = {}
    for circle in filter(None, circles):
        if not any(set(circle) & known for known in told):
            told[frozenset(circle)] = "\n    ".join(
                ["a circle; move what one of these needs to a file of its own", *map(str, circle)]
            )
    none(list(told.values()))


def shortest_circle(graph: dict[str, dict[str, Import]], start: str) -> list[Import]:
    """The imports along the shortest way from a file back to itself; empty if there is none."""
    ways: dict[str, list[Import]] = {start: []}
    queue = [start]
    for module in queue:
        for target, each in graph.get(module, {}).items():
            if target == start:
                return [*ways[module], each]
            if target not in ways:
                ways[target] = [*ways[module], each]
                queue.append(target)
    return []


def test_no_two_rooms_import_each_other():
    first: dict[tuple[str, str], Import] = {}
    for module, path in files().items():
        for each in imports(path):
            first.setdefault((room_of(module), room_of(each.target)), each)
    none(
        [
            f"{first[a, b]}, and {first[b, a]}: of {a} and {b} only one may import the other"
            for a, b in first
            if a < b and (b, a) in first
        ]
    )


# -- names ---------------------------------------------------------------------------------------------------------


def test_imported_names_are_defined_or_exported():
    none(
        [
            f"{each}: {each.module} neither defines nor exports it; import it from the module that defines it"
            for path in files().values()
            for each in imports(path)
            if each.target not in files()
            or (each.name and each.target == each.module and each.name not in defined(each.module))
        ]
    )


def test_private_names_stay_in_their_module():
    problems = [
        f"{each}: a private name; make it public or move it"
        for path in files().values()
        for each in imports(path)
        if each.name and re.match(r"_(?!_)", each.name)
    ]
    for path in files().values():
        modules = {alias for alias, module in aliases(path).items() if module in files()}
        problems += [
            f"{shown(path)}:{node.lineno}: {ast.unparse(node)} is private in its module; make it public or move it"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and ast.unparse(node.value) in modules
        ]
    none(problems)


@cache
def aliases(path: Path) -> dict[str, str]:
    """The names under which a file knows what it imports."""
    known = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            known |= {alias.asname or alias.name: start + alias.name for alias in node.names}
    return known


def test_no_name_shadows_a_module():
    """`import gradsurg.report as r` must never give a function."""
    problems = []
    for package, path in files().items():
        if path.name != "__init__.py":
            continue
        modules = {module.rpartition(".")[2] for module in files() if module.rpartition(".")[0] == package}
        brought = {each.name for each in imports(path) if each.name and each.target == each.module}
        made = defined(package) - set(aliases(path))
        problems += [
            f"{shown(path)}: {name} is also the module {package}.{name}; rename one of them"
            for name in sorted(modules & (made | brought))
        ]
    none(problems)


def test_only_interfaces_export():
    none(
        [
            f"{shown(path)}:{node.lineno}: this package is no interface of its own; its __init__ holds a docstring only"
            for module, path in files().items()
            if path.name == "__init__.py" and module not in INTERFACES
            for node in tree(path).body
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
    )


def test_old_words_are_gone():
    none(
        [
            f"{shown(path)}:{number}: {match[0]!r} is a word of the old house; docs/glossary.md has the new one"
            for path in files().values()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            for match in OLD.finditer(line)
        ]
    )


# -- lengths -------------------------------------------------------------------------------------------------------


def test_files_are_short():
    none(
        [
            f"{shown(path)}:{most + 1}: {count} lines, at most {most}; split it by meaning"
            for folder, most in [(PACKAGE, MOST_LINES), (TESTS, MOST_TEST_LINES)]
            for path in sorted(folder.rglob("*.py"))
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > most
        ]
    )


# -- tests ---------------------------------------------------------------------------------------------------------


def test_folders_of_tests_are_rooms():
    folders = {path.name for path in TESTS.iterdir() if any(path.rglob("test_*.py"))}
    none(
        [
            f"tests/{name}: not a room; move its tests to one, or to behaviour/"
            for name in folders - {*ROOMS} - OTHER_TESTS
        ]
    )
    none([f"tests/{name}: the room has no tests" for name in ROOMS if name not in folders])


def test_every_module_has_a_test():
    problems, used = [], set()
    for module, path in files().items():
        if path.name == "__init__.py" and module not in INTERFACES:
            continue
        own, rest = own_test(module), f"{module.rpartition('.')[0]}.*"
        if own.exists():
            if module in COVERED:
                problems.append(f"tests/test_house.py: {module} has {shown(own)}; take it out of COVERED")
        elif module in COVERED or rest in COVERED:
            used.add(module if module in COVERED else rest)
        else:
            problems.append(f"{shown(path)}: write {shown(own)}, or name the test that covers it in COVERED")
    none(
        problems
        + [f"tests/test_house.py: COVERED lists {m}, which is gone" for m in COVERED if m not in used | {*files()}]
        + [
            f"tests/test_house.py: COVERED names {test} for {module}; there is no such file"
            for module, test in COVERED.items()
            if not (ROOT / test).exists()
        ]
    )


def own_test(module: str) -> Path:
    """Where the test of a module's name is; the kernels' tests have a folder of their own."""
    parts = module.split(".")[1:] or ["gradsurg"]
    folder = TESTS.joinpath(*parts[:-1]) if parts[:2] != ["linalg", "kernels"] else TESTS / "kernels"
    return folder / f"test_{parts[-1].strip('_')}.py"
