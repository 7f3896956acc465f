"""TaskRows: gradients add up per task and parameter, and nothing is copied that need not be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsurg.gradients.rows import TaskRows

NAMES = ["a", "b", "c"]
PARAMETERS = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(())]

# One gradient: task, parameter, seed of its values.
ARRIVALS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2), st.integers(0, 99)), max_size=12)


def gradient(k, seed, dtype=torch.float32):
    return torch.randn(PARAMETERS[k].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(ARRIVALS, st.booleans())
def test_rows_are_the_sums_of_what_came(arrivals, merged):
    rows, want, order = TaskRows(), {}, []
    for name, k, seed in arrivals:
        one = TaskRows() if merged else rows
        one.add(name, {PARAMETERS[k]: gradient(k, seed)})
        if merged:
            rows.merge(one)
        want[name, k] = want[name, k] + gradient(k, seed) if (name, k) in want else gradient(k, seed)
        if name not in order:
            order.append(name)
    assert list(rows) == order
    assert len(rows) == len(order)
    table = rows.table(PARAMETERS)
    for i, name in enumerate(order):
        assert name in rows
        for k in range(3):
            got = table[i][k]
            assert (got is None) == ((name, k) not in want)
            assert got is None or torch.equal(got, want[name, k])
    for k, p in enumerate(PARAMETERS):
        assert len(rows.of(p)) == sum((name, k) in want for name in order)
    reached_twice = [p for k, p in enumerate(PARAMETERS) if sum((n, k) in want for n in NAMES) >= 2]
    assert [id(p) for p in rows.shared(PARAMETERS)] == [id(p) for p in reached_twice]


def test_a_first_gradient_is_moved_and_a_second_added_in_place():
    rows, p = TaskRows(), PARAMETERS[0]
    first = gradient(0, 1)
    want = first + gradient(0, 2)
    rows.add("a", {p: first})
    assert rows["a"][p] is first
    rows.add("a", {p: gradient(0, 2)})
    assert rows["a"][p] is first
    assert torch.equal(first, want)


@given(ARRIVALS)
def test_narrow_rows_hold_the_dtype_exactly_where_tasks_meet(arrivals):
    rows, reached = TaskRows(torch.bfloat16), {}
    for name, k, seed in arrivals:
        rows.add(name, {PARAMETERS[k]: gradient(k, seed)})
        reached.setdefault(k, set()).add(name)
    for name in rows:
        for p, g in rows[name].items():
            k = next(i for i, q in enumerate(PARAMETERS) if q is p)
            assert g.dtype == (torch.bfloat16 if len(reached[k]) >= 2 else torch.float32)


def test_narrowing_rounds_once():
    rows, p = TaskRows(torch.bfloat16), PARAMETERS[0]
    rows.add("a", {p: gradient(0, 1)})
    rows.add("b", {p: gradient(0, 2)})
    assert torch.equal(rows["a"][p], gradient(0, 1).bfloat16())
    assert torch.equal(rows["b"][p], gradient(0, 2).bfloat16())


@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_are_not_narrowed(complex_dtype):
    p = torch.zeros(2, dtype=complex_dtype)
    rows = TaskRows(torch.bfloat16)
    for name in NAMES:
        rows.add(name, {p: torch.ones_like(p)})
    assert all(g.dtype == complex_dtype for g in rows.of(p))


def sparse(values, index):
    return torch.sparse_coo_tensor([index], values, (4,))


@pytest.mark.parametrize("kinds", ["sparse sparse", "sparse dense", "dense sparse"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sparse_gradients_add_up(kinds, dtype):
    p, rows = torch.zeros(4), TaskRows(dtype)
    values = {"sparse": sparse([1.0, 2.0], [0, 2]), "dense": torch.tensor([1.0, 0.0, 2.0, 0.0])}
    for kind in kinds.split():
        rows.add("a", {p: values[kind].clone()})
    rows.add("b", {p: values["sparse"].clone()})
    (total, _) = rows.of(p)
    assert torch.equal(total.to_dense(), torch.tensor([2.0, 0.0, 4.0, 0.0]))
    assert total.is_sparse == (kinds == "sparse sparse")


def test_drop_forgets_one_task():
    rows = TaskRows()
    for name in NAMES:
        rows.add(name, {PARAMETERS[0]: gradient(0, 1)})
    rows.drop("b")
    assert list(rows) == ["a", "c"]
    assert "b" not in rows


def test_a_task_without_gradients_is_there_and_reaches_nothing():
    rows = TaskRows()
    rows.add("a", {})
    assert list(rows) == ["a"]
    assert rows.table(PARAMETERS) == [[None, None, None]]
    assert rows.shared(PARAMETERS) == []
