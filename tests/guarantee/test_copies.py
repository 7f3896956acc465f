"""Copies in one vector are copies: whoever looks finds what separate clones would be."""

import pytest
import torch

import gradsurg
from gradsurg.gradients.rows import Row
from gradsurg.guarantee.copies import ParameterCopies, Part
from gradsurg.guarantee.update import first_look, project_update
from gradsurg.linalg.packing import GradientTable

SHAPES = [(40_000,), (3, 5), (7,), (2, 4)]  # the first is not packed


def case(shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return parameters, GradientTable([torch.randn(shape) for shape in shapes] for _ in range(3))


def move(parameters):
    with torch.no_grad():
        for p in parameters:
            p.sub_(1e-3 * torch.randn_like(p))


def test_are_what_the_parameters_were():
    parameters, table = case()
    stranger = torch.nn.Parameter(torch.randn(2))
    clones = [p.detach().clone() for p in (*parameters, stranger)]
    before = ParameterCopies([*parameters, stranger], [(table.packed(), parameters)])
    assert before.vector_of(table.packed()).numel() == 15 + 7 + 8
    move([*parameters, stranger])
    part = Part(before, parameters)
    assert len(before) == 5
    assert len(part) == 4
    assert before.ids() == {id(p) for p in (*parameters, stranger)}
    assert torch.equal(part[0], clones[0])
    assert "row" not in vars(before)
    for found in (list(part), [before[p] for p in parameters], before.row.at(parameters)):
        assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(found, clones[:4], strict=True))
    assert torch.equal(before[stranger], clones[4])


@pytest.mark.parametrize("what", ["one alone", "one missing", "transposed", "two dtypes"])
def test_what_cannot_be_one_vector_is_copied_apart(what):
    parameters, table = case(SHAPES[:2] if what == "one alone" else SHAPES)
    if what == "transposed":
        parameters[1].data = parameters[1].data.T.contiguous().T
    elif what == "two dtypes":
        parameters[2] = torch.nn.Parameter(parameters[2].detach().double())
    held = parameters[:-1] if what == "one missing" else parameters
    before = ParameterCopies(held, [(table.packed(), parameters)])
    clones = [p.detach().clone() for p in held]
    assert before.vector_of(table.packed()) is None
    move(parameters)
    for p, clone in zip(held, clones, strict=True):
        assert torch.equal(before[p], clone)
        assert before[p].stride() == clone.stride()


def test_a_glance_and_the_guard_find_the_same():
    parameters, table = case()
    with torch.no_grad():
        step = [1e-3 * (sum(row[k] for row in table) + torch.randn_like(p)) for k, p in enumerate(parameters)]
    before = ParameterCopies(parameters, [(table.packed(), parameters)])
    clones = [p.detach().clone() for p in parameters]
    norms = [float(torch.cat([g.flatten() for g in row]).norm()) for row in table]
    for sign in (1.0, -1.0):  # clear of harm, and not: then the vector is cut apart
        with torch.no_grad():
            for p, old, d in zip(parameters, clones, step, strict=True):
                p.copy_(old - sign * d)
        after = [p.detach() for p in parameters]
        seen = [first_look(table, norms, old, after, [1.0] * 4) for old in (Part(before, parameters), clones)]
        assert seen[0] == seen[1]
        assert (seen[0] is None) == (sign < 0)
        G = torch.tensor([[float(sum((a * b).sum() for a, b in zip(x, y, strict=True))) for x in table] for y in table])
        moved = []
        for old in (Part(before, parameters), clones):
            new = [a.clone() for a in after]
            movement = project_update(table, G.double(), old, new, [1.0] * 4, None)
            moved.append((movement.inner.tolist(), movement.square, movement.corrected, movement.held, new))
        assert moved[0][:4] == moved[1][:4]
        assert all(torch.equal(a, b) for a, b in zip(moved[0][4], moved[1][4], strict=True))


@pytest.mark.parametrize("shapes", [SHAPES[:2], SHAPES])
def test_a_glance_leaves_the_copies_alone(shapes):
    parameters, table = case(shapes)
    clones = [p.detach().clone() for p in parameters]
    kept = [c.clone() for c in clones]
    move(parameters)
    first_look(table, [1e9] * 3, clones, [p.detach() for p in parameters], [1.0] * len(shapes))
    assert all(torch.equal(a, b) for a, b in zip(clones, kept, strict=True))


class Interrupted(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise RuntimeError("half way")


def test_a_failed_step_is_taken_back_from_the_vector():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    optimizer = gradsurg.wrap(Interrupted(model.parameters(), lr=0.1))
    held = Row((p, p.detach().clone()) for p in model.parameters())
    out = model(torch.randn(8, 4)) @ torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    optimizer.total([out[:, 0].square().mean(), out[:, 1].mean()]).backward()
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in held.items())
