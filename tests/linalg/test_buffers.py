"""Buffers: kept, never shared by threads, zero beyond the numbers, and narrow enough to be summed exactly."""

import threading

import pytest
import torch

from gradsurg.linalg.blocks import BLOCK, SMALL
from gradsurg.linalg.buffers import LANE, STEP, Buffers

CPU = torch.device("cpu")


def test_buffers_are_kept_and_never_shared_by_threads():
    workspace = Buffers()
    first = workspace.buffer(0, 10, torch.float64, torch.device("cpu"))
    assert workspace.buffer(0, 20, torch.float64, torch.device("cpu")).data_ptr() == first.data_ptr()
    assert workspace.buffer(1, 10, torch.float64, torch.device("cpu")).data_ptr() != first.data_ptr()
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(workspace.buffer(0, 10, torch.float64, first.device)))
    thread.start()
    thread.join()
    assert elsewhere[0].data_ptr() != first.data_ptr()
    larger = workspace.buffer(0, BLOCK + SMALL + 1, torch.float64, first.device)
    assert larger.numel() == BLOCK + SMALL + 1
    assert workspace.buffer(0, 10, torch.float64, first.device).data_ptr() == larger.data_ptr()


@pytest.mark.parametrize("size", [1, 7, STEP, LANE - 1, LANE, LANE + 1, 3 * LANE, 3 * LANE + 5, 131_072, 131_073])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_matrix_has_its_numbers_and_then_nothing(size, rows):
    workspace = Buffers()
    workspace.buffer(0, rows * (size + 8192), torch.float64, CPU).fill_(float("nan"))  # of whoever was there before
    for k in range(3):
        pieces = [torch.full((size,), float(i + k + 1)) for i in range(rows)]
        matrix = workspace.stack(0, [[piece] for piece in pieces])
        numbers, lanes = matrix.numbers, matrix.lanes
        assert numbers.dtype == torch.float64
        assert torch.equal(numbers.float(), torch.stack(pieces))
        assert all(torch.equal(row, each) for row, each in zip(matrix.rows, numbers, strict=True))
        assert lanes.shape[2] <= LANE
        assert lanes.data_ptr() == numbers.data_ptr()
        whole = lanes.transpose(0, 1).reshape(rows, -1)
        assert torch.equal(whole[:, :size], numbers)
        assert not whole[:, size:].any()
        for i, (strip, before) in enumerate(matrix.strips(2)):
            assert torch.equal(strip, lanes[:, 2 * i : 2 * i + 2])
            assert torch.equal(before, lanes[:, : 2 * i + 2].transpose(1, 2))
        if k == 1:  # another shape in between leaves its numbers where this one has none
            workspace.stack(0, [[torch.ones(size + 5000)]] * (rows + 1))


def test_the_last_part_of_a_tensor_fits_the_matrix_of_the_others():
    # So that the views of it are not made anew: they cost more than its products.
    workspace = Buffers()
    matrix = workspace.stack(0, [[torch.ones(33_312)]] * 3)
    strips = matrix.strips(2)
    assert workspace.stack(0, [[torch.ones(33_276)]] * 3) is matrix
    assert matrix.strips(2) is strips
    assert matrix.numbers.shape == (3, 33_276)
    assert matrix.lanes.sum() == 3 * 33_276
    assert workspace.stack(0, [[torch.ones(33_312)]] * 3).lanes.sum() == 3 * 33_312
    assert workspace.stack(0, [[torch.ones(20_000)]] * 3) is not matrix


def test_pieces_of_several_dtypes_come_together():
    workspace = Buffers()
    pieces = [[torch.arange(3.0), torch.arange(2.0)], [], [torch.arange(5).bfloat16()]]
    assert workspace.stack(0, pieces).numbers.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
