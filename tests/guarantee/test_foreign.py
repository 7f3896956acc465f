"""Parameters of a foreign tensor class: only their optimizer moves them, and their movement counts."""

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg.guarantee.foreign import is_foreign


class OnSphere(nn.Parameter):
    """A point on the unit sphere; to add a gradient to it would leave the sphere."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, nn.functional.normalize(data, dim=0), True)


class Opaque(OnSphere):
    """A parameter of which only its own optimizer knows how to compute with it."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function in (torch.Tensor.clone, torch.clone):
            raise NotImplementedError("packed")
        return super().__torch_function__(function, types, arguments, options or {})

    def detach(self):
        return self


class Riemannian(torch.optim.SGD):
    """SGD whose points on the sphere return to it."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"] if isinstance(p, OnSphere)):
                p.copy_(nn.functional.normalize(p, dim=0))
        return loss


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor).clone()


def test_a_sphere_is_never_left_and_nobody_is_hurt():
    torch.manual_seed(0)
    p, q, targets = OnSphere(torch.randn(5)), nn.Parameter(torch.randn(5)), torch.randn(2, 5)
    inner = Riemannian([p, q], lr=0.05, momentum=0.9)
    with pytest.warns(UserWarning, match="leaves parameters of class OnSphere"):
        optimizer = gradsurg.wrap(inner)
    corrected = 0
    for _ in range(60):
        z = p + q + 0.3 * torch.randn(5)
        losses = [(z - targets[0]).square().sum(), 2 * (z - targets[1]).square().sum() + p @ targets[1]]
        rows = [torch.cat([*map(plain, torch.autograd.grad(x, [p, q], retain_graph=True))]) for x in losses]
        optimizer.zero_grad()
        optimizer.total({"a": losses[0], "b": losses[1]}).backward()
        before = torch.cat([plain(p), plain(q)])
        optimizer.step()
        d = (before - torch.cat([plain(p), plain(q)])).double()
        if d.norm() > 0:
            assert min(float(d @ g.double() / (d.norm() * g.norm())) for g in rows) >= -1e-4
        assert abs(float(plain(p).norm()) - 1) <= 3e-7
        corrected += bool(optimizer.report.movement.corrected)
    assert corrected > 5


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_where_nothing_but_a_sphere_is_shared_a_conflicting_step_is_taken_back(granularity):
    torch.manual_seed(0)
    spheres = [OnSphere(torch.randn(5)) for _ in range(2)]
    with pytest.warns(UserWarning, match="leaves parameters of class OnSphere"):
        optimizer = gradsurg.wrap(
            Riemannian(spheres, lr=0.05, momentum=0.9), surgery="mean", normalize="none", granularity=granularity
        )
    held = 0
    for _ in range(20):
        rows = torch.randn(2, 10)
        rows[1] -= 1.5 * rows[0]
        flat, before = torch.cat(spheres), torch.cat([*map(plain, spheres)])
        optimizer.zero_grad()
        optimizer.total({"a": flat @ rows[0], "b": flat @ rows[1]}).backward()
        optimizer.step()
        moves = (before - torch.cat([*map(plain, spheres)])).double()
        for part in [slice(0, 10)] if granularity == "model" else [slice(0, 5), slice(5, 10)]:
            d, g = moves[part], rows[:, part].double()
            assert (g @ d >= -1e-4 * g.norm(dim=1) * d.norm()).all()
            held += not d.any()
        assert all(abs(float(plain(p).norm()) - 1) <= 3e-7 for p in spheres)
    assert held > 3


def test_what_cannot_be_copied_and_subtracted_is_refused_at_wrap():
    inner = torch.optim.SGD([Opaque(torch.randn(3))], lr=0.1)
    with pytest.raises(TypeError, match=r"Opaque of shape \(3,\).*Use guarantee='gradient'"):
        gradsurg.wrap(inner)
    assert type(inner) is torch.optim.SGD
    gradsurg.wrap(inner, guarantee="gradient")


def test_torch_classes_are_no_foreign_ones():
    assert not any(map(is_foreign, [torch.ones(1), nn.Parameter(torch.ones(1)), nn.UninitializedParameter()]))
    assert is_foreign(OnSphere(torch.ones(2)))
