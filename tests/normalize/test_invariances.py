"""Section 1 of the mathematics: which change of a loss leaves the direction alone, cell by cell.

u is compared as a direction, for L_i → c·L_i (gradient and loss both times c) and L_i → L_i + b (gradient as before).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import NORMALIZERS, Norm, Normalizer, resolve_normalizer
from gradsurg.pipeline import Pipeline
from gradsurg.problem import Problem
from gradsurg.surgery import SURGERIES

# name: (unchanged under scaling, unchanged under shifting)
TABLE = {"none": (False, True), "norm": (True, True)}
SHAPE = (4, 12)


def test_the_table_has_a_row_for_every_normaliser():
    assert set(TABLE) == set(NORMALIZERS)


def direction(J, losses, normalize, surgery="cone"):
    weights = gradsurg.weights(J @ J.T, surgery, normalize=normalize, losses=losses)
    u = weights @ J
    return u / u.norm()


def instance(seed):
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + 0.3
    return J, torch.rand(SHAPE[0], generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("surgery", ["sum", "cone", "upgrad", "mgda", "pcgrad"])
@given(seed=st.integers(0, 10_000), exponent=st.floats(-6, 6), task=st.integers(0, SHAPE[0] - 1))
def test_scaling_a_loss(name, surgery, seed, exponent, task):
    J, losses = instance(seed)
    factor = torch.ones(SHAPE[0], dtype=torch.float64)
    factor[task] = 10**exponent
    changed = direction(J * factor[:, None], losses * factor, name, surgery)
    if TABLE[name][0]:
        assert (changed - direction(J, losses, name, surgery)).abs().max() < 1e-9


@pytest.mark.parametrize("name", TABLE)
@given(seed=st.integers(0, 10_000), shift=st.floats(-1e3, 1e3))
def test_shifting_a_loss(name, seed, shift):
    J, losses = instance(seed)
    if TABLE[name][1]:
        assert torch.equal(direction(J, losses + shift, name), direction(J, losses, name))


@pytest.mark.parametrize("name", [name for name, (scale, _) in TABLE.items() if not scale])
def test_what_the_table_denies_is_denied(name):
    J, losses = instance(0)
    factor = torch.tensor([1e3, 1, 1, 1], dtype=torch.float64)
    changed = direction(J * factor[:, None], losses * factor, name)
    assert (changed - direction(J, losses, name)).abs().max() > 0.1


@pytest.mark.parametrize("name", TABLE)
@given(seed=st.integers(0, 10_000))
def test_the_mean_length_of_the_rows_is_kept(name, seed):
    J, losses = instance(seed)
    G = J @ J.T
    problem = Problem(G, torch.ones(4, dtype=torch.float64), tuple("abcd"), losses)
    scales = Pipeline(resolve_normalizer(name), SURGERIES["sum"]()).direction(problem, {}).scales
    norms = J.norm(dim=1)
    assert float((scales * norms).mean()) == pytest.approx(float(norms.mean()), rel=1e-12)


def test_agreeing_tasks_of_equal_norm_get_the_plain_sum_to_the_bit():
    J = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 3.0, 4.0]])
    for name in TABLE:
        assert gradsurg.weights(J @ J.T, "cone", normalize=name).tolist() == [1.0, 1.0, 1.0]


def test_a_zero_row_gets_scale_zero_and_does_not_shorten_the_others():
    J = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    weights = gradsurg.weights(J @ J.T, "sum", normalize="norm")
    assert weights.tolist() == pytest.approx([3.5 / 3, 0.0, 3.5 / 4])
    assert gradsurg.weights(torch.zeros(2, 2), "cone", normalize="norm").tolist() == [0.0, 0.0]


def test_blocks_are_scaled_apart():
    G = torch.stack([torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))])
    weights = gradsurg.weights(G, "sum", normalize="norm")
    assert weights.tolist() == [[1.5, 0.75], [pytest.approx(2 / 3), 2.0]]


def test_names_and_instances():
    assert resolve_normalizer(Norm()) == Norm() == resolve_normalizer("norm")
    assert issubclass(Norm, Normalizer)
    with pytest.raises(
        ValueError, match=r"normalize='nrom' is not known: use one of 'none', 'norm'.*Did you mean 'norm'"
    ):
        resolve_normalizer("nrom")
