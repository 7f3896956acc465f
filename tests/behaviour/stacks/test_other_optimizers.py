"""Optimizers that are not torch's own: other packages', abstract ones, and steps with arguments of their own."""

import abc
import copy
import pickle
import warnings

import pytest
import torch

import gradsurg
from tests.networks import build, equal_weights, twins

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it uses torch.jit.script while it is imported
    import pytorch_optimizer

PACKAGED = ("Lion", "Lamb", "AdaBelief", "Prodigy", "AdEMAMix", "ScheduleFreeAdamW")
COSINE = -1e-4


class Abstract(abc.ABC, torch.optim.Optimizer):
    """The base that other packages have: ABC comes first, and decides how objects are laid out."""

    zeroed = 0

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @abc.abstractmethod
    def step(self, closure=None): ...

    def zero_grad(self, set_to_none=True):
        self.zeroed += 1
        super().zero_grad(set_to_none)


class Concrete(Abstract):
    def step(self, closure=None, factor=1.0):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"] * factor)
        return factor


def packaged(name, model):
    optimizer = getattr(pytorch_optimizer, name)(model.parameters(), lr=0.01)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def flat(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def train(optimizer, model, batches):
    for batch in batches:
        optimizer.zero_grad()
        optimizer.total(model.losses(batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("name", PACKAGED)
def test_no_update_of_a_packaged_optimizer_hurts_a_task(name):
    model = build("all shared")
    optimizer = gradsurg.wrap(packaged(name, model))
    corrected = 0
    for batch in range(30):
        losses = model.losses(batch)
        wanted = [
            flat(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)) for loss in losses.values()
        ]
        before = flat(model.parameters())
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        optimizer.step()
        moved = before - flat(model.parameters())
        assert moved.any()
        assert all(torch.cosine_similarity(moved, gradient, dim=0) >= COSINE for gradient in wanted)
        corrected += optimizer.report.movement.corrected
    assert corrected > 0  # the optimizer's own update would have hurt somebody


@pytest.mark.parametrize("name", PACKAGED)
def test_one_task_is_the_plain_packaged_optimizer_to_the_bit(name):
    model, other = twins()
    plain, wrapped = packaged(name, other), gradsurg.wrap(packaged(name, model))
    for batch in range(4):
        for optimizer, net in ((plain, other), (wrapped, model)):
            optimizer.zero_grad()
            loss = net.losses(batch)["left"]
            (loss if optimizer is plain else optimizer.total({"left": loss})).backward()
            optimizer.step()
    assert equal_weights(model, other)


def test_an_abstract_class_first_changes_nothing_about_wrapping():
    model = build()
    optimizer = Concrete(model.parameters())
    wrapped = gradsurg.wrap(optimizer)
    assert wrapped is optimizer
    assert isinstance(wrapped, Concrete)
    assert isinstance(wrapped, gradsurg.MultiTaskOptimizer)
    assert type(wrapped) is type(gradsurg.wrap(Concrete(build().parameters())))
    train(wrapped, model, range(2))
    assert wrapped.zeroed == 2  # its own zero_grad runs, below ours
    assert wrapped.report.step == 1
    for model_copy, copied in (copy.deepcopy((model, wrapped)), pickle.loads(pickle.dumps((model, wrapped)))):
        train(copied, model_copy, range(2, 4))
        assert type(copied) is type(wrapped)
    train(wrapped, model, range(2, 4))
    assert equal_weights(model, model_copy)
    assert type(gradsurg.unwrap(wrapped)) is Concrete


def test_a_trainer_may_put_a_class_on_top_of_an_abstract_one():
    model = build()
    wrapped = gradsurg.wrap(Concrete(model.parameters()))
    wrapped.__class__ = type("Proxy", (type(wrapped),), {"more": 1})
    train(wrapped, model, range(2))
    assert wrapped.more == 1
    assert wrapped.report.step == 1


def test_arguments_of_step_reach_the_optimizer():
    model = build()
    wrapped = gradsurg.wrap(Concrete(model.parameters()))
    for call in (lambda: wrapped.step(factor=0.5), lambda: wrapped.step(None, 0.5)):
        wrapped.zero_grad()
        wrapped.total(model.losses(0)).backward()
        assert call() == 0.5
    with pytest.raises(TypeError, match="wrong"):
        wrapped.step(wrong=1)
