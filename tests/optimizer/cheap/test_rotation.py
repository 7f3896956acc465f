"""rotate=k: the backward passes of k tasks a step, moving averages for the others."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.optimizer.cheap.rotation import DECAY
from tests.networks import build, data, equal_weights, same, trained

TASKS = ("left", "right", "whole")


def wrapped(model, cls=torch.optim.SGD, lr=0.05, **options):
    return gradsurg.wrap(cls(trained(model), lr=lr), **options)


def step(optimizer, losses, scale=1.0):
    optimizer.zero_grad()
    (optimizer.total(losses) * scale).backward()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad /= scale
    optimizer.step()
    return optimizer.report.fresh or optimizer.report.tasks


def test_tasks_take_turns_and_each_step_costs_k_passes():
    model = build()
    passes = []
    model.trunk[0].weight.register_hook(lambda _: passes.append(1))
    optimizer = wrapped(model, rotate=1)
    turns, counts = [], []
    for batch in range(7):
        passes.clear()
        turns.append(step(optimizer, model.losses(batch)))
        counts.append(len(passes))
    assert turns == [TASKS, *[(name,) for name in TASKS], *[(name,) for name in TASKS]]
    assert counts == [3, 1, 1, 1, 1, 1, 1]
    assert optimizer.report.level == "moving averages"
    assert optimizer.report.tasks == TASKS


@given(k=st.integers(1, 5), pattern=st.lists(st.integers(1, 31), min_size=8, max_size=8))
def test_nobody_waits_longer_than_a_round(k, pattern):
    """Whatever comes and goes: k tasks a step and no task present throughout waits more than m/k steps."""
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.0), rotate=k)
    waited = {}
    for number, bits in enumerate(pattern):
        names = [str(i) for i in range(5) if bits >> i & 1 or i == 0]
        known = set(waited)
        fresh = step(optimizer, {name: (w * data(number * 5 + int(name), 3)).sum() for name in names})
        new = [name for name in names if name not in known]
        if len(names) > 1:
            assert set(new) <= set(fresh)
            assert len(fresh) == max(len(new), min(k, len(names)))
        for name in names:
            if len(names) > 1 or name in known:
                waited[name] = 0 if name in fresh else waited.get(name, 0) + 1
        assert waited.get("0", 0) <= 5


@pytest.mark.parametrize("k", [3, 4])
def test_k_of_all_tasks_is_no_rotation_to_the_bit(k):
    one, other = build(), build()
    a, b = wrapped(one, torch.optim.Adam, rotate=k), wrapped(other, torch.optim.Adam)
    for batch in range(4):
        step(a, one.losses(batch))
        step(b, other.losses(batch))
        assert a.report.level == "gradients"
    assert equal_weights(one, other)


def test_one_task_is_the_plain_optimizer_to_the_bit():
    one, other = build(), build()
    a, b = wrapped(one, torch.optim.AdamW, rotate=1), torch.optim.AdamW(trained(other), lr=0.05)
    for batch in range(3):
        step(a, {"left": one.losses(batch)["left"]})
        b.zero_grad()
        other.losses(batch)["left"].backward()
        b.step()
    assert equal_weights(one, other)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_direction_from_fresh_rows_and_averages(scale):
    """Against a plain float64 twin: averages corrected for their start, the due task's gradient as it is."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), rotate=1, guarantee="gradient")
    momenta, counts = {}, {}
    for number in range(9):
        x = data(number, 3, 6).double()
        losses = {name: (w @ x[i] - i).square() + w[i] ** 2 for i, name in enumerate(TASKS)}
        gradients = {name: torch.autograd.grad(loss, w, retain_graph=True)[0] for name, loss in losses.items()}
        due = TASKS if number == 0 else (TASKS[(number - 1) % 3],)
        rows = []
        for name in TASKS:
            if name in due:
                rows.append(gradients[name])
            else:
                rows.append(momenta[name] / (1 - DECAY ** counts[name]))
        u = gradsurg.combine(torch.stack(rows), normalize="norm", guarantee="gradient")
        before = w.detach().clone()
        assert step(optimizer, losses, scale) == due
        assert torch.allclose((before - w.detach()) / 0.1, u, rtol=1e-9, atol=1e-9)
        for name in due:
            momenta[name] = DECAY * momenta.get(name, 0) + (1 - DECAY) * gradients[name]
            counts[name] = counts.get(name, 0) + 1


def test_the_update_hurts_no_due_task_and_no_average():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.01, rotate=2)
    shared = list(model.trunk.parameters())
    for batch in range(12):
        losses = model.losses(batch)
        rows = {k: torch.autograd.grad(v, shared, retain_graph=True) for k, v in losses.items()}
        before = [p.detach().clone() for p in shared]
        fresh = step(optimizer, losses)
        d = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, shared, strict=True)])
        for name in fresh:
            g = torch.cat([g.flatten() for g in rows[name]])
            assert torch.dot(d, g) >= -1e-4 * d.norm() * g.norm()
        assert optimizer.report.update_cosines.min() >= -1e-4  # of the averages too


def test_heads_learn_when_their_task_is_due_and_by_their_plain_gradient():
    model = build()
    optimizer = wrapped(model, rotate=1)
    for batch in range(6):
        losses = model.losses(batch)
        expected = {
            k: torch.autograd.grad(v, list(model.heads[k].parameters()), retain_graph=True) for k, v in losses.items()
        }
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        for name in TASKS:
            got = [p.grad for p in model.heads[name].parameters()]
            fresh = optimizer.report.fresh or TASKS
            assert same(got, list(expected[name]) if name in fresh else [None, None])
        optimizer.step()


def copied_by_pickle(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


def copied_by_state_dict(model, optimizer):
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = build()
    other = wrapped(twin, torch.optim.Adam, rotate=1)
    twin.load_state_dict(weights)
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    assert same(state, before)  # what is given is not changed
    return twin, other


def by_a_bare_one(model, optimizer):
    twin = build()
    twin.load_state_dict(model.state_dict())
    bare = torch.optim.Adam(trained(twin), lr=0.05)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, gradsurg.wrap(bare, rotate=1)


def copied_by_dcp(model, optimizer):
    twin = build()
    twin.load_state_dict(model.state_dict())
    other = wrapped(twin, torch.optim.Adam, rotate=1)
    set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    return twin, other


def resumed_from_disk(folder, model, optimizers, twin, others):
    """Save with torch.distributed.checkpoint, and load into optimizers that never did a step."""
    state = [get_state_dict(model, each) for each in optimizers]
    saved = {"model": state[0][0], **{f"optimizer {k}": each for k, (_, each) in enumerate(state)}}
    checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
    state = [get_state_dict(twin, each) for each in others]
    loaded = {"model": state[0][0], **{f"optimizer {k}": each for k, (_, each) in enumerate(state)}}
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    for k, each in enumerate(others):
        set_state_dict(twin, each, model_state_dict=loaded["model"], optim_state_dict=loaded[f"optimizer {k}"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize(("before", "several"), [(0, False), (1, False), (5, False), (5, True)])
def test_resuming_from_a_distributed_checkpoint_on_disk_is_not_noticed(tmp_path, before, several):
    """The loading optimizer knows no task: what a checkpoint has of tasks by name, DCP would leave out."""

    def training(seed):
        model = build(seed=seed)
        parts = [model.trunk, model.heads] if several else [model]
        optimizers = [torch.optim.Adam(trained(part), lr=0.05) for part in parts]
        return model, gradsurg.wrap(optimizers, rotate=1)

    def due(model, optimizers, batch):
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[0].total(model.losses(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
        return optimizers[0].report.fresh or optimizers[0].report.tasks

    model, optimizers = training(0)
    for batch in range(before):
        due(model, optimizers, batch)
    for optimizer in optimizers:
        optimizer.zero_grad()
    twin, others = training(9)
    resumed_from_disk(tmp_path, model, optimizers, twin, others)
    for batch in range(before, before + 5):
        assert due(model, optimizers, batch) == due(twin, others, batch)
    assert equal_weights(model, twin)
    for optimizer, other in zip(optimizers, others, strict=True):
        assert same(copy.deepcopy(optimizer.state_dict()), other.state_dict())
        assert "tensor" not in repr(other)


@pytest.mark.parametrize(
    "route", [copied_by_pickle, copied_by_state_dict, by_a_bare_one, copied_by_dcp, lambda *x: copy.deepcopy(x)]
)
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_resuming_is_not_noticed(route, before):
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, rotate=1)
    for batch in range(before):
        step(optimizer, model.losses(batch))
    twin, other = route(model, optimizer)
    for batch in range(before, before + 5):
        assert step(optimizer, model.losses(batch)) == step(other, twin.losses(batch))
    assert equal_weights(model, twin)
    assert "tensor" not in repr(optimizer)  # the averages are in checkpoints, not in the live groups


def test_checkpoints_of_bare_optimizers_are_exchanged():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, rotate=1)
    for batch in range(3):
        step(optimizer, model.losses(batch))
    bare = torch.optim.Adam(trained(model), lr=0.05)
    bare.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(torch.optim.Adam(trained(model), lr=0.05).state_dict())
    assert step(optimizer, model.losses(0)) == TASKS  # nothing is known: all are due


def test_wrapping_what_loaded_a_wrapped_checkpoint_drops_its_seal():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, rotate=1)
    step(optimizer, model.losses(0))
    bare = torch.optim.Adam(trained(model), lr=0.05)
    bare.load_state_dict(optimizer.state_dict())
    (piece,) = gradsurg.wrap(bare).state_dict()["param_groups"][0]["gradsurg"]["sealed"]
    assert "tensor" not in repr(piece)
    assert piece.keys() >= {"step", "tasks"}
    assert "sealed" not in piece


def test_several_optimizers_share_the_averages():
    model = build()
    halves = trained(model)[:4], trained(model)[4:]
    optimizers = gradsurg.wrap([torch.optim.SGD(half, lr=0.05) for half in halves], rotate=1)
    single_model = build()
    single = wrapped(single_model, rotate=1)
    for batch in range(5):
        if batch == 3:  # a checkpoint in between, of each by itself
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[0].total(model.losses(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
        step(single, single_model.losses(batch))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained(model), trained(single_model), strict=True))


def test_micro_batches_of_a_step_have_the_same_tasks_due():
    model = build()
    optimizer = wrapped(model, rotate=1)
    step(optimizer, model.losses(0))
    optimizer.zero_grad()
    with optimizer.accumulate():
        (optimizer.total(model.losses(1)) / 2).backward()
    (optimizer.total(model.losses(2)) / 2).backward()
    assert optimizer.report.fresh == ("left",)
    optimizer.step()
    assert step(optimizer, model.losses(3)) == ("right",)


def test_a_scaler_that_skips_a_step_leaves_the_turn_and_the_averages():
    model, reference = build(), build()
    optimizer, other = wrapped(model, rotate=1), wrapped(reference, rotate=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for batch in range(5):
        if batch in (0, 2):
            losses = model.losses(batch)
            for name in losses:
                losses[name] = losses[name] * float("inf")
            optimizer.zero_grad()
            scaler.scale(optimizer.total(losses)).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        scaler.scale(optimizer.total(model.losses(batch))).backward()
        scaler.step(optimizer)
        scaler.update()
        step(other, reference.losses(batch))
        assert optimizer.report.fresh == other.report.fresh
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained(model), trained(reference), strict=True))


def test_skip_task_leaves_the_task_out_and_its_average_alone():
    model = build()
    optimizer = wrapped(model, rotate=1, nonfinite="skip_task")
    step(optimizer, model.losses(0))
    losses = model.losses(1)
    losses["left"] = losses["left"] * float("nan")
    optimizer.zero_grad()
    optimizer.total(losses).backward()
    assert optimizer.report.nonfinite == ("left",)
    optimizer.step()
    assert all(p.isfinite().all() for p in trained(model))
    assert [step(optimizer, model.losses(2 + i)) for i in range(3)] == [("right",), ("whole",), ("left",)]
    assert all(p.isfinite().all() for p in trained(model))


def test_with_functions_only_the_tasks_that_are_due_are_computed():
    model = build()
    optimizer = wrapped(model, rotate=1)
    computed = []

    def compute(name, batch):
        computed.append(name)
        return model.losses(batch)[name]

    for batch in range(4):
        optimizer.zero_grad()
        optimizer.backward({name: lambda name=name, batch=batch: compute(name, batch) for name in TASKS})
        optimizer.step()
    assert computed == [*TASKS, *TASKS]


@pytest.mark.parametrize("kind", ["all shared", "sparse", "complex", "dtypes", "scalar"])
def test_kinds_of_models(kind):
    model = build(kind)
    optimizer = wrapped(model, lr=0.01, rotate=1)
    for batch in range(7):
        step(optimizer, model.losses(batch))
    assert optimizer.report.level == "moving averages"
    assert all(p.isfinite().all() for p in trained(model))


def test_averages_in_less_memory():
    model = build()
    optimizer = wrapped(model, rotate=1, row_dtype=torch.bfloat16)
    for batch in range(3):
        step(optimizer, model.losses(batch))
    (piece,) = optimizer.state_dict()["param_groups"][0]["gradsurg"]["sealed"]
    packed = piece["rows"]
    assert {t.dtype for row in packed.values() for t in row if t is not None} == {torch.bfloat16}
    assert all((t is None) == (i >= 4) for row in packed.values() for i, t in enumerate(row))  # no heads


@pytest.mark.parametrize(
    ("options", "match"),
    [({"rotate": 0}, "rotate=0"), ({"rotate": "2"}, "rotate='2'"), ({"rotate": 1, "refresh_every": 3}, "choose one")],
)
def test_options_that_do_not_go_together(options, match):
    with pytest.raises(ValueError, match=match):
        wrapped(build(), **options)


def test_gradients_that_users_bring_themselves():
    optimizer = wrapped(build(), rotate=1)
    with pytest.raises(MultiTaskError, match="rotate=1"), optimizer.task("left"):
        pass
    with pytest.raises(MultiTaskError, match="rotate=1"):
        optimizer.set_gradients({"left": []})
