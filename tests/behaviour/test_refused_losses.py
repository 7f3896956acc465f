"""Losses and task names that are refused: a clear error, and everything as it was."""

import pytest
import torch

from gradsurg import MultiTaskError
from tests.behaviour.failures import assert_next_step_is_that_of_one_that_never_failed, good_step, prepare, wrapped
from tests.networks import build, run_backward, trained

ONE = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize(
    ("losses", "match"),
    [
        ({}, "no task"),
        ([], "no task"),
        ({"a": None, "b": None}, "no task"),
        ({"a": ONE, "b": torch.ones(3, requires_grad=True)}, r"losses\['b'\] has shape \(3,\)"),
        ({"a": ONE, "b": torch.ones(0, requires_grad=True)}, r"losses\['b'\] has shape \(0,\)"),
        ({"a": ONE, "b": torch.ones((), dtype=torch.complex64, requires_grad=True)}, r"losses\['b'\] is complex"),
        ({"a": ONE, "b": 0.3}, r"losses\['b'\] is a float"),
        ({1: ONE, "1": ONE}, "two tasks named '1'"),
        (ONE, "losses is a Tensor"),
        ({"a": [ONE, ONE]}, r"losses\['a'\] is a list of 2: pass their sum, as in sum\(losses\['a'\]\)"),
        ({ONE}, "losses is a set"),
        ("ab", "losses is a str"),
        (None, "losses is a NoneType"),
    ],
)
def test_losses_that_are_none(way, losses, match):
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=match):
        getattr(optimizer, way)(losses)
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)


def test_backward_without_any_loss_that_requires_grad():
    optimizer = wrapped(build())
    with pytest.raises(ValueError, match="requires grad"):
        optimizer.backward({"a": torch.ones(())})


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}])
@pytest.mark.parametrize("how", ["total", "backward", "hidden"])
def test_a_total_is_no_task_of_its_own_optimizer(how, options):
    # It would write its own direction in the middle of the outer one's passes, and the outer tasks would be lost.
    model = build()
    optimizer = wrapped(model, **options)
    good_step(optimizer, model)  # with refresh_every=, the next step runs one backward pass alone
    optimizer.zero_grad()
    inner = optimizer.total(model.losses(0))
    losses = {**model.losses(1), "left": 2 * inner + 1 if how == "hidden" else inner}
    with pytest.raises(MultiTaskError, match="hand over the losses that it was made of"):
        optimizer.backward(losses) if how == "backward" else optimizer.total(losses).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.total(model.losses(1)).backward()
    optimizer.step()
    assert optimizer.report.step == 1
    optimizer.zero_grad()
    good_step(optimizer, model)


# -- wrong names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["total", "backward", "task", "set_gradients"])
def test_undeclared_names_are_refused_with_a_suggestion(way):
    model = build()
    optimizer = wrapped(model, tasks=["left", "right", "whole"])
    losses = model.losses(0)
    losses["lefd"] = losses.pop("left")
    with pytest.raises(ValueError, match=r"'lefd'.*Did you mean 'left'"):
        run_backward(way, optimizer, dict(sorted(losses.items())))
    assert all(p.grad is None for p in model.parameters())
    good_step(optimizer, model)


@pytest.mark.parametrize("way", ["total", "backward", "task", "set_gradients"])
def test_names_are_text_whatever_they_were(way):
    model = build()
    optimizer = wrapped(model)
    run_backward(way, optimizer, dict(enumerate(model.losses(0).values())))
    optimizer.step()
    assert optimizer.report.tasks == ("0", "1", "2")
    assert len(str(optimizer.report).splitlines()) >= 4
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="a task named None: name it by a string"):
        run_backward(way, optimizer, {None: model.losses(0)["left"]})
    assert all(p.grad is None for p in model.parameters())
    good_step(optimizer, model)


@pytest.mark.parametrize("options", [{"primary": "lefd"}, {"preferences": {"lefd": 2.0}}])
@pytest.mark.parametrize("way", ["total", "backward", "set_gradients"])
def test_a_misspelt_option_is_found_at_the_first_losses(options, way):
    model = build()
    optimizer = wrapped(model, **options)
    with pytest.raises(ValueError, match=r"names the task 'lefd'.*Did you mean 'left'"):
        run_backward(way, optimizer, model.losses(0))
    assert all(p.grad is None for p in model.parameters())


def test_a_misspelt_option_warns_with_task_blocks():
    # They name one task at a time, so a name that did not come yet may still come: no error, but not silence.
    model = build()
    optimizer = wrapped(model, primary="lefd")
    for batch in range(2):
        optimizer.zero_grad()
        run_backward("task", optimizer, model.losses(batch))
        if batch == 0:
            with pytest.warns(UserWarning, match="Did you mean 'left'") as caught:
                optimizer.step()
            assert caught[0].filename == __file__
        else:
            optimizer.step()


@pytest.mark.parametrize("inner", ["total", "backward", "task", "set_gradients", "step"])
def test_nothing_else_inside_a_task_block(inner):
    model, optimizer, other, reference = prepare()
    optimizer.zero_grad()
    calls = {
        "total": lambda: optimizer.total(model.losses(3)).backward(),
        "backward": lambda: optimizer.backward(model.losses(3)),
        "task": lambda: optimizer.task("right").__enter__(),
        "set_gradients": lambda: optimizer.set_gradients({"right": [None] * len(trained(model))}),
        "step": optimizer.step,
    }
    with pytest.raises(MultiTaskError, match=r"inside `with optimizer.task"), optimizer.task("left"):
        calls[inner]()
    assert all(p.grad is None for p in model.parameters())
    assert_next_step_is_that_of_one_that_never_failed(optimizer, model, reference, other)
