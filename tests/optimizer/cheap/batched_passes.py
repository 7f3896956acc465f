"""Optimizers with batched=True, and the comparison of their rows with those of m passes."""

import torch

import gradsurg
from tests.networks import trained, twins


def wrapped(model, **options):
    return gradsurg.wrap(torch.optim.SGD(trained(model), lr=0.05), batched=True, **options)


def was_batched(optimizer):
    return optimizer._gradsurg.told & {"batched works", "batched fails"} == {"batched works"}


def agree(got, want, tolerance=2e-6):
    """Whether rows have the same gaps, shapes and dtypes, and numbers up to float32's rounding of their norm."""
    assert got.keys() == want.keys()
    for name, row in want.items():
        assert [g is None for g in got[name]] == [g is None for g in row], name
        for a, b in zip(got[name], row, strict=True):
            if b is not None:
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                rounding = tolerance if b.dtype != torch.bfloat16 else 1e-2
                assert (a - b).abs().max() <= rounding * b.abs().max() + 1e-12, name
    return True


def trains_alike(steps, rtol, atol, **options):
    """Train twins with batched passes and one by one, and compare their parameters."""
    model, other = twins()
    optimizer, reference = wrapped(model, **options), gradsurg.wrap(torch.optim.SGD(trained(other), lr=0.05), **options)
    for batch in range(steps):
        for each, of in ((optimizer, model), (reference, other)):
            each.zero_grad()
            each.total(of.losses(batch)).backward()
            each.step()
    assert was_batched(optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
