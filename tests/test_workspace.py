"""Buffers: kept, never shared by threads, zero beyond the numbers, and narrow enough to be summed exactly."""

import threading

import pytest
import torch

from gradsurg.blocks import BLOCK, SMALL
from gradsurg.workspace import LANE, STEP, Workspace, lanes

CPU = torch.device("cpu")


def test_buffers_are_kept_and_never_shared_by_threads():
    workspace = Workspace()
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
    workspace = Workspace()
    workspace.buffer(0, rows * (size + 8192), torch.float64, CPU).fill_(float("nan"))  # of whoever was there before
    for k in range(3):
        pieces = [torch.full((size,), float(i + k + 1)) for i in range(rows)]
        matrix = workspace.stack(0, [[piece] for piece in pieces])
        assert matrix.dtype == torch.float64
        assert torch.equal(matrix[:, :size].float(), torch.stack(pieces))
        assert not matrix[:, size:].any()
        stacked = lanes(matrix)
        assert stacked.data_ptr() == matrix.data_ptr()
        assert stacked.shape[2] <= LANE
        assert torch.equal(stacked.transpose(0, 1).reshape(rows, -1), matrix)
        if k == 1:  # another shape in between leaves its numbers where this one has none
            workspace.stack(0, [[torch.ones(size + 5000)]] * (rows + 1))


def test_the_last_part_of_a_tensor_is_a_matrix_of_the_same_shape():
    # So that the views of it are not made anew: they cost more than its products.
    workspace = Workspace()
    whole = workspace.stack(0, [[torch.ones(33_312)]] * 2)
    last = workspace.stack(0, [[torch.ones(33_276)]] * 2)
    assert (whole.shape, whole.data_ptr()) == (last.shape, last.data_ptr())


def test_pieces_of_several_dtypes_come_together():
    workspace = Workspace()
    pieces = [[torch.arange(3.0), torch.arange(2.0)], [], [torch.arange(5).bfloat16()]]
    assert workspace.stack(0, pieces)[:, :5].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
