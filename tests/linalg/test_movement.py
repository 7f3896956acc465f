"""What a step moved, and its correction, against their float64 twins."""

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.blocks import BLOCK, SMALL
from gradsurg.linalg.combine import correct_
from gradsurg.linalg.movement import inner_update
from tests.linalg.gradient_rows import EXACT, QUICK, rows_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("exact", [False, True])
def test_movement_and_correction_are_those_of_the_twin(dtype, exact):
    before, rows = rows_of([(), (3,), (40, 5), (SMALL + 3,), (BLOCK + 5,)], 3, dtype=dtype)
    generator = torch.Generator().manual_seed(9)
    after = [p + 0.1 * torch.randn(p.shape, generator=generator).to(dtype) for p in before]
    signs = [1.0, -1.0, 1.0, -1.0, 1.0]
    inner, square = inner_update(rows, before, after, signs, exact=exact)
    want, want_square = reference.inner_update(rows, before, after, signs)
    lengths = reference.gramian(rows, before).diagonal().sqrt() * want_square**0.5
    tolerance = EXACT if exact else QUICK
    assert ((inner - want).abs() <= tolerance * lengths).all()
    assert square == pytest.approx(want_square, rel=tolerance)
    coefficients = [0.0, 0.7, -0.2]
    corrected = [p.clone() for p in after]
    correct_(rows, coefficients, corrected, signs, exact=exact)
    exactly = reference.correct(rows, coefficients, after, signs)
    unit = torch.finfo(dtype).eps
    assert ((reference.flat(corrected, after) - exactly).abs() <= unit * (exactly.abs() + 5)).all()


def test_correction_reaches_parameters_that_are_views():
    base = torch.zeros(4, 6)
    parameter = base[:, ::2]
    correct_([[torch.ones(4, 3)]], [0.5], [parameter], [1.0])
    assert torch.equal(parameter, torch.full((4, 3), -0.5))
    assert torch.equal(base[:, 1::2], torch.zeros(4, 3))
