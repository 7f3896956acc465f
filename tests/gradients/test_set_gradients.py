"""set_gradients(): gradients that the caller computed, and row_dtype for all ways in."""

import pytest
import torch

from tests.gradients.ways import WAYS, gradients, wrapped
from tests.networks import build, equal_weights, reference_rows, rows_of, run_backward, same, trained, twins


def test_set_gradients_takes_the_shared_parameters_in_order():
    model, other = twins()
    trunk = list(model.trunk.parameters())
    optimizer = wrapped(model, shared=trunk)
    rows = reference_rows(model.losses(0), trunk)
    optimizer.set_gradients(rows)
    run_backward("total", wrapped(other, shared=other.trunk), other.losses(0))
    assert same(gradients(model.trunk), gradients(other.trunk))
    assert all(p.grad is None for p in model.heads.parameters())


def test_set_gradients_copies():
    model = build()
    optimizer = wrapped(model)
    rows = reference_rows(model.losses(0), trained(model))
    kept = {name: [None if g is None else g.clone() for g in row] for name, row in rows.items()}
    for _ in range(2):
        optimizer.set_gradients(rows)
    assert same(rows, kept)
    for row in rows.values():
        for g in row:
            if g is not None:
                g.zero_()
    optimizer.step()
    assert optimizer.report.movement.square > 0


def _wrong(rows, case):
    name = "right"
    if case == "count":
        rows[name] = rows[name][:-1]
    elif case == "shape":
        rows[name][0] = rows[name][0].T
    elif case == "dtype":
        rows[name][0] = rows[name][0].double()
    elif case == "tensor":
        rows[name] = rows[name][0]
    elif case == "type":
        rows[name][0] = 3.0
    return rows


@pytest.mark.parametrize("case", ["count", "shape", "dtype", "tensor", "type"])
def test_wrong_gradients_name_task_and_reason(case):
    model = build()
    optimizer = wrapped(model)
    rows = _wrong(reference_rows(model.losses(0), trained(model)), case)
    with pytest.raises(ValueError, match=r"gradients\['right'\]"):
        optimizer.set_gradients(rows)
    assert gradients(model) == [None] * len(gradients(model))
    assert rows_of(optimizer) == {}


@pytest.mark.parametrize("value", [{}, None, [torch.ones(1)]])
def test_set_gradients_wants_a_dict(value):
    with pytest.raises(ValueError, match="dict from task name"):
        wrapped(build()).set_gradients(value)


# -- row_dtype ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["heads", "dtypes", "complex", "sparse"])
def test_row_dtype_narrows_shared_rows_only(way, kind):
    model, other = twins(kind)
    optimizer = wrapped(model, row_dtype=torch.bfloat16)
    run_backward(way, optimizer, model.losses(0))
    want = reference_rows(other.losses(0), trained(other))
    parameters = trained(model)
    for name, row in rows_of(optimizer).items():
        for k, (p, g) in enumerate(zip(parameters, row, strict=True)):
            reached = sum(r[k] is not None for r in want.values())
            if g is None:
                assert want[name][k] is None
            elif reached >= 2 and p.is_floating_point() and not g.is_sparse:
                assert g.dtype == torch.bfloat16
                assert same(g, want[name][k].bfloat16())
            else:
                assert same(g, want[name][k])
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in parameters)
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters)


def test_row_dtype_leaves_one_task_alone():
    model, plain_model = twins()
    optimizer = wrapped(model, row_dtype=torch.bfloat16)
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    for batch in range(3):
        for m, o in [(model, optimizer), (plain_model, plain)]:
            o.zero_grad()
            loss = sum(m.losses(batch).values())
            (o.total([loss]) if o is optimizer else loss).backward()
            o.step()
    assert equal_weights(model, plain_model)
