"""The promises of the library that are not about angles, as properties over optimizers, surgeries, options and seeds.

Promise 2, that nobody is hurt, is tests/guarantee/test_update.py.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsurg
from gradsurg.normalize import NORMALIZERS
from gradsurg.surgery import SURGERIES

OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 1e-2},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "Adadelta": {"lr": 1.0},
    "Rprop": {"lr": 1e-2},
}
# These ask for more than losses and gradients: priors, or the primary task.
SURGERY = st.sampled_from(sorted(set(SURGERIES) - {"pcd"}))
NORMALIZE = st.sampled_from(sorted(set(NORMALIZERS) - {"prior_loss"}))
optimizers = st.sampled_from(sorted(OPTIMIZERS))
seeds = st.integers(0, 10_000)
guarantees = st.sampled_from(["update", "gradient", "none"])
TASKS = ("a", "b", "c")


class Net(torch.nn.Module):
    """A trunk, one head a task, and one that nobody uses."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(4, 1) for name in TASKS})
        self.idle = torch.nn.Linear(4, 1)
        self.x, self.y = torch.randn(8, 5), torch.randn(3, 8, 1)

    def losses(self, names=TASKS):
        h = self.trunk(self.x)
        # 0.1 keeps losses away from the zero at which loss-based normalisers rightly refuse
        return {n: (self.heads[n](h) - self.y[TASKS.index(n)]).square().mean() + 0.1 for n in names}


def build(start, optimizer, **options):
    net = Net(start)
    inner = getattr(torch.optim, optimizer)(net.parameters(), **OPTIMIZERS[optimizer])
    return net, gradsurg.wrap(inner, **options)


def step(net, optimizer, names=TASKS):
    optimizer.zero_grad()
    optimizer.total(net.losses(names)).backward()
    optimizer.step()


def equal(one, other):
    """Whether all parameters are equal to the bit; of a run that diverges, NaN in the same places too."""
    bits = ([p.detach().view(torch.int32) for p in net.parameters()] for net in (one, other))
    return all(map(torch.equal, *bits))


@given(seed=seeds, optimizer=optimizers, surgery=SURGERY, normalize=NORMALIZE, guarantee=guarantees)
def test_promise_1_one_task_is_the_plain_optimizer_to_the_bit(seed, optimizer, surgery, normalize, guarantee):
    net, ours = build(seed, optimizer, surgery=surgery, normalize=normalize, guarantee=guarantee)
    plain = Net(seed)
    theirs = getattr(torch.optim, optimizer)(plain.parameters(), **OPTIMIZERS[optimizer])
    for _ in range(3):
        step(net, ours, ["b"])
        theirs.zero_grad()
        plain.losses(["b"])["b"].backward()
        theirs.step()
        assert equal(net, plain)


@given(m=st.integers(2, 5), seed=seeds, surgery=st.sampled_from(["sum", "cone", "upgrad", "pcgrad"]))
def test_promise_1_agreeing_tasks_of_equal_norm_get_the_sum(m, seed, surgery):
    rows = torch.randn(m, 7, generator=torch.Generator().manual_seed(seed)).abs()
    rows = rows / rows.norm(dim=1, keepdim=True) * 3
    p = torch.nn.Parameter(torch.zeros(7))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), surgery=surgery)
    optimizer.set_gradients({str(i): [row] for i, row in enumerate(rows)})
    # norms differ by 1e-7 after rounding; m terms are added in float32
    assert (p.grad - rows.sum(0)).abs().max() <= 3e-7 * m * 3


@given(seed=seeds, surgery=SURGERY, normalize=NORMALIZE, present=st.sets(st.sampled_from(TASKS), min_size=1))
def test_promise_3_heads_get_their_own_gradient_and_idle_parameters_none(seed, surgery, normalize, present):
    net, optimizer = build(seed, "Adam", surgery=surgery, normalize=normalize)
    losses = net.losses(sorted(present))
    want = {
        name: torch.autograd.grad(loss, list(net.heads[name].parameters()), retain_graph=True)
        for name, loss in losses.items()
    }
    optimizer.total(losses).backward()
    for name in TASKS:
        for i, p in enumerate(net.heads[name].parameters()):
            assert p.grad is None if name not in present else torch.equal(p.grad, want[name][i])
    assert all(p.grad is None for p in net.idle.parameters())


patterns = st.lists(st.sets(st.sampled_from(TASKS), min_size=1), min_size=3, max_size=6)


@given(seed=seeds, optimizer=optimizers, surgery=SURGERY, normalize=NORMALIZE, pattern=patterns)
def test_promise_4_tasks_come_and_go(seed, optimizer, surgery, normalize, pattern):
    """Absent as None, absent by omission and listed in another order are the same training, to rounding."""
    runs = []
    for absent in ("omitted", "none"):
        net, wrapped = build(seed, optimizer, surgery=surgery, normalize=normalize)
        for present in pattern:
            losses = net.losses(sorted(present))
            if absent == "none":
                losses = {name: losses.get(name) for name in TASKS}
            wrapped.zero_grad()
            wrapped.total(losses).backward()
            wrapped.step()
            assert set(wrapped.report.tasks) == present
        runs.append(net)
    assert equal(*runs)
    assert all(torch.isfinite(p).all() for p in runs[0].parameters())


def by_state_dict(net, optimizer, **options):
    other, fresh = build(0, type(optimizer).__mro__[2].__name__, **options)
    other.load_state_dict(net.state_dict())
    other.x, other.y = net.x, net.y
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, fresh


def by_pickle(net, optimizer, **options):
    return pickle.loads(pickle.dumps((net, optimizer)))


def by_deepcopy(net, optimizer, **options):
    return copy.deepcopy((net, optimizer))


@pytest.mark.parametrize("route", [by_state_dict, by_pickle, by_deepcopy])
@given(seed=seeds, optimizer=optimizers, surgery=SURGERY, normalize=NORMALIZE, before=st.integers(0, 3))
def test_promise_5_resuming_is_not_noticed(route, seed, optimizer, surgery, normalize, before):
    options = {"surgery": surgery, "normalize": normalize, "seed": seed}
    net, wrapped = build(seed, optimizer, **options)
    for _ in range(before):
        step(net, wrapped)
    wrapped.zero_grad()
    other, resumed = route(net, wrapped, **options)
    for _ in range(3):
        step(net, wrapped)
        step(other, resumed)
        assert equal(net, other)


@given(seed=seeds, optimizer=optimizers)
def test_promise_5_bare_and_wrapped_checkpoints_are_exchanged(seed, optimizer):
    net, wrapped = build(seed, optimizer)
    step(net, wrapped)
    bare = getattr(torch.optim, optimizer)(net.parameters(), **OPTIMIZERS[optimizer])
    # load_state_dict shares tensors with what it is given, so each gets a copy
    bare.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    twin, fresh = build(seed, optimizer)
    twin.load_state_dict(net.state_dict())
    fresh.load_state_dict(copy.deepcopy(bare.state_dict()))
    for _ in range(2):
        for model, each in ((net, wrapped), (twin, fresh)):
            step(model, each, ["a"])  # one task: the plain optimizer, whatever the memory says
        assert equal(net, twin)
