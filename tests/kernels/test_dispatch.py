"""Which path and which kernel: both sides of every threshold."""

import pytest
import torch

from gradsurg.kernels import dispatch
from gradsurg.kernels.dispatch import gramian_kernel, path, task_tiles, vector

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLOAT = (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("backend", "device", "available", "interpreted", "wanted"),
    [
        ("auto", CUDA, True, False, "triton"),
        ("auto", CUDA, False, False, "torch"),
        ("auto", CPU, True, False, "torch"),
        ("auto", CPU, True, True, "triton"),
        ("torch", CUDA, True, False, "torch"),
        ("triton", CUDA, True, False, "triton"),
        ("triton", CPU, True, True, "triton"),
    ],
)
def test_path(backend, device, available, interpreted, wanted):
    assert path(backend, device, dtypes=[FLOAT], available=available, interpreted=interpreted) == wanted


@pytest.mark.parametrize(
    ("device", "available", "sparse", "dtypes", "message"),
    [
        (CUDA, False, False, [FLOAT], "Triton is not installed"),
        (CPU, True, False, [FLOAT], "the gradients are on cpu"),
        (CUDA, True, True, [FLOAT], "there are sparse gradients"),
        (CUDA, True, False, [FLOAT, (torch.float64, torch.float32)], "no kernel"),
        (CUDA, True, False, [(torch.float8_e5m2, torch.float32)], "no kernel"),
    ],
)
def test_triton_asked_for_where_it_cannot_run(device, available, sparse, dtypes, message):
    arguments = {"dtypes": dtypes, "sparse": sparse, "available": available, "interpreted": False}
    with pytest.raises(ValueError, match=message):
        path("triton", device, **arguments)
    assert path("auto", device, **arguments) == "torch"


def test_unknown_backend():
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton'"):
        path("tritn", CPU)


@pytest.mark.parametrize("row", list(dispatch.DTYPES))
@pytest.mark.parametrize("out", list(dispatch.DTYPES))
def test_every_pair_of_dtypes_has_a_path(row, out):
    wanted = "triton" if out in dispatch.DTYPES[row] else "torch"
    assert path("auto", CUDA, dtypes=[(row, out)], available=True, interpreted=False) == wanted


def test_dtypes_of_rows():
    rows = [[torch.zeros(2), None], [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.complex64)]]
    like = [torch.zeros(2), torch.zeros(2, dtype=torch.complex64)]
    assert dispatch.row_dtypes(rows, like) == {FLOAT, (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("m", "wanted"),
    [
        (1, ("pairs", 2)),
        (2, ("pairs", 2)),
        (3, ("pairs", 4)),
        (4, ("pairs", 4)),
        (5, ("pairs", 8)),
        (8, ("pairs", 8)),
        (9, ("dots", 16)),
        (16, ("dots", 16)),
        (17, ("dots", 32)),
        (32, ("dots", 32)),
    ],
)
def test_gramian_kernel(m, wanted):
    assert gramian_kernel(m) == wanted


@pytest.mark.parametrize(("m", "tiles"), [(1, 1), (32, 1), (33, 3), (48, 3), (49, 4), (200, 13)])
def test_tiles_of_tasks(m, tiles):
    ranges = task_tiles(m)
    assert len(ranges) == tiles
    assert [i for first, end in ranges for i in range(first, end)] == list(range(m))
    assert all(end - first <= (32 if tiles == 1 else 16) for first, end in ranges)


@pytest.mark.parametrize(
    ("dtypes", "aligned", "wanted"),
    [
        ([torch.float32], True, 4),
        ([torch.bfloat16], True, 8),
        ([torch.float64], True, 2),
        ([torch.float32, torch.bfloat16], True, 8),
        ([torch.float32], False, 1),
        ([torch.bfloat16], False, 1),
    ],
)
def test_elements_loaded_at_once(dtypes, aligned, wanted):
    assert vector(dtypes, aligned) == wanted


def test_interpreter_is_read_from_the_environment(monkeypatch):
    for value, wanted in [("1", True), ("0", False)]:
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch.is_interpreted() is wanted
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.is_interpreted() is False
