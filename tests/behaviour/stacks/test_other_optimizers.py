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


class ScheduleFree(torch.optim.Optimizer):
    """Wraps another optimizer as schedulefree's ScheduleFreeWrapper does; its state dict has no parameter groups."""

    def __init__(self, base):
        self.base, self.state = base, base.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, self.defaults = {}, {}, {}

    param_groups = property(lambda self: self.base.param_groups)

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def state_dict(self):
        return {"train_mode": True, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict["base"])


OUTER = {
    "Lookahead": lambda base: pytorch_optimizer.Lookahead(base, k=2),
    "ScheduleFreeWrapper": lambda base: pytorch_optimizer.ScheduleFreeWrapper(base),
    "Magma": lambda base: pytorch_optimizer.Magma(base),
    "schedulefree's": ScheduleFree,
    "two deep": lambda base: pytorch_optimizer.Lookahead(pytorch_optimizer.Lookahead(base, k=2), k=3),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("options", [{"normalize": "dwa"}, {"surgery": "modo"}, {"rotate": 1}], ids=str)
def test_state_dicts_without_parameter_groups(outer, options):
    """A wrapper's own state dict holds the inner one: what the surgery remembers is found in it again."""
    model, other = twins()

    def build_optimizer(net):
        optimizer = OUTER[outer](torch.optim.AdamW(net.parameters(), lr=0.01))
        if hasattr(optimizer, "train"):
            optimizer.train()
        return gradsurg.wrap(optimizer, **options)

    one, two = build_optimizer(model), build_optimizer(other)
    torch.manual_seed(0)
    train(one, model, range(3))
    saved = copy.deepcopy(one.state_dict())
    other.load_state_dict(model.state_dict())
    two.load_state_dict(saved)
    draws = torch.get_rng_state()  # Magma draws masks
    train(one, model, range(3, 6))
    torch.set_rng_state(draws)
    train(two, other, range(3, 6))
    assert two.report.step == 5
    assert equal_weights(model, other)
    bare = OUTER[outer](torch.optim.AdamW(other.parameters(), lr=0.01))
    bare.load_state_dict(saved)
    saved["base_optimizer" if "base_optimizer" in saved else "base"] = 1
    with pytest.raises((TypeError, AttributeError)):  # the wrapper's own error
        two.load_state_dict(saved)
