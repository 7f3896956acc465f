"""wrap() and unwrap(): the same object, and what may be passed; the free functions see through proxies."""

import pytest
import torch
from torch import nn

import gradsurg
from tests.networks import build, equal_weights, same, twins
from tests.optimizer.every_optimizer import ROWS, make, models, one_task, several, train


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
def test_same_object_same_class(name, options, kind):
    model, _ = models(kind)
    bare = make(name, options, model)
    groups, state, defaults = bare.param_groups, bare.state, bare.defaults
    optimizer = gradsurg.wrap(bare)
    assert optimizer is bare
    assert isinstance(optimizer, gradsurg.MultiTaskOptimizer)
    assert isinstance(optimizer, getattr(torch.optim, name))
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert optimizer.defaults is defaults
    assert gradsurg.unwrap(optimizer) is bare
    assert type(bare) is getattr(torch.optim, name)
    assert not hasattr(bare, "total")
    assert all("gradsurg" not in group for group in bare.param_groups)
    train(bare, model, one_task, [0])  # and it still trains


def test_unwrapped_trains_as_if_never_wrapped():
    model, plain_model = twins()
    plain = torch.optim.Adam(plain_model.parameters())
    optimizer = gradsurg.unwrap(gradsurg.wrap(torch.optim.Adam(model.parameters())))
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)
    assert same(optimizer.state_dict(), plain.state_dict())


def test_wrap_again_after_unwrap_with_other_options():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), surgery="sum")
    optimizer = gradsurg.wrap(gradsurg.unwrap(optimizer), surgery="mgda")
    train(optimizer, model, several, range(2))
    train(gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1), surgery="mgda"), other, several, range(2))
    assert equal_weights(model, other)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.optim.Adam, r"class Adam: build it first"),
        (nn.Linear(2, 2), "given a Linear"),
        (None, "given a NoneType"),
        ("adam", "given a str"),
        ([], "no optimizer"),
        ([nn.Linear(2, 2)], "given a Linear"),
    ],
)
def test_wrap_says_what_to_pass(value, match):
    with pytest.raises(TypeError, match=match):
        gradsurg.wrap(value)


def test_wrap_twice_is_refused():
    optimizer = gradsurg.wrap(torch.optim.SGD(build().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="wrapped already"):
        gradsurg.wrap(optimizer)


def test_the_same_optimizer_twice_in_a_list_is_refused():
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="twice"):
        gradsurg.wrap([optimizer, optimizer])
    assert type(optimizer) is torch.optim.SGD


def test_a_refused_list_leaves_all_of_it_bare():
    good = torch.optim.SGD(build().parameters(), lr=0.1)
    with pytest.raises(TypeError):
        gradsurg.wrap([good, "bad"])
    with pytest.raises(ValueError, match="surgery"):
        gradsurg.wrap([good], surgery="conee")
    assert type(good) is torch.optim.SGD
    assert "gradsurg" not in good.param_groups[0]


@pytest.mark.parametrize("call", ["unwrap", "total", "backward", "report"])
def test_free_functions_say_when_nothing_is_wrapped(call):
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    arguments = [{}] if call in ("total", "backward") else []
    with pytest.raises(TypeError, match="not a wrapped optimizer"):
        getattr(gradsurg, call)(optimizer, *arguments)


class Proxy:
    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)


@pytest.mark.parametrize("names", [["optimizer"], ["_optimizer"], ["optimizer", "_optimizer"]])
def test_free_functions_see_through_proxies(names):
    model, other = twins()
    proxy = optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    direct = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1))
    for name in names:
        proxy = Proxy(proxy, name)
    gradsurg.total(proxy, model.losses(0)).backward()
    gradsurg.backward(direct, other.losses(0))
    assert same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert gradsurg.report(proxy) is optimizer.report is not None


def subclass_with_a_copied_dict(optimizer):
    """What Lightning puts around an optimizer."""
    base = type("Proxy", (), {"optimizer": property(lambda self: self._optimizer)})
    proxy = object.__new__(type("Proxied", (base, type(optimizer)), {}))
    proxy.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
    proxy._optimizer = optimizer
    return proxy


def test_a_proxy_with_a_copied_dict_sees_the_same_rows():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.05))
    direct = gradsurg.wrap(torch.optim.Adam(other.parameters(), lr=0.05))
    proxy = subclass_with_a_copied_dict(optimizer)
    for batch in range(3):
        proxy.zero_grad()
        proxy.total(model.losses(batch)).backward()
        optimizer.step()
        train(direct, other, several, [batch])
        assert same(proxy.report.weights, direct.report.weights)
        assert proxy.report.movement is not None
    assert equal_weights(model, other)
    assert gradsurg.unwrap(optimizer) is optimizer


def test_the_proxy_of_a_trainer_is_refused():
    accelerate = pytest.importorskip("accelerate")
    bare = torch.optim.SGD(build().parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(bare)
    with pytest.raises(TypeError, match=r"accelerator\.prepare\(gradsurg\.wrap\(optimizer\)\)"):
        gradsurg.wrap(prepared)
    assert type(bare) is torch.optim.SGD
    gradsurg.wrap(bare)


class DPOptimizer(torch.optim.Optimizer):
    """What Opacus makes of an optimizer, as far as wrap() can see."""

    def __init__(self, original):
        self.original_optimizer = original

    param_groups = property(lambda self: self.original_optimizer.param_groups)


def test_an_optimizer_that_makes_its_gradients_from_samples_is_refused():
    with pytest.raises(TypeError, match="noisy sum of gradients per sample"):
        gradsurg.wrap(DPOptimizer(torch.optim.SGD(build().parameters(), lr=0.1)))


def test_an_optimizer_without_torchs_hooks_is_refused():
    class Proxy(torch.optim.Optimizer):
        param_groups = property(lambda self: self.optimizer.param_groups)

        def __init__(self, optimizer):
            self.optimizer = optimizer

    with pytest.raises(TypeError, match="a trainer's proxy around an optimizer"):
        gradsurg.wrap(Proxy(torch.optim.SGD(build().parameters(), lr=0.1)))
