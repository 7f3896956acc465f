"""The mark that stands for waiting rows, and what can be read off it."""

import pytest
import torch
from torch import nn

from gradsurg.gradients.sentinel import Sentinel

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
SHAPES = [(), (3,), (2, 4)]


def marked(dtype=torch.float32, shape=(3,)):
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    return p, Sentinel(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_untouched_it_is_there_and_hides_nothing(dtype, shape):
    p, mark = marked(dtype, shape)
    assert p.grad.dtype == dtype
    assert mark.fate() == "there"
    assert mark.below() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroed_by_any_route_it_is_gone(dtype):
    for zero in (
        lambda p: p.grad.zero_(),
        lambda p: p.grad.data.zero_(),
        lambda p: setattr(p, "grad", None),
        lambda p: setattr(p, "grad", torch.zeros_like(p)),
        lambda p: torch._foreach_zero_([p.grad]),
    ):
        p, mark = marked(dtype)
        zero(p)
        assert mark.fate() == "gone"


@pytest.mark.parametrize("scale", [2.0**-24, 1 / 65536, 0.3, 1.0])
def test_scaled_it_says_so(scale):
    # GradScaler unscales without a trace in _version, as .data does; clipping leaves one.
    for multiply in (lambda g: g.data.mul_(scale), lambda g: torch._foreach_mul_([g], scale)):
        p, mark = marked()
        multiply(p.grad)
        # A scale of 1 through .data leaves no trace, but then nothing happened.
        assert mark.fate() == ("there" if p.grad._version == mark._version and scale == 1 else "scaled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_added_to_it_gives_back_what_was_added(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    for smallest in (0.0, 1e-3, 1.0):
        p, mark = marked(dtype, shape)
        # At least one number above the mark itself; zero where a relu is dead, which must not keep a trace of it.
        g = torch.randn(p.shape, generator=generator).abs().add(0.5).to(dtype)
        if g.dim():
            g[(0,) * g.dim()] = smallest
        p.grad.add_(g)
        assert mark.fate() == "added to"
        assert torch.equal(mark.below(), g)


def foreign(shape=(3,)):
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return p, p.grad.clone(), Sentinel(p)


def test_a_foreign_gradient_is_left_as_it_is():
    p, was, mark = foreign()
    assert torch.equal(p.grad, was)
    assert mark.fate() == "there"
    assert mark.below() is p.grad


@pytest.mark.parametrize("route", ["zero_", "data", "None", "replaced"])
def test_a_foreign_gradient_zeroed_is_gone(route):
    p, _, mark = foreign()
    if route == "zero_":
        p.grad.zero_()
    elif route == "data":
        p.grad.data.zero_()
    else:
        p.grad = None if route == "None" else torch.zeros_like(p)
    assert mark.fate() == "gone"


@pytest.mark.parametrize("scale", [1 / 65536, 0.3, 1.0])
def test_a_foreign_gradient_scaled_says_so(scale):
    p, _, mark = foreign()
    torch._foreach_mul_([p.grad], scale)
    assert mark.fate() == "scaled"
    p, _, mark = foreign()
    p.grad.data.mul_(scale)
    assert mark.fate() == ("there" if scale == 1.0 else "scaled")


def test_a_foreign_gradient_added_to_holds_the_sum():
    p, was, mark = foreign()
    for added in (was, torch.tensor([0.0, 2.0, 0.0]), -was - 1):  # the same again, one number, another sign
        p.grad.copy_(was)
        p.grad.add_(added)
        assert mark.fate() == "added to"
        assert torch.equal(mark.below(), was + added)


def test_a_sparse_foreign_gradient_tells_only_whether_it_changed():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.sparse_coo_tensor([[1]], [2.0], (4,))
    mark = Sentinel(p)
    assert mark.fate() == "there"
    p.grad.mul_(0.5)
    assert mark.fate() == "added to"
    p.grad = None
    assert mark.fate() == "gone"
