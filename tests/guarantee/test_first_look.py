"""The first look is right about the tasks that are clear of harm, and silent about all others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurg.guarantee.update import CLEAR, first_look
from gradsurg.linalg import reference
from gradsurg.linalg.packing import GradientTable

SHAPES = [(40_000,), (3, 5), (7,)]


def case(lean, seed, shapes=SHAPES, m=3):
    """Return rows, their norms, and parameters before and after a step along their sum plus noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = GradientTable([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(m))
    before = [torch.randn(shape, generator=generator) for shape in shapes]
    after = [
        b - 1e-3 * (lean * sum(row[k] for row in rows) + torch.randn(b.shape, generator=generator))
        for k, b in enumerate(before)
    ]
    norms = reference.gramian(rows, before).diagonal().sqrt().tolist()
    return rows, norms, before, after


@settings(max_examples=30, deadline=None)
@given(lean=st.floats(-0.1, 1.0), sign=st.sampled_from([1.0, -1.0]), seed=st.integers(0, 1000))
def test_agrees_with_the_twin_or_says_nothing(lean, sign, seed):
    rows, norms, before, after = case(lean, seed)
    signs = [sign] * len(before)
    want, square = reference.inner_update(rows, before, after, signs)
    cosines = want / (torch.tensor(norms, dtype=torch.float64) * square**0.5)
    seen = first_look(rows, norms, before, after, signs)
    if seen is None:
        assert cosines.min() < 1.2 * CLEAR
    else:
        assert cosines.min() > 0.8 * CLEAR
        torch.testing.assert_close(
            torch.tensor(seen[0], dtype=torch.float64), want, rtol=0, atol=1e-5 * float(want.max())
        )
        assert seen[1] == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_says_nothing_of_no_movement_and_of_numbers_that_are_none(value):
    rows, norms, before, _ = case(1.0, 0)
    assert first_look(rows, norms, before, [b - value for b in before], [1.0] * 3) is None


def test_says_nothing_of_other_dtypes_and_layouts():
    rows, norms, before, after = case(1.0, 0)
    assert first_look(list(rows), norms, before, after, [1.0] * 3) is None
    assert first_look(rows, norms, before, [a.double() for a in after], [1.0] * 3) is None
    assert first_look(rows, norms, before, after, [1.0, 1.0, -1.0]) is None
    rows, norms, before, after = case(1.0, 0, [(300, 200), (200, 300)])
    assert first_look(rows, norms, before, [a.T.contiguous().T for a in after], [1.0] * 2) is None


def test_constant_rows_do_not_fool_it():
    """All products equal: where float32 sums drift most."""
    rows = GradientTable([[torch.full((200_000,), 0.1), torch.full((5,), 0.1)]])
    before = [torch.full((200_000,), 0.7), torch.full((5,), 0.7)]
    after = [b - 0.3 for b in before]
    want, square = reference.inner_update(rows, before, after, [1.0, 1.0])
    seen = first_look(rows, [float(reference.gramian(rows, before).sqrt())], before, after, [1.0, 1.0])
    assert seen is not None
    assert seen[0][0] == pytest.approx(float(want), rel=2e-3)
    assert seen[1] == pytest.approx(square, rel=2e-3)


@pytest.mark.parametrize(("d", "g"), [(1e-30, 1.0), (1e-12, 1e-30), (1e25, 1.0), (1e15, 1e30)])
def test_says_nothing_of_numbers_that_single_precision_has_no_products_for(d, g):
    rows = GradientTable([[torch.full((50,), g), torch.full((5,), g)]])
    before = [torch.full((50,), d), torch.full((5,), d)]
    norms = [float(reference.gramian(rows, before).sqrt())]
    assert first_look(rows, norms, before, [torch.zeros_like(b) for b in before], [1.0, 1.0]) is None


def test_a_task_that_wants_nothing_is_clear():
    rows, norms, before, after = case(1.0, 0)
    rows = GradientTable([*rows, [torch.zeros_like(b) for b in before]])
    seen = first_look(rows, [*norms, 0.0], before, after, [1.0] * 3)
    assert seen is not None
    assert seen[0][-1] == 0
