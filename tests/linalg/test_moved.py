"""Which numbers count as left in place by the optimizer, and the Gramian of the others, against plain float64."""

import pytest
import torch

from gradsurg.linalg.moved import gramian_moved, left_in_place, pulled


def masks(before, after, gradients=None):
    gradients = [None] * len(before) if gradients is None else gradients
    return [None if mask is None else mask.tolist() for mask in left_in_place(before, after, gradients)]


def test_a_tensor_that_did_not_move_is_left_in_place():
    p = torch.randn(3)
    assert masks([p], [p.clone()]) == [[True] * 3]
    assert masks([p], [p + 1]) == [None]
    assert masks([torch.empty(0)], [torch.empty(0)]) == [None]


def test_zeros_that_stay_zero_are_left_in_place():
    assert masks([torch.tensor([0.0, 1.0, 2.0])], [torch.tensor([0.0, 1.5, 2.5])]) == [[True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_whose_gradient_was_zeroed_are_left_in_place(dtype):
    before, after = torch.ones(4, dtype=dtype), torch.tensor([1.0, 1.0, 1.5, 1.0], dtype=dtype)
    after[3] += torch.finfo(dtype).eps
    assert masks([before], [after], [torch.tensor([0.0, 1e-9, 1.0, 1e-3])])[0][:1] == [True]


def test_what_rounding_hides_is_not_left_in_place():
    """One number in a thousand moved by less than half of its last place, and a step that no number could store."""
    before = torch.ones(1000)
    after = before - 1e-3
    after[7] = 1.0
    assert masks([before], [after]) == [None]
    after = before.clone()
    after[:500] -= 6e-8
    assert masks([before], [after]) == [None]


def test_a_mask_inside_the_optimizer_is_seen():
    before = torch.ones(1000)
    after = before - 1e-3
    after[:300] = 1.0
    assert masks([before], [after]) == [[True] * 300 + [False] * 700]


def test_a_complex_number_has_two_parts():
    before = torch.tensor([0j, 1 + 0j])
    (mask,) = left_in_place([before], [before + 1], [None])
    assert mask.tolist() == [[False, True], [False, True]]


def test_pulled_asks_for_a_row_that_is_not_zero_there():
    mask = torch.tensor([True, False])
    assert pulled([[torch.tensor([1.0, 0.0])], [None]], [mask])
    assert not pulled([[torch.tensor([0.0, 1.0])], [None]], [mask])
    assert pulled([[torch.sparse_coo_tensor([[0]], [1.0], (2,))]], [mask])
    assert not pulled([[torch.tensor([1.0, 0.0])]], [None])


@pytest.mark.parametrize("sizes", [[(3, 4), (5,)], [(300, 400), (7,), (64, 64)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_gramian_in_the_metric_is_the_plain_one(sizes, dtype):
    generator = torch.Generator().manual_seed(1)
    before = [torch.randn(s, generator=generator, dtype=dtype) for s in sizes]
    after = [p - 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype) for p in before]
    after[0].view(-1)[:5] = before[0].view(-1)[:5]
    rows = [[torch.randn(p.shape, generator=generator, dtype=dtype) for p in before] for _ in range(3)]
    rows[1][1] = None
    metric = [1.0, 0.25, 0.0][: len(sizes)]
    left = [None] * len(sizes)
    real = torch.view_as_real if dtype.is_complex else (lambda t: t)
    left[0] = real(before[0]) == real(after[0])
    G, square = gramian_moved(rows, before, after, metric, left)
    flat = [
        torch.cat(
            [
                (
                    torch.zeros_like(real(p)).double().reshape(-1)
                    if g is None or factor == 0
                    else (real(g).double() * factor**0.5 * (1 if mask is None else ~mask)).reshape(-1)
                )
                for g, p, factor, mask in zip(row, before, metric, left, strict=True)
            ]
        )
        for row in rows
    ]
    J = torch.stack(flat)
    assert (G - J @ J.T).abs().max() <= 1e-12 * (J @ J.T).abs().max()
    plain = sum(
        (real(p).double() - real(q).double()).square().sum() / factor
        for p, q, factor in zip(before, after, metric, strict=True)
        if factor
    )
    assert square == pytest.approx(float(plain), rel=1e-12)
