"""What every test starts from: a fixed seed, two threads, and hypothesis runs that repeat."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# Property tests must find the same thing on every machine; "explore" looks for new counterexamples by hand.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("GRADSURG_HYPOTHESIS", "ci"))

# More threads than the CI machine has cores make small tensors slower, and sums depend on the split.
torch.set_num_threads(2)

# Sparse tensors are checked when they are built; left unsaid, torch warns that they are not.
torch.sparse.check_sparse_tensor_invariants.enable()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pictures_closed():
    """pyplot keeps every figure until it is closed, and warns from the 21st on; a test need not import it."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


@pytest.fixture(autouse=True)
def _switches_as_they_were():
    """A test that leaves a global switch of torch turned must not be able to change the next one."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    assert torch.is_grad_enabled() == grad
    assert torch.get_default_dtype() == dtype
