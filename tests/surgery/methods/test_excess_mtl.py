"""ExcessMTL without a history; test_published_smoothed.py holds its steps to the paper's equations."""

import torch

import gradsurg


def test_alone_a_matrix_is_a_first_step():
    spread = torch.tensor([1e-3, 1e-1, 1.0, 10.0, 1.0, 1e2, 1e-2])
    J = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    assert torch.equal(gradsurg.combine(J, "excess_mtl"), J.mean(0))
