"""Random programs of users: no step hurts a task, no error leaves a trace, and nothing happens outside of step()."""

from __future__ import annotations

import os

import pytest
import torch

from tests.behaviour.judge import run
from tests.behaviour.programs import Program, shrink

# More for a search by hand: GRADSURG_PROGRAMS=3000.
COUNT = int(os.environ.get("GRADSURG_PROGRAMS", "300"))
AT_ONCE = 30


@pytest.fixture(autouse=True)
def _one_thread():
    """Of tensors this small, a second thread only takes the time of others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failure(program: Program) -> str | None:
    """Return what went wrong in a program, in few words, so that shrinking does not wander off to another fault."""
    try:
        run(program)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return None


@pytest.mark.parametrize("first", range(0, COUNT, AT_ONCE))
def test_random_programs(first):
    for seed in range(first, min(first + AT_ONCE, COUNT)):
        program = Program.draw(seed)
        if (found := failure(program)) is not None:
            smallest = shrink(program, lambda other, found=found: failure(other) == found)
            print(f"seed {seed} fails with {found}, and so does\n{smallest}")
            run(smallest)


KEPT = {
    "two totals of one backward pass share a trunk": Program(
        {"tasks": 3, "heads": True}, actions=(("train", {"way": "two totals", "batch": 616}),)
    ),
    "sparse gradients in float16": Program(
        {"front": "sparse", "dtype": "float16"}, actions=(("train", {"batch": 679}), ("train", {"batch": 680}))
    ),
    "an error of the user's in the first batched pass": Program(
        options={"batched": True},
        actions=(("fail", {"where": "hook", "batch": 902}), ("train", {"batch": 624}), ("train", {"batch": 625})),
    ),
    "a closure that clears the gradients of a step that failed": Program(
        actions=(
            ("fail", {"where": "step", "batch": 804}),
            ("train", {"way": "closure", "batch": 832, "tasks": ("b",)}),
        )
    ),
    "a closure that clears the gradients of a batch that was skipped": Program(
        {"tasks": 3}, actions=(("skip", {"batch": 804}), ("train", {"way": "closure", "batch": 832}))
    ),
    "a surgery that fails on the second of two micro-batches": Program(
        {"tasks": 3, "extras": ("apart",)},
        options={"normalize": "tchebycheff"},
        actions=(("nan", {"batch": 528, "micro": 2}), ("train", {"batch": 529})),
    ),
    "a frozen parameter that is declared as shared": Program(
        options={"shared": "trunk", "refresh_every": 3},
        actions=(("train", {"batch": 1}), ("freeze", {"number": 0}), ("train", {"batch": 2}), ("train", {"batch": 3})),
    ),
    "functions in one step of batched=True, and losses in the next": Program(
        options={"batched": True},
        actions=(("train", {"way": "functions", "batch": 1}), ("reload", {}), ("train", {"batch": 2})),
    ),
    "a step of nesterov with foreach that fails half way": Program(
        optimizer={"name": "SGD", "lr": 0.01, "nesterov": True, "momentum": 0.9, "foreach": True},
        options={"atomic": True},
        actions=(("fail", {"where": "half way", "batch": 633}), ("train", {"batch": 634})),
    ),
    "clipping in float16 while surgery waits": Program(
        {"tasks": 3, "heads": True, "dtype": "float16"},
        actions=(("train", {"batch": 48, "micro": 2, "gather": "all", "change": "clip"}), ("train", {"batch": 49})),
    ),
    "one of two tasks has no part in the features": Program(
        {"extras": ("apart",)},
        options={"preferences": {"a": 0.3}},
        actions=(("train", {"way": "features", "batch": 9}),),
    ),
    "a closure that adds to the gradients that are there": Program(
        {"tasks": 3}, actions=(("skip", {"batch": 804}), ("train", {"way": "closure", "batch": 832, "clear": "no"}))
    ),
}


@pytest.mark.parametrize("program", KEPT.values(), ids=KEPT)
def test_programs_that_failed_once(program):
    run(program)


def test_shrinking_keeps_what_matters():
    program = Program.draw(1)
    smallest = shrink(program, lambda other: len(other.actions) > 0 and "lr" in other.optimizer)
    assert smallest.options == smallest.model == {}
    assert len(smallest.actions) == 1
    assert smallest.optimizer.keys() == {"name", "lr"}


def test_a_step_that_conflicts_is_found(monkeypatch):
    """The judge itself: without the projection of the update, some program of the first fails."""
    monkeypatch.setattr("gradsurg.guarantee.constraint.UpdateConstraint.enforce", lambda *_: None)
    momentum = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    actions = tuple(("train", {"batch": batch}) for batch in range(12))
    with pytest.raises(AssertionError, match="the update hurts"):
        run(Program({"tasks": 3}, momentum, {}, actions))
