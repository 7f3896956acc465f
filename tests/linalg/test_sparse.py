"""Sparse gradients stay sparse, beside dense ones too."""

import torch

from gradsurg.linalg import reference
from gradsurg.linalg.combine import combine, correct_
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.movement import inner_update


def test_sparse_rows_stay_sparse():
    index = torch.tensor([[1, 3, 1]])
    a = torch.sparse_coo_tensor(
        index, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), (5, 2), check_invariants=True
    )
    b = torch.sparse_coo_tensor(
        torch.tensor([[3, 0]]), torch.tensor([[1.0, -1.0], [2.0, 2.0]]), (5, 2), check_invariants=True
    )
    dense = torch.arange(3.0)
    parameters = [torch.zeros(5, 2), torch.zeros(3)]
    rows = [[a, dense], [b, None], [None, dense]]
    assert torch.equal(gramian(rows), reference.gramian(rows, parameters))
    u = combine(rows, [1.0, 2.0, 3.0], parameters)
    assert u[0].is_sparse
    assert torch.equal(reference.flat(u, parameters), reference.combine(rows, [1.0, 2.0, 3.0], parameters))
    after = [torch.ones(5, 2), torch.ones(3)]
    inner, square = inner_update(rows, parameters, after, [1.0, 1.0])
    want, want_square = reference.inner_update(rows, parameters, after, [1.0, 1.0])
    assert torch.equal(inner, want)
    assert square == want_square
    wanted = reference.correct(rows, [1.0, 0.5, 2.0], after, [1.0, 1.0])
    correct_(rows, [1.0, 0.5, 2.0], after, [1.0, 1.0])
    assert torch.equal(reference.flat(after, parameters), wanted)


def test_sparse_and_dense_rows_of_one_parameter():
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[2.0]]), (3, 1), check_invariants=True)
    dense = torch.ones(3, 1)
    parameters = [torch.zeros(3, 1)]
    rows = [[sparse], [dense]]
    assert torch.equal(gramian(rows), reference.gramian(rows, parameters))
    u = combine(rows, [1.0, -1.0], parameters)
    assert torch.equal(reference.flat(u, parameters), reference.combine(rows, [1.0, -1.0], parameters))
