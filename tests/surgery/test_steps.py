"""gradsurg.Steps takes the steps that a wrapped optimizer takes on the same gradients."""

import pytest
import torch

import gradsurg
from tests.networks import same

STATEFUL = ("modo", "gradvac", "excess_mtl", "cr_mogm", "sdmgrad")


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("surgery", [name for name in STATEFUL if name != "gradvac"])
def test_steps_are_those_of_an_optimizer(surgery):
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), surgery=surgery, normalize="none", guarantee="none")
    steps = gradsurg.Steps(surgery)
    for J in matrices():
        optimizer.zero_grad()
        optimizer.set_gradients({str(i): [row] for i, row in enumerate(J)})
        assert torch.allclose(w.grad, steps.combine(J), atol=1e-10)
        optimizer.step()


@pytest.mark.parametrize("surgery", STATEFUL)
def test_it_remembers(surgery):
    surgery = gradsurg.surgery.GradVac(beta=0.9) if surgery == "gradvac" else surgery
    steps, again = gradsurg.Steps(surgery, seed=3), gradsurg.Steps(surgery, seed=3)
    found = [steps.combine(J) for J in matrices()]
    assert all(torch.equal(u, again.combine(J)) for u, J in zip(found, matrices(), strict=True))
    assert steps.state["surgery"]
    assert same(steps.state, again.state)


def test_learned_normalisers_learn():
    steps = gradsurg.Steps("sum", normalize="imtl_l")
    losses = torch.tensor([1.0, 100.0])
    first = steps.weights(torch.eye(2), losses)
    assert steps.weights(torch.eye(2), losses)[1] < first[1]


NO_GRAMIANS = ([[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0.2, 1.0]], [[-1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("G", NO_GRAMIANS)
@pytest.mark.parametrize("options", [{}, {"surgery": "mgda"}, {"normalize": "norm"}, {"margin": 0.1}], ids=str)
def test_what_is_no_gramian_is_refused(G, options):
    with pytest.raises(ValueError, match="no matrix of inner products"):
        gradsurg.weights(torch.tensor(G), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounded_gramians_are_taken(dtype):
    J = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    J[1] = J[0]
    assert gradsurg.weights(J @ J.T).isfinite().all()
