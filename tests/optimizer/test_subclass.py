"""The class that takes the optimizer's place: hooks, attributes and step() are the optimizer's own."""

import copy
import types

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradsurg
from tests.networks import build, equal_weights, same, twins
from tests.optimizer.every_optimizer import one_task, several, train


class Renamed(torch.optim.Adam):
    """An optimizer of one's own."""


class Own(torch.optim.Optimizer):
    """One written from scratch, whose step takes another argument."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("cls", [Renamed, Own])
def test_optimizers_from_elsewhere(cls):
    model, plain_model = twins()
    optimizer, plain = gradsurg.wrap(cls(model.parameters(), lr=0.01)), cls(plain_model.parameters(), lr=0.01)
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)
    train(optimizer, model, several, range(3))
    assert (optimizer.report.update_cosines >= -1e-4).all()


@pytest.mark.parametrize("first", ["Adam", "AdamW"])
def test_hooks_run_exactly_once(first):
    # AdamW inherits its step from Adam: whichever of them torch instruments first must not make hooks run twice.
    model = build()
    getattr(torch.optim, first)(model.parameters())
    counts = []
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        optimizer = cls(model.parameters())
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("own before"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: seen.append("own after"))  # noqa: B023
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("global before")),  # noqa: B023
            register_optimizer_step_post_hook(lambda *_: seen.append("global after")),  # noqa: B023
        ]
        gradsurg.wrap(optimizer)
        train(optimizer, model, several, range(2))
        for handle in handles:
            handle.remove()
        counts.append(seen)
    assert counts == [["global before", "own before", "own after", "global after"] * 2] * 2


def test_hooks_of_a_copy_run_exactly_once():
    # Unpickling makes torch instrument the class again, unless it is told that this was done.
    model, optimizer = copy.deepcopy((model := build(), gradsurg.wrap(torch.optim.Adam(model.parameters()))))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, model, several, range(2))
    assert seen == ["after"] * 2


def test_post_hooks_see_the_guarded_parameters():
    model = build("all shared")
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.05))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in model.parameters()]))
    corrected = 0
    for batch in range(12):
        train(optimizer, model, several, [batch])
        assert same(seen[-1], [p.detach() for p in model.parameters()])
        corrected += optimizer.report.movement.corrected
    assert corrected, "Adam was never corrected, so this test has not seen what it is for"


def test_state_dict_hooks_run_once():
    optimizer = gradsurg.wrap(torch.optim.Adam(build().parameters()))
    seen = []
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    optimizer.load_state_dict(state_dict=optimizer.state_dict())  # by keyword, as distributed checkpoints do
    assert seen == ["save", "load"]


def test_attributes_that_trainers_set_reach_the_optimizer():
    # GradScaler hands a fused optimizer its scale this way.
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    for o, m in [(optimizer, model), (plain, plain_model)]:
        loss = one_task(m, 0)
        ((o.total(loss) if o is optimizer else loss["all"]) * 8).backward()
        o.grad_scale, o.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        o.step()
        del o.grad_scale, o.found_inf
    assert equal_weights(model, plain_model)


def test_step_replaced_by_somebody_else_is_refused():
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    optimizer.step = types.MethodType(lambda self: None, optimizer)
    with pytest.raises(TypeError, match="replaced"):
        gradsurg.wrap(optimizer)
    assert type(optimizer) is torch.optim.SGD
