"""Tensors are cut into blocks evenly, and every number is read once."""

import pytest
import torch

from gradsurg.linalg.blocks import BLOCK, SMALL, blocks, cut


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(5, 8, [5]), (11, 8, [11]), (100, 40, [64, 36]), (40, 9, [16, 16, 8])]
)
def test_tensors_are_cut_evenly(count, size, lengths):
    a, b = torch.arange(count), -torch.arange(count)
    parts = list(cut([a, b], size))
    assert [len(x) for x, _ in parts] == lengths
    assert all(torch.equal(torch.cat([part[k] for part in parts]), whole) for k, whole in enumerate((a, b)))


def test_blocks_read_every_number_once_and_keep_tags_apart():
    shapes = [(SMALL - 1,), (2 * BLOCK + 7,), (5,), (6,), ()]
    tensors = [torch.full(shape, float(k + 1)) for k, shape in enumerate(shapes)]
    tags = ["a", "a", "b", "a", "b"]
    seen = dict.fromkeys(range(len(shapes)), 0)
    for tag, (pieces,) in blocks([tensors], tags=tags):
        assert sum(piece.numel() for piece in pieces) <= BLOCK + SMALL
        for k in range(len(shapes)):
            count = sum(int((piece == k + 1).sum()) for piece in pieces)
            assert count == 0 or tags[k] == tag
            seen[k] += count
    assert seen == {k: t.numel() for k, t in enumerate(tensors)}
