"""What update_cuda.py does without a kernel; the rest is in tests/kernels."""

import pytest
import torch

from gradsurg.guarantee.update_cuda import _norms


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partitions", [[0] * 5, [0, 0, 1, 3, 3], [0, 1, 2, 3, 4]], ids=str)
def test_lengths_of_partitions(partitions, narrow):
    parameters = [torch.randn(n) for n in (3, 5, 7, 2, 9)]
    parameters[3] = parameters[3].to(narrow)
    for k, length in enumerate(_norms(parameters, partitions).tolist()):
        mine = [p.double() for p, partition in zip(parameters, partitions, strict=True) if partition == k]
        # A norm has its parameter's dtype.
        assert length == pytest.approx(sum(float(p.square().sum()) for p in mine) ** 0.5, rel=torch.finfo(narrow).eps)
