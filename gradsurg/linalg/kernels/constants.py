"""TODO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg.kernels.table import constant as uploaded

__all__ = ["constant"]


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the values as a 1-D tensor on the device; not to be written to.

    torch.tensor(values, device="cuda") copies from memory that is not pinned, and so waits for all that was launched.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return uploaded(values, device, dtype)
