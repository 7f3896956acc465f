"""Steps on a device that is not the CPU: torch's meta device, which has shapes and dtypes and no numbers.

The interpreter has every tensor on the CPU, where one that was forgotten there would not be noticed. Here it is: torch
refuses to mix devices, and there is nothing that could be read back.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are launched where it is")

from triton.runtime.jit import JITFunction

from gradsurg.linalg import reference
from gradsurg.linalg.kernels import table
from gradsurg.optimizer import direction as operation
from tests.kernels.whole_step import WITHOUT_WAITING, wrapped

DEVICE = torch.device("meta")


@pytest.fixture
def launches(monkeypatch):
    """Take the kernels' path, and look at launches instead of doing them."""
    seen = []

    def launcher(self, grid):
        def launch(*arguments, **_):
            tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
            assert {t.device for t in tensors} == {DEVICE}
            assert all(t.is_contiguous() for t in tensors)
            assert all(size > 0 for size in grid)
            seen.append(self.__name__)

        return launch

    def upload(values, device, dtype=torch.int64):
        return torch.empty(len(values), dtype=dtype, device=device)

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(operation, "_path", lambda inputs, shared: "triton")
    monkeypatch.setattr(table, "_cached", lambda key, device, make, fleeting=False: make())
    monkeypatch.setattr(table, "_upload", upload)
    return seen


def model_and_rows():
    """Return the parameters of whole_step.Model, and the gradients of three tasks that have a head each."""

    def parameter(*shape, dtype=torch.float32):
        return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE))

    first, shift, second = parameter(5, 6), parameter(), parameter(6, 4, dtype=torch.bfloat16)
    heads = [parameter(4) for _ in range(3)]
    rows = {
        name: [
            *map(torch.empty_like, (first, shift, second)),
            *(torch.empty_like(p) if p is own else None for p in heads),
        ]
        for name, own in zip("abc", heads, strict=True)
    }
    return SimpleNamespace(first=first, shift=shift, second=second, heads=heads), rows


@pytest.mark.parametrize(("options", "optimizer"), WITHOUT_WAITING)
def test_a_step_stays_on_its_device(launches, options, optimizer):
    model, rows = model_and_rows()
    mine = wrapped(model, optimizer, backend="auto", **options)
    mine.set_gradients(rows)
    mine.step()
    wanted = {"pairs_kernel", "reduce_kernel", "combine_kernel"}
    if options.get("guarantee", "update") == "update":
        wanted |= {"inner_kernel", "cone_kernel"}
    assert wanted <= set(launches)


def test_the_twins_stay_on_their_device():
    rows = [[torch.empty(3, device=DEVICE)] for _ in range(2)]
    assert reference.gramian(rows, rows[0]).device == DEVICE
    assert reference.combine(rows, [1.0, 2.0], rows[0]).device == DEVICE
