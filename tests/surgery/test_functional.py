"""gradsurg.weights and gradsurg.combine: shapes, options, errors that say what to do."""

import pytest
import torch

import gradsurg
from gradsurg.normalize import Norm
from gradsurg.surgery import SURGERIES, Cone
from gradsurg.surgery.base import ElementwiseSurgery

G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surgery": "cnoe"}, r"surgery='cnoe' is not known: use one of .*'cone'.*Did you mean 'cone'\?"),
        ({"surgery": 3}, r"surgery=3 is not known"),
        ({"normalize": "l2"}, r"normalize='l2' is not known: use one of 'none', .*'norm'"),
        ({"guarantee": "update"}, r"needs an optimizer's update: use 'gradient' here"),
        ({"guarantee": "strict"}, r"guarantee='strict' is not known"),
        ({"auxiliary": "ignore", "primary": 0}, r"auxiliary='ignore' is not known: use one of 'protect', 'help'"),
        ({"primary": 2}, r"primary=2: the rows are 0 … 1"),
        ({"primary": [[0], [0]]}, r"names a task twice"),
        ({"primary": [[0], []]}, r"empty level"),
        ({"preferences": [1.0]}, r"pass 2 positive finite numbers"),
        ({"preferences": [1.0, -1.0]}, r"pass 2 positive finite numbers"),
        ({"preferences": {5: 1.0}}, r"the rows are 0 … 1"),
    ],
)
def test_errors_name_argument_value_and_cure(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradsurg.weights(G, **arguments)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(2, 3), torch.ones(0, 0), torch.ones(2, 2) + 1j])
def test_a_gramian_must_be_square_and_real(bad):
    with pytest.raises(ValueError, match="gramian"):
        gradsurg.weights(bad)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2) + 1j])
def test_a_matrix_must_be_a_real_floating_matrix(bad):
    with pytest.raises(ValueError, match="J has shape"):
        gradsurg.combine(bad)


def test_names_and_instances_are_the_same():
    assert torch.equal(gradsurg.weights(G, Cone(), normalize=Norm()), gradsurg.weights(G, "cone", normalize="norm"))


def drawn(m, seed, kind):
    J = torch.randn(m, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "free": J.abs(),
        "mild": J,
        "surrounding": J - 0.95 * J.mean(0),
        "opposite": torch.cat([J[: m // 2], -J[: m - m // 2]]),
        "duplicates": J[torch.arange(m) // 2],
        "zero row": J * (torch.arange(m) != 1)[:, None],
        "huge": J * 1e150,
    }[kind]


@pytest.mark.parametrize("kind", ["free", "mild", "surrounding", "opposite", "duplicates", "zero row", "huge"])
@pytest.mark.parametrize("name", SURGERIES)
def test_the_short_way_and_the_whole_pipeline_agree(name, kind):
    # Preferences of 1 change no answer, and with them the whole pipeline is asked.
    for m, seed in ((1, 0), (2, 1), (4, 2), (8, 3), (17, 4)):
        J = drawn(m, seed, kind)
        if issubclass(SURGERIES[name], ElementwiseSurgery):
            short, whole = gradsurg.combine(J, name), gradsurg.combine(J, name, preferences=[1.0] * m)
            assert torch.equal(short, whole) or (short - whole).abs().max() <= 1e-14 * whole.abs().max()
            continue
        G = J @ J.T
        short, whole = gradsurg.weights(G, name), gradsurg.weights(G, name, preferences=[1.0] * m)
        assert short.shape == (m,)
        assert short.dtype == torch.float64
        # The same u: where gradients are dependent, weights are not unique.
        scale = whole.abs() @ G.diagonal().sqrt()
        difference = short - whole
        assert (
            (difference @ J).norm() if kind != "huge" else (difference @ (J / 1e150)).norm() * 1e150
        ) <= 1e-9 * scale
        if kind in ("free", "mild", "surrounding"):
            assert difference.abs().max() <= 1e-10 * whole.abs().max()


def test_the_short_way_makes_every_check():
    for bad in (torch.full((2, 2), torch.nan), torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])):
        for name in ("cone", "upgrad", "mgda", "imtl_g", "config", "aligned_mtl"):
            assert gradsurg.weights(bad, name).isnan().any(), name
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for name in ("sum", "mean", "random", "cone", "upgrad", "imtl_g", "excess_mtl"):
            assert gradsurg.weights(torch.eye(3, dtype=dtype), name).dtype == dtype
    first = gradsurg.weights(torch.eye(3), "random")
    first.zero_()
    assert gradsurg.weights(torch.eye(3), "random").all()


@pytest.mark.parametrize("of", [gradsurg.weights, gradsurg.combine])
def test_what_is_no_matrix_of_floats_is_refused(of):
    # Weights go back in the dtype that came: 1.5 would have become 1.
    with pytest.raises(TypeError, match=r"is a list: pass a tensor of shape \("):
        of([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"dtype torch\.int64: it must be a .*floating"):
        of(torch.tensor([[2, -1], [-1, 2]]))


def test_preferences_are_the_weights_of_a_sum_without_conflict():
    assert gradsurg.weights(torch.eye(3), preferences=[1.0, 2.0, 0.5]).tolist() == [1.0, 2.0, 0.5]
    assert gradsurg.weights(torch.eye(3), preferences={1: 2.0}).tolist() == [1.0, 2.0, 1.0]
    assert gradsurg.weights(torch.eye(3), preferences=torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]


def test_primary_by_index_and_levels():
    protect = gradsurg.weights(G, primary=0)
    assert protect.tolist() == pytest.approx([1.0, 2 / 9])
    helping = gradsurg.weights(G, primary=[[0], [1]], auxiliary="help")
    assert helping.tolist() == pytest.approx([3.0, 1.0])


def test_combine_is_the_weights_times_the_matrix():
    J = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J -= J.mean(0)
    for options in ({}, {"normalize": "norm"}, {"primary": 1}, {"surgery": "mgda"}):
        assert torch.allclose(gradsurg.combine(J, **options), gradsurg.weights(J @ J.T, **options) @ J, atol=1e-9)
    assert gradsurg.combine(J.bfloat16()).dtype == torch.bfloat16


def test_no_gradient_flows_through():
    J = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert not gradsurg.combine(J).requires_grad
    assert not gradsurg.weights(J @ J.T).requires_grad
