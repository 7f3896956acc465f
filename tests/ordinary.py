"""Ordinary instances, beside the hostile ones: rows that partly oppose each other, and unequal preferences."""

import torch


def matrix(m, seed, P=10, spread=0.0):
    """m rows of P numbers with seven tenths of their mean taken out; lengths differ by some `spread` decades."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(m, P, generator=generator, dtype=torch.float64)
    J = J - J.mean(0) * 0.7
    return J * 10 ** (spread * torch.randn(m, 1, generator=generator, dtype=torch.float64))


def preferences(m):
    return torch.linspace(0.5, 2, m, dtype=torch.float64)
