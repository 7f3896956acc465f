"""The mark that stands for waiting rows, and what can be read off it."""

import warnings

import pytest
import torch
from torch import nn

from gradsurg.gradients.rows import Row
from gradsurg.gradients.sentinel import Sentinel, Sentinels, watched

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
    was = foreign()[1]
    for added in (was, torch.tensor([0.0, 2.0, 0.0]), -was - 1):  # the same again, one number, another sign
        p, _, mark = foreign()
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


MASKS = {
    "a mask": lambda g: g.mul_(torch.tensor([0.0, 1.0, 0.0])),
    "the first rows": lambda g: g[:2].zero_(),
    "the last rows, unscaled too": lambda g: g.mul_(2.0**-10)[1:].zero_(),
    "through data": lambda g: g.data[:1].zero_(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("before", ["nothing", "foreign"])
def test_a_mask_leaves_some_of_it(dtype, mask, before):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    if before == "foreign":
        p.grad = torch.tensor([1.0, -2.0, 3.0]).to(dtype)
    mark = Sentinel(p)
    MASKS[mask](p.grad)
    assert mark.fate() == "in part"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_that_is_masked_or_scaled_holds_some_of_it(dtype):
    p, mark = marked(dtype)
    p.grad = p.grad * torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    assert mark.fate() == "in part"
    p, mark = marked(dtype)
    p.grad = p.grad * 0.5
    assert mark.fate() == "scaled"
    # The next gradient, after zero_grad().
    p, mark = marked(dtype)
    p.grad = torch.tensor([0.0, 1e-3, -1.0]).to(dtype)
    assert mark.fate() == "gone"


def test_a_penalty_after_zeroing_in_place_shows_if_it_has_zeros():
    p, mark = marked()
    p.grad.zero_()
    p.grad.add_(torch.tensor([0.0, 1.0, 2.0]))
    assert mark.fate() == "in part"


@pytest.mark.parametrize("before", ["nothing", "foreign"])
def test_of_two_writes_the_first_may_have_been_zeros(before):
    p, mark = marked() if before == "nothing" else foreign()[::2]
    for write in (torch.Tensor.zero_, lambda g: g.add_(torch.tensor([1.0, -2.0, 3.0]))):
        write(p.grad)
    assert mark.fate() == "in part"


def test_a_sum_in_another_tensor_is_not_taken_for_zeroing():
    p, mark = marked()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a cycle, which the last line breaks
        p.square().sum().backward(create_graph=True)
    assert mark.fate() == "in part"
    p.grad = None


def of_two():
    parameters = [nn.Parameter(torch.ones(n)) for n in (2, 3)]
    return parameters, Sentinels(parameters)


def test_of_two_sentinels_both_tell():
    (p, q), marks = of_two()
    assert marks.fate() == "there"
    assert len(marks.below()) == 0
    q.grad.add_(torch.tensor([0.0, 1.0, 2.0]))
    assert marks.fate() == "added to"
    assert torch.equal(marks.below()[q], torch.tensor([0.0, 1.0, 2.0]))
    p.grad = None
    assert marks.fate() == "in part"
    q.grad = None
    assert marks.fate() == "gone"
    (p, q), marks = of_two()
    q.grad.mul_(0.5)
    assert marks.fate() == "scaled"
    q.grad.zero_()
    assert marks.fate() == "in part"
    p.grad.zero_()
    assert marks.fate() == "gone"


def test_which_parameters_are_watched():
    """Those without foreign gradients first; then not of one number, of different dimensions, and small."""
    sizes = [(9,), (3,), (1,), (5,), (2, 6), (4, 4)]
    nine, three, one, five, matrix, square = map(nn.Parameter, map(torch.ones, sizes))
    foreign = Row([(one, torch.ones(1)), (three, torch.ones(3)), (nine, torch.zeros(9))])

    def sizes_of(*reached):
        return [tuple(p.shape) for p in watched(reached, foreign)]

    assert sizes_of(square, nine, three, one, five, matrix) == [(5,), (2, 6)]
    assert len(foreign) == 3
    assert sizes_of(one, three, five, nine) == [(5,), (9,)]
    assert [p.numel() for p in foreign] == [1, 3]
    assert sizes_of(one, three, five) == [(5,), (3,)]
    assert sizes_of(one, three) == [(3,)]
    assert sizes_of(one) == [(1,)]
    assert sizes_of() == []
