"""More than one optimizer on one model, and more than one forward pass a step."""

import pytest
import torch
from torch import nn

import gradsurg
from tests.networks import Heads, build, data, equal_weights, reference_rows, rows_of, run_backward, same, twins


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).double()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
def test_muon_for_the_matrices_and_adamw_for_the_rest():
    # Muon takes matrices only. Both share one set of rows, and the movement of each is held to the promise.
    model = build("heads")
    matrices = [p for p in model.trunk.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2] + [head.weight for head in model.heads.values()]
    muon, adamw = gradsurg.wrap([torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)])
    corrected = False
    for batch in range(6):
        gradients = reference_rows(model.losses(batch), list(model.trunk.parameters()))
        before = [p.detach().clone() for p in model.trunk.parameters()]
        for o in (muon, adamw):
            o.zero_grad()
        (muon if batch % 2 else adamw).total(model.losses(batch)).backward()
        for o in (muon, adamw):
            o.step()
            corrected |= o.report.movement.corrected
        d = flat(before) - flat(model.trunk.parameters())
        assert d.any()
        for row in gradients.values():
            assert torch.dot(d, flat(row)) >= -1e-4 * d.norm() * flat(row).norm()  # float32 parameters
    assert corrected, "nothing was ever corrected: the promise was not put to the test"
    assert muon.report is adamw.report


def test_one_wrapped_and_one_plain():
    # The plain one trains the heads, as it would if the trunk's optimizer were plain too.
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.Adam(model.trunk.parameters(), lr=0.01))
    alone = gradsurg.wrap(torch.optim.Adam(other.trunk.parameters(), lr=0.01))
    heads, plain = (torch.optim.SGD(m.heads.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    for batch in range(3):
        for o in (optimizer, heads):
            o.zero_grad()
        optimizer.total(model.losses(batch)).backward()
        optimizer.step()
        heads.step()

        rows = reference_rows(other.losses(batch), list(other.trunk.parameters()))
        wanted = torch.autograd.grad(sum(other.losses(batch).values()), list(other.heads.parameters()))
        alone.zero_grad()
        alone.set_gradients(rows)
        alone.step()
        for p, g in zip(other.heads.parameters(), wanted, strict=True):
            p.grad = g
        plain.step()
    assert equal_weights(model.trunk, other.trunk)
    for p, q in zip(model.heads.parameters(), other.heads.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # a sum of float32 gradients, or the gradient of a sum


def test_two_optimizers_wrapped_apart_keep_out_of_each_other_s_way():
    # Each has rows of its own; the other's parameters get the ordinary gradient, which its zero_grad clears.
    model, other = twins()
    first = gradsurg.wrap(torch.optim.SGD(model.trunk[0].parameters(), lr=0.1))
    second = gradsurg.wrap(torch.optim.SGD(model.trunk[2].parameters(), lr=0.1), surgery="mgda")
    for batch in range(3):
        for o, layer in [(first, 0), (second, 2)]:
            wanted = reference_rows(model.losses(batch), list(model.trunk[layer].parameters()))
            o.zero_grad()
            o.total(model.losses(batch)).backward()
            assert same(rows_of(o), wanted)
            o.step()
            assert (o.report.update_cosines >= -1e-4).all()
    assert same(list(model.heads.state_dict().values()), list(other.heads.state_dict().values()))


class Pair(nn.Module):
    """A generator and a discriminator, both small."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def test_adversaries_in_alternation():
    """A generator of two tasks (fool the discriminator, match a mean) against a discriminator of two."""
    torch.manual_seed(0)
    pair = Pair()
    generator = gradsurg.wrap(torch.optim.Adam(pair.generator.parameters(), lr=0.01))
    discriminator = gradsurg.wrap(torch.optim.Adam(pair.discriminator.parameters(), lr=0.01))
    margin = nn.functional.softplus
    for batch in range(4):
        real, noise = data(batch, 16, 2) + 2, data(batch + 100, 16, 3)

        kept = [p.detach().clone() for p in pair.generator.parameters()]
        discriminator.zero_grad()
        with discriminator.task("real"):
            margin(-pair.discriminator(real)).mean().backward()
        with discriminator.task("fake"):
            margin(pair.discriminator(pair.generator(noise).detach())).mean().backward()
        discriminator.step()
        assert same(kept, [p.detach() for p in pair.generator.parameters()])
        assert discriminator.report.tasks == ("real", "fake")

        kept = [p.detach().clone() for p in pair.discriminator.parameters()]
        generator.zero_grad()
        with generator.task("fool"):
            margin(-pair.discriminator(pair.generator(noise))).mean().backward()
        with generator.task("mean"):
            (pair.generator(noise).mean(0) - real.mean(0)).square().sum().backward()
        # What the generator's task left in the discriminator is as in any alternation: its zero_grad clears it.
        assert all(p.grad is not None for p in pair.discriminator.parameters())
        generator.step()
        assert same(kept, [p.detach() for p in pair.discriminator.parameters()])
        for report in (generator.report, discriminator.report):
            assert report.step == batch
            assert (report.update_cosines >= -1e-4).all()


def bytes_of(rows):
    return sum(g.untyped_storage().nbytes() for name in rows for g in rows[name].values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("way", ["total", "backward", "task"])
def test_rows_take_m_times_the_parameters_however_many_micro_batches(way, dtype):
    model = Heads()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), row_dtype=dtype)
    trunk = sum(p.numel() for p in model.trunk.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    for batch in range(3):
        run_backward(way, optimizer, model.losses(batch), 1 / 3)
        rows = optimizer._gradsurg.capture.rows
        assert bytes_of(rows) == 3 * trunk * (4 if dtype is None else 2) + heads * 4
    optimizer.step()
    assert not len(optimizer._gradsurg.capture.rows)
