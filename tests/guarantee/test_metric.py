"""What the optimizer left in place stays, and corrections are measured by learning rates. Judged from outside."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradsurg


def step(optimizer, parameters, losses, between=None):
    """Do one step; return the movement of each parameter and, from autograd, the gradient of each loss."""
    gradients = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in losses.values()]
    optimizer.zero_grad()
    optimizer.total(losses).backward()
    if between is not None:
        between()
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    return [old - p.detach() for old, p in zip(before, parameters, strict=True)], gradients


def worst_cosine(moved, gradients):
    d = torch.cat([x.double().reshape(-1) for x in moved])
    cosines = [0.0]
    for row in gradients:
        pieces = [torch.zeros_like(x).double() if g is None else g.double() for g, x in zip(row, moved, strict=True)]
        g = torch.cat([x.reshape(-1) for x in pieces])
        if g.norm() > 0 and d.norm() > 0:
            cosines.append(float(g @ d / (g.norm() * d.norm())))
    return min(cosines)


def test_numbers_whose_gradient_is_zeroed_stay():
    w = nn.Parameter(torch.ones(5))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    rows = torch.tensor([[3.0, 0.0, 1.0, 0.0, 0.0], [3.0, 0.0, -1.5, 0.0, 1.0]])
    moved, gradients = step(optimizer, [w], {"a": w @ rows[0], "b": w @ rows[1]}, lambda: w.grad[:2].zero_())
    assert w[:2].tolist() == [1.0, 1.0]
    assert moved[0].norm() > 0
    assert worst_cosine(moved, gradients) >= -1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_mask_on_the_gradients_holds_in_training(make, dtype):
    """Tokens that may not change: their rows of p.grad are zeroed in every step."""
    torch.manual_seed(0)
    target = torch.randn(20, 4)
    table = nn.Parameter((-target / 3).to(dtype))  # where the two losses balance: gradients are opposed
    optimizer = gradsurg.wrap(make([table], lr=0.05), surgery="mean", normalize="none")
    start, corrected = table.detach().clone(), 0
    for _ in range(30):
        x = table.float() + 0.3 * torch.randn(20, 4)
        losses = {"a": (x - target).square().sum(), "b": 2 * (x + target).square().sum()}
        moved, gradients = step(optimizer, [table], losses, lambda: table.grad[:15].zero_())
        assert torch.equal(table[:15], start[:15])
        assert worst_cosine(moved, gradients) >= (-1e-2 if dtype == torch.bfloat16 else -1e-4)
        corrected += bool(optimizer.report.movement.corrected)
    assert corrected > 3
    assert not torch.equal(table[15:], start[15:])


def test_a_gradient_that_is_replaced_by_a_masked_one_leaves_numbers_in_place():
    w = nn.Parameter(torch.ones(4))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))

    def mask():
        w.grad = w.grad * torch.tensor([0.0, 0.0, 1.0, 1.0])

    rows = torch.tensor([[3.0, 0.0, 1.0, 0.0], [3.0, 0.0, -1.5, 1.0]])
    with pytest.warns(UserWarning, match="replaced"):
        step(optimizer, [w], {"a": w @ rows[0], "b": w @ rows[1]}, mask)
    assert w[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_group_with_rate_zero_stays(make):
    torch.manual_seed(0)
    back, neck = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    optimizer = gradsurg.wrap(make([{"params": [back], "lr": 0.0}, {"params": [neck]}], lr=0.1))
    start, targets, corrected = back.detach().clone(), torch.randn(2, 12), 0
    for _ in range(60):
        z = torch.cat([back, neck]) + 0.3 * torch.randn(12)
        losses = {"a": (z - targets[0]).square().sum(), "b": (z - targets[1]).square().sum()}
        moved, gradients = step(optimizer, [back, neck], losses)
        assert worst_cosine(moved, gradients) >= -1e-4
        corrected += bool(optimizer.report.movement.corrected)
    assert torch.equal(back, start)
    assert corrected > 10


class OwnRate(torch.optim.SGD):
    """Finds its step size itself, and keeps lr at 0."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.sub_(self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad), alpha=0.1)


def test_rates_that_are_all_zero_say_nothing():
    torch.manual_seed(0)
    w, v = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    optimizer = gradsurg.wrap(OwnRate([w, v], lr=0.0), surgery="mean", normalize="none")
    corrected = 0
    for _ in range(10):
        rows = torch.randn(2, 12)
        rows[1] -= 1.5 * rows[0]
        moved, gradients = step(optimizer, [w, v], {str(i): torch.cat([w, v]) @ row for i, row in enumerate(rows)})
        assert worst_cosine(moved, gradients) >= -1e-4
        assert all(d.any() for d in moved)
        corrected += bool(optimizer.report.movement.corrected)
    assert corrected > 3


class Nonnegative(torch.optim.SGD):
    """Projected gradient descent: no number falls below 0."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.clamp_(min=0)
        return loss


def test_numbers_that_a_nonnegative_optimizer_puts_at_zero_stay_there():
    w = nn.Parameter(torch.tensor([0.1, 1.0]))
    optimizer = gradsurg.wrap(Nonnegative([w], lr=0.1))
    # The plain step ends at [0, 1.2], and conflicts with b; only the second number may mend that.
    step(optimizer, [w], {"a": w @ torch.tensor([0.0, -3.0]), "b": w @ torch.tensor([4.0, 2.0])})
    moved = torch.tensor([0.1, 1.0]) - w.detach()
    assert w[0] == 0
    assert moved @ torch.tensor([0.0, -3.0]) > 0
    assert abs(moved @ torch.tensor([4.0, 2.0])) < 1e-6  # on the edge: the least change


def test_the_zeros_of_a_nonnegative_optimizer_stay():
    torch.manual_seed(0)
    w = nn.Parameter(torch.cat([torch.zeros(4), torch.ones(4)]))
    optimizer = gradsurg.wrap(Nonnegative([w], lr=0.05))
    push = torch.cat([torch.full((4,), 3.0), torch.zeros(4)])
    for _ in range(20):
        rows = torch.randn(3, 8) + push  # every task pulls the first four numbers below 0
        step(optimizer, [w], {f"t{i}": w @ row for i, row in enumerate(rows)})
        assert w[:4].tolist() == [0.0] * 4
        assert (w >= 0).all() or (w[4:] > -0.2).all()


class Cautious(torch.optim.SGD):
    """Moves only where momentum and gradient agree."""

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                p.sub_(m * (m * p.grad > 0), alpha=self.param_groups[0]["lr"])
        return loss


def test_what_a_cautious_optimizer_did_not_move_stays():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(16))
    inner = Cautious([w], lr=0.05)
    optimizer, stayed, corrected = gradsurg.wrap(inner, surgery="mean", normalize="none"), 0, 0
    for _ in range(30):
        rows = torch.randn(8, 16) + 0.3
        moved, gradients = step(optimizer, [w], {f"t{i}": w @ row for i, row in enumerate(rows)})
        agrees = optimizer.state[w]["m"] * w.grad > 0
        assert (moved[0][~agrees] == 0).all()
        assert worst_cosine(moved, gradients) >= -1e-4
        stayed += int((~agrees).sum())
        corrected += bool(optimizer.report.movement.corrected)
    assert stayed > 50
    assert corrected > 3


def layers(decay, width=16, depth=6, rate=1e-2):
    """An MLP, and one parameter group per layer, whose rates fall towards the input."""
    net = nn.Sequential(
        *itertools.chain(*((nn.Linear(width, width), nn.Tanh()) for _ in range(depth))), nn.Linear(width, 3)
    )
    linears = [module for module in net if isinstance(module, nn.Linear)]
    rates = [rate * decay ** (depth - k) for k in range(depth + 1)]
    return net, [{"params": [*layer.parameters()], "lr": lr} for layer, lr in zip(linears, rates, strict=True)]


@pytest.mark.parametrize(
    ("decay", "make", "options"),
    [
        (0.3, torch.optim.Adam, {}),
        (0.3, torch.optim.AdamW, {"weight_decay": 0.1}),
        (0.3, torch.optim.SGD, {"momentum": 0.9}),
        (0.65, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_no_number_jumps_when_rates_differ_by_layer(decay, make, options):
    """With the plain projection, numbers jump by up to 276 (Adam) and 1 580 (momentum) steps: benchmarks.jumps."""
    torch.manual_seed(1)
    net, groups = layers(decay)
    optimizer = gradsurg.wrap(make(groups, **options))
    twin_net, twin_groups = layers(decay)
    x, y, corrected = torch.randn(128, 16), torch.randn(128, 3), 0
    for _ in range(25):
        batch = torch.randint(0, 128, (32,))
        errors = (net(x[batch]) - y[batch] * torch.tensor([1.0, -1.0, 1.0])).square().mean(0)
        losses = {"a": errors[0], "b": errors[1] + 0.5 * net(x[batch])[:, 0].sum(), "c": errors[2]}
        parameters = [p for group in groups for p in group["params"]]
        # The plain step: the same optimizer with the same state and p.grad, without a guarantee.
        twin = make(twin_groups, **options)
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin_net.parameters(), strict=True):
                q.copy_(p)
        state = torch.optim.Optimizer.state_dict(optimizer)
        state = {
            "state": state["state"],
            "param_groups": [{k: v for k, v in group.items() if k != "gradsurg"} for group in state["param_groups"]],
        }
        twin.load_state_dict(copy.deepcopy(state))

        def share(twin=twin):
            for p, q in zip(net.parameters(), twin_net.parameters(), strict=True):
                q.grad = p.grad.clone()

        before = [q.detach().clone() for q in twin_net.parameters()]
        moved, gradients = step(optimizer, parameters, losses, share)
        twin.step()
        plain = [old - q.detach() for old, q in zip(before, twin_net.parameters(), strict=True)]
        assert worst_cosine(moved, gradients) >= -1e-4
        for k in range(0, len(moved), 2):
            largest = max(float(d.abs().max()) for d in plain[k : k + 2])
            assert max(float(d.abs().max()) for d in moved[k : k + 2]) <= 2.001 * largest
        corrected += bool(optimizer.report.movement.corrected)
    assert corrected > 5


@given(st.integers(0, 10**6), st.integers(2, 5), st.sampled_from([0.0, 0.5]))
def test_the_correction_is_the_least_in_the_metric(seed, m, share):
    """Optimality: the change is M Jᵀλ with λ ≥ 0, and λ_i ⟨d, g_i⟩ = 0. Two rates, and some numbers held in place."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64)) for _ in range(2))
    optimizer = gradsurg.wrap(
        torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.03}]), surgery="mean", normalize="none"
    )
    J = torch.randn(m, 12, generator=generator, dtype=torch.float64)
    keep = torch.rand(12, generator=generator) >= share
    keep[0] = keep[-1] = True

    plain = torch.empty(12, dtype=torch.float64)

    def hold():
        a.grad.mul_(keep[:6])
        b.grad.mul_(keep[6:])
        plain[:6], plain[6:] = 0.1 * a.grad, 0.03 * b.grad

    w = torch.cat([a, b])
    moved, _ = step(optimizer, [a, b], {f"t{i}": w @ row for i, row in enumerate(J)}, hold)
    d = torch.cat(moved)
    M = torch.tensor([0.1] * 6 + [0.03] * 6, dtype=torch.float64) * keep
    assert (d[~keep] == 0).all()
    if not optimizer.report.movement.corrected or d.norm() == 0:
        return
    # No number may be limited for this: then the step was shortened.
    limit = [2 * plain[:6].abs().max(), 2 * plain[6:].abs().max()]
    if d[:6].abs().max() >= 0.999 * limit[0] or d[6:].abs().max() >= 0.999 * limit[1]:
        return
    # d − plain = M Jᵀλ: least squares on the numbers that move, with λ ≥ 0 and complementary slackness.
    products = J @ d / (J.norm(dim=1) * d.norm())
    assert products.min() >= -1e-6
    active = products.abs() <= 1e-6
    change = (d - plain) / M.clamp(min=1e-30)
    change = change[keep]
    lam = torch.linalg.lstsq(J[active][:, keep].T, change.unsqueeze(1)).solution.squeeze(1)
    assert (J[active][:, keep].T @ lam - change).abs().max() <= 1e-6 * change.abs().max()
    if active.sum() <= keep.sum():
        assert lam.min() >= -1e-6 * lam.abs().max()
