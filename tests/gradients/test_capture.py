"""How gradients come in: four ways, one set of rows, and p.grad never lost."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurg
from gradsurg import MultiTaskError
from gradsurg.gradients.total import at_end_of_backward
from tests.networks import (
    MODELS,
    Heads,
    build,
    data,
    equal_weights,
    reference_rows,
    rows_of,
    run_backward,
    same,
    trained,
    twins,
)

WAYS = ["total", "backward", "task", "set_gradients"]
# Ways that run backward passes of ours or of the user's.
PASSES = ["total", "backward", "task"]


def wrapped(model, cls=torch.optim.SGD, lr=0.1, **options):
    return gradsurg.wrap(cls(trained(model), lr=lr), **options)


def gradients(model):
    return [p.grad for p in model.parameters()]


# -- item 2: four ways in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_equal_autograd_grad_to_the_bit(way, kind):
    model, other = twins(kind)
    optimizer = wrapped(model)
    run_backward(way, optimizer, model.losses(0))
    want = reference_rows(other.losses(0), trained(other))
    assert same(rows_of(optimizer), want)
    assert [g is None for row in want.values() for g in row].count(False) > 2


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("kind", MODELS)
def test_every_way_writes_the_same_gradient(way, kind):
    model, other = twins(kind)
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    run_backward("total", reference, other.losses(0))
    assert same(gradients(model), gradients(other))
    optimizer.step()
    reference.step()
    assert equal_weights(model, other)


@pytest.mark.parametrize("way", WAYS)
def test_task_specific_parameters_get_their_own_gradient_to_the_bit(way):
    model, other = twins()
    model.unused, other.unused = nn.Linear(2, 2), nn.Linear(2, 2)
    run_backward(way, wrapped(model, preferences={"left": 3.0}), model.losses(0))
    for name, loss in other.losses(0).items():
        loss.backward(retain_graph=True)
        head, own = model.heads[name], other.heads[name]
        assert same(gradients(head), gradients(own))
    assert all(p.grad is None for p in model.unused.parameters())
    assert not same(gradients(model.trunk), gradients(other.trunk)), "the tasks agree: nothing was put to the test"


@pytest.mark.parametrize("way", WAYS)
def test_frozen_and_unused_parameters_keep_no_gradient(way):
    model = build("patchy")
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))  # the frozen ones too
    losses = model.losses(0)
    if way == "set_gradients":
        optimizer.set_gradients(reference_rows(losses, trained(model)))
    else:
        run_backward(way, optimizer, losses)
    assert all(p.grad is None for m in (model.frozen, model.unused) for p in m.parameters())
    assert all(p.grad is not None for m in (model.conv, model.heads) for p in m.parameters())
    assert model.conv.weight.grad.stride() == model.conv.weight.stride()
    frozen = [p.clone() for p in model.frozen.parameters()]
    optimizer.step()
    assert same(frozen, list(model.frozen.parameters()))


@pytest.mark.parametrize("way", PASSES)
def test_parameters_outside_the_optimizer_get_the_ordinary_gradient(way):
    model, plain = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.trunk[2].parameters(), lr=0.1))
    for batch in range(2):  # it accumulates, as ordinary gradients do
        run_backward(way, optimizer, model.losses(batch))
        for i, loss in enumerate(plain.losses(batch).values()):
            loss.backward(retain_graph=i < 2)
    assert same(gradients(model.trunk[0]), gradients(plain.trunk[0]))
    assert same(gradients(model.heads), gradients(plain.heads))


@pytest.mark.parametrize("way", PASSES)
def test_dropout_and_other_forward_randomness_is_drawn_once(way):
    model = build()
    model.trunk.insert(1, nn.Dropout(0.5))
    optimizer = wrapped(model)
    losses = model.losses(0)
    want = reference_rows(losses, trained(model))
    run_backward(way, optimizer, losses)
    assert same(rows_of(optimizer), want)


# Inside the outer of two reentrant checkpoints grad mode is off, which the inner one remarks on; it is harmless.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", PASSES)
def test_rows_through_nested_checkpoints(way, reentrant):
    model, other = twins()

    def run(m, batch):
        x = data(batch, 16, 5).requires_grad_()  # reentrant checkpoints need an input that does

        def inner(h):
            return checkpoint(m.trunk[2], checkpoint(m.trunk[1], h, use_reentrant=reentrant), use_reentrant=reentrant)

        z = checkpoint(lambda x: inner(m.trunk[0](x)), x, use_reentrant=reentrant)
        return {n: (h(z) - data(i, 16, 2)).square().mean() for i, (n, h) in enumerate(m.heads.items())}

    optimizer = wrapped(model)
    run_backward(way, optimizer, run(model, 0))
    z = other.trunk(data(0, 16, 5))
    want = {n: (h(z) - data(i, 16, 2)).square().mean() for i, (n, h) in enumerate(other.heads.items())}
    assert same(rows_of(optimizer), reference_rows(want, trained(other)))


def test_total_itself_inside_a_reentrant_checkpoint():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    start = torch.zeros((), requires_grad=True)
    checkpoint(lambda s: optimizer.total(model.losses(0)) + 0 * s, start, use_reentrant=True).backward()
    run_backward("backward", reference, other.losses(0))
    assert same(gradients(model), gradients(other))


@pytest.mark.parametrize("way", PASSES)
def test_parameter_hooks_run_once_a_task_and_see_its_gradient(way):
    model, other = twins()
    optimizer, seen, posted = wrapped(model), [], []
    p = model.trunk[0].weight
    p.register_hook(lambda g: seen.append(g.clone()))
    p.register_post_accumulate_grad_hook(lambda q: posted.append(q.grad.clone()))
    run_backward(way, optimizer, model.losses(0))
    want = [row[0] for row in reference_rows(other.losses(0), [other.trunk[0].weight]).values()]
    assert same(seen, want)
    assert same(posted, want)


# -- the value of total ---------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum():
    model = build()
    optimizer = wrapped(model, preferences={"left": 2.0, "whole": 0.5})
    losses = model.losses(0)
    total = optimizer.total(losses, plain=torch.tensor(3.0))
    assert total.shape == ()
    want = 2 * losses["left"] + losses["right"] + 0.5 * losses["whole"] + 3
    torch.testing.assert_close(total.detach(), want.detach(), rtol=1e-6, atol=0)  # float32 sums of four numbers
    total.backward()


def test_total_without_grad_is_a_plain_number():
    model = build()
    optimizer = wrapped(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            losses = model.losses(0)
            total = optimizer.total(losses)
        assert not total.requires_grad
        assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # evaluating is not forgetting to call backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_total_is_at_least_float32(dtype):
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    total = gradsurg.wrap(torch.optim.SGD([w], lr=0.1)).total([w.sum(), w.square().sum()])
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    total.backward()
    assert w.grad.dtype == dtype


def test_losses_as_a_list_get_numbers_or_the_declared_names():
    model = build()
    optimizer = wrapped(model)
    optimizer.total(list(model.losses(0).values())).backward()
    assert optimizer.report.tasks == ("0", "1", "2")
    declared = wrapped(build(), tasks=["x", "y", "z"])
    losses = tuple(model.losses(0).values())
    declared.total(losses).backward()
    assert declared.report.tasks == ("x", "y", "z")


def test_losses_of_shape_one_are_scalars():
    model, other = twins()
    wrapped(model).total({k: v.reshape(1) for k, v in model.losses(0).items()}).backward()
    wrapped(other).total(other.losses(0)).backward()
    assert same(gradients(model), gradients(other))


def test_one_tensor_as_two_tasks():
    model = build("all shared")
    optimizer = wrapped(model)
    loss = model.losses(0)["left"]
    optimizer.total({"a": loss, "b": loss}).backward()
    rows = rows_of(optimizer)
    assert same(rows["a"], rows["b"])


# -- scaling, accumulation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1 / 3, 1024.0])
def test_scaled_totals_scale_the_rows(way, scale):
    model, other = twins()
    optimizer = wrapped(model)
    run_backward(way, optimizer, model.losses(0), scale)
    assert same(rows_of(optimizer), reference_rows(other.losses(0), trained(other), scale))


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_trains_as_without_it(way, fused, unscale):
    # Powers of two: scaling and unscaling are exact as long as nothing underflows, so equality is to the bit.
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused), surgery="sum")
    plain = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, fused=fused), surgery="sum")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for batch in range(5):
        for o, m in [(optimizer, model), (plain, other)]:
            o.zero_grad()
            if o is plain:
                o.total(m.losses(batch)).backward()
                if unscale:
                    nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                o.step()
                continue
            if way == "total":
                scaler.scale(o.total(m.losses(batch))).backward()
            else:
                run_backward(way, o, {k: scaler.scale(v) for k, v in m.losses(batch).items()})
            if unscale:
                scaler.unscale_(o)
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(o)
            scaler.update()
        assert optimizer.report.movement is not None
        # The weights of the rows are computed from norms that are 1024 times as long: same to float64 rounding.
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 4096.0


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_grad_scaler_skips_an_overflow_and_the_next_step_is_good(way, fused, where):
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused))
    reference = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in range(3):
        optimizer.zero_grad()
        losses = model.losses(batch)
        if batch == 1:
            bad = (model.trunk[0].weight if where == "trunk" else model.heads["right"].weight).sum()
            losses["right"] = losses["right"] + bad * float("inf")
        if way == "total":
            scaler.scale(optimizer.total(losses)).backward()
        else:
            run_backward(way, optimizer, {k: scaler.scale(v) for k, v in losses.items()})
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if batch == 1:
            assert same(before, [p.detach() for p in model.parameters()])
            assert scaler.get_scale() == 512.0
        else:
            reference.zero_grad()
            run_backward("total", reference, other.losses(batch))
            reference.step()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32, scaled norms


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_equals_one_big_batch(way, deferred, k):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for i in range(k):
        if deferred and i < k - 1:
            with optimizer.accumulate():
                run_backward(way, optimizer, model.losses(i), 1 / k)
            assert optimizer._gradsurg.pending
        else:
            run_backward(way, optimizer, model.losses(i), 1 / k)
    batches = [other.losses(i) for i in range(k)]
    run_backward("backward", reference, {name: sum(b[name] for b in batches) / k for name in batches[0]})
    for a, b in zip(gradients(model), gradients(other), strict=True):
        # The same sums of k float32 gradients in another order: a few last places of the largest entries.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    optimizer.step()
    assert optimizer.report.movement is not None


def test_accumulation_works_on_the_sum_of_rows_to_the_bit():
    model, other = twins()
    optimizer = wrapped(model)
    want = {}
    for batch in range(3):
        run_backward("total", optimizer, model.losses(batch))
        for name, row in reference_rows(other.losses(batch), trained(other)).items():
            have = want.get(name)
            want[name] = (
                row
                if have is None
                else [a if b is None else b if a is None else a + b for a, b in zip(have, row, strict=True)]
            )
        assert same(rows_of(optimizer), want)


def test_step_ends_the_rows():
    model = build()
    optimizer = wrapped(model)
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()
    assert rows_of(optimizer) == {}


def test_surgery_waits_for_step_if_all_of_it_was_deferred():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
        run_backward("total", optimizer, model.losses(1))
    for batch in range(2):
        run_backward("total", reference, other.losses(batch))
    optimizer.step()
    reference.step()
    assert equal_weights(model, other)
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("zero", ["optimizer none", "optimizer zeros", "model none", "model zeros"])
@pytest.mark.parametrize("before", ["nothing", "zeros", "foreign"])
def test_zeroing_while_surgery_waits_drops_the_rows(zero, before):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    if before != "nothing":
        sum(p.square().sum() for p in model.parameters()).backward()
    if before == "zeros":
        model.zero_grad(set_to_none=False)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    clear(zero, model, optimizer)
    run_backward("total", optimizer, model.losses(1))
    run_backward("total", reference, other.losses(1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(other), strict=True))


def test_a_step_after_zeroing_while_surgery_waits_is_a_step_without_gradient():
    model, plain_model = twins()
    optimizer, plain = wrapped(model, torch.optim.Adam), torch.optim.Adam(plain_model.parameters(), lr=0.1)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    model.zero_grad()
    optimizer.step()
    plain.step()
    assert equal_weights(model, plain_model)


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("which", ["trunk", "head", "all"])
def test_a_plain_backward_while_surgery_waits_loses_nothing(way, which):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)

    def extra(m):
        part = {"trunk": m.trunk, "head": m.heads["whole"], "all": m}[which]
        return sum(p.square().sum() for p in part.parameters())

    with optimizer.accumulate():
        run_backward(way, optimizer, model.losses(0))
    extra(model).backward()
    run_backward(way, optimizer, model.losses(1))
    for batch in range(2):
        run_backward("total", reference, other.losses(batch))
    extra(other).backward()
    assert rows_of(optimizer).keys() == model.losses(0).keys()
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # float32: one addition in another order


def test_parameters_without_elements_are_no_obstacle():
    model = Heads()
    model.empty = nn.Parameter(torch.ones(0))
    optimizer = wrapped(model)
    with optimizer.accumulate():
        optimizer.total({n: loss + model.empty.sum() for n, loss in model.losses(0).items()}).backward()
    optimizer.step()
    assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients


@pytest.mark.parametrize("before", ["nothing", "zeros", "foreign"])
@pytest.mark.parametrize("change", ["clip", "clip with others", "unscale", "fused scaler"])
def test_changing_p_grad_while_surgery_waits_is_refused(change, before):
    # Surgery at step() would overwrite what clipping did; that must not pass silently.
    model = build()
    optimizer = wrapped(model)
    if before != "nothing":
        sum(p.square().sum() for p in model.parameters()).backward()
    if before == "zeros":
        model.zero_grad(set_to_none=False)
    with optimizer.accumulate():
        run_backward("total", optimizer, model.losses(0))
    if "clip" in change:
        if "others" in change:
            model.trunk[0].bias.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif change == "unscale":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
    else:  # it unscales nothing: it hands its scale to the optimizer
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(MultiTaskError, match="waiting"):
        optimizer.step()
    assert same(before, [p.detach() for p in model.parameters()])
    vars(optimizer).pop("grad_scale", None)
    vars(optimizer).pop("found_inf", None)
    optimizer.zero_grad()
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()


def test_a_declared_task_that_never_came_is_named_when_clipping_met_waiting_surgery():
    model = build()
    optimizer = wrapped(model, tasks=["left", "right", "whole"])
    losses = model.losses(0)
    for name in ("left", "right"):
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(MultiTaskError, match="whole"):
        optimizer.step()


# -- whose is p.grad ------------------------------------------------------------------------------------------------


ZEROS = ["optimizer none", "optimizer zeros", "model none", "model zeros", "by hand none", "by hand zeros", "replaced"]


def clear(route, model, optimizer):
    owner, _, kind = route.partition(" ")
    if owner == "optimizer":
        optimizer.zero_grad(set_to_none=kind == "none")
    elif owner == "model":
        model.zero_grad(set_to_none=kind == "none")
    else:
        for p in model.parameters():
            if route == "by hand zeros":
                p.grad.zero_()
            else:
                p.grad = None if route == "by hand none" else torch.zeros_like(p)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", ZEROS)
def test_zeroing_by_any_route_starts_afresh(way, route):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    clear(route, model, optimizer)
    run_backward(way, optimizer, model.losses(1))
    run_backward(way, reference, other.losses(1))
    assert same(rows_of(optimizer), rows_of(reference))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(other), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_backward_before_is_kept_and_added(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    penalty = sum(p.square().sum() for p in model.parameters())
    penalty.backward()
    foreign = [g.clone() for g in gradients(model)]
    run_backward(way, optimizer, model.losses(0))
    run_backward(way, reference, other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    assert same(gradients(model), [u + f for u, f in zip(gradients(other), foreign, strict=True)])
    run_backward(way, optimizer, model.losses(1))  # and is counted once, however often surgery is redone
    run_backward(way, reference, other.losses(1))
    assert same(gradients(model), [u + f for u, f in zip(gradients(other), foreign, strict=True)])


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_backward_after_is_added(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    run_backward(way, reference, other.losses(0))
    sum(p.square().sum() for p in model.parameters()).backward()
    assert same(gradients(model), [u + 2 * p for u, p in zip(gradients(other), other.parameters(), strict=True)])
    optimizer.step()
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("way", WAYS)
def test_clipping_between_micro_batches_counts(way):
    # As in torch: what was clipped is added to, not undone.
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    run_backward(way, optimizer, model.losses(0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    clipped = [g.clone() for g in gradients(model)]
    run_backward(way, optimizer, model.losses(1))
    run_backward(way, reference, other.losses(1))
    assert same(gradients(model), [u + c for u, c in zip(gradients(other), clipped, strict=True)])


def test_clipping_before_the_step_keeps_the_guarantee():
    model = build("all shared")
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    corrected = 0
    for batch in range(10):
        optimizer.zero_grad()
        run_backward("total", optimizer, model.losses(batch))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients
        corrected += optimizer.report.movement.corrected
    assert corrected


def test_a_plain_step_between_is_not_judged_by_old_rows():
    model, plain_model = twins()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.05)
    run_backward("total", optimizer, model.losses(0))  # a step that something else called off
    for m in (model, plain_model):
        m.zero_grad()
        sum(m.losses(1).values()).backward()
    plain.step()
    with pytest.warns(UserWarning, match=r"p\.grad was replaced .* optimizer\.zero_grad\(\)") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert equal_weights(model, plain_model)
    run_backward("total", optimizer, model.losses(2))
    optimizer.zero_grad()  # the optimizer's own says that the losses are dropped
    sum(model.losses(3).values()).backward()
    optimizer.step()


def test_gradients_that_are_replaced_are_said_to_go_unjudged():
    model = build()
    optimizer = wrapped(model, lr=0.05)
    run_backward("total", optimizer, model.losses(0))
    for p in model.parameters():
        p.grad = -p.grad
    with pytest.warns(UserWarning, match="replaced"):
        optimizer.step()
    assert optimizer.report.movement is None
    run_backward("total", optimizer, model.losses(1))
    for p in model.parameters():
        p.grad.mul_(0.5)
    optimizer.step()
    assert optimizer.report.movement is not None


def test_a_wrapped_optimizer_that_is_given_no_losses_says_so_once():
    model, plain_model = twins()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.05)

    def train():
        for batch in range(3):
            for m, o in [(model, optimizer), (plain_model, plain)]:
                o.zero_grad()
                sum(m.losses(batch).values()).backward()
                o.step()

    with pytest.warns(UserWarning, match=r"no task's loss yet.*optimizer\.total\(losses\)") as caught:
        train()
    assert [each.filename for each in caught] == [__file__]
    assert equal_weights(model, plain_model)
    for batch in range(2):  # a plain step between is nobody's mistake once there are tasks
        optimizer.zero_grad()
        sum(model.losses(batch).values()).backward() if batch else run_backward("total", optimizer, model.losses(batch))
        optimizer.step()


@pytest.mark.parametrize("order", ["total first", "penalty first"])
@pytest.mark.parametrize("shared_graph", [False, True])
def test_a_penalty_in_the_same_backward(order, shared_graph):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    penalty = sum(p.square().sum() for p in model.trunk.parameters())
    total = optimizer.total(model.losses(0))
    if shared_graph:
        total, penalty = total * 1.0, penalty * 1.0
    (total + penalty if order == "total first" else penalty + total).backward()
    run_backward("backward", reference, other.losses(0))
    want = [p.grad + 2 * p.detach() for p in other.trunk.parameters()]
    assert same(gradients(model.trunk), want)
    assert same(gradients(model.heads), gradients(other.heads))
    assert same(rows_of(optimizer), rows_of(reference))


@pytest.mark.parametrize("penalised", [False, True])
def test_two_totals_in_one_backward(penalised):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    both = optimizer.total(model.losses(0)) + 2 * optimizer.total(model.losses(1))
    if penalised:
        both = model.heads["left"].bias.square().sum() + both + model.trunk[0].bias.square().sum()
    both.backward()
    second = {name: loss * 2 for name, loss in other.losses(1).items()}
    reference.backward(second)  # autograd runs what was built last first
    reference.backward(other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    for a, b in zip(gradients(model), gradients(other), strict=True):
        extra = 0
        if penalised and any(a is p.grad for p in (model.heads["left"].bias, model.trunk[0].bias)):
            extra = 2 * next(p for p in model.parameters() if p.grad is a).detach()
        assert torch.equal(a, b + extra)
    optimizer.step()
    assert optimizer.report.movement is not None


@pytest.mark.parametrize("way", ["total", "backward"])
def test_plain_is_a_loss_that_takes_no_part(way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for batch in range(2):  # with accumulation too
        losses = model.losses(batch)
        penalty = losses["left"] * 2.0 + model.trunk[0].weight.square().sum()  # shares the tasks' graph
        if way == "total":
            optimizer.total(losses, plain=penalty).backward()
        else:
            optimizer.backward(losses, plain=penalty)
        run_backward("backward", reference, other.losses(batch))
    foreign = [torch.zeros_like(p) for p in other.parameters()]
    for batch in range(2):
        penalty = other.losses(batch)["left"] * 2.0 + other.trunk[0].weight.square().sum()
        for f, g in zip(
            foreign, torch.autograd.grad(penalty, list(other.parameters()), allow_unused=True), strict=True
        ):
            f += 0 if g is None else g
    assert same(rows_of(optimizer), rows_of(reference))
    for a, b, f in zip(gradients(model), gradients(other), foreign, strict=True):
        torch.testing.assert_close(a, b + f, rtol=1e-6, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("way", ["total", "backward"])
@pytest.mark.parametrize(
    ("plain", "match"),
    [(torch.ones(3, requires_grad=True), "shape"), (0.5, "float"), (torch.tensor(1j, requires_grad=True), "complex")],
)
def test_plain_must_be_a_real_scalar_too(way, plain, match):
    model = build()
    optimizer = wrapped(model)
    with pytest.raises(ValueError, match=f"plain.*{match}"):
        getattr(optimizer, way)(model.losses(0), plain=plain)
    assert gradients(model) == [None] * len(gradients(model))


def test_plain_alone_trains():
    model = build()
    optimizer = wrapped(model)
    losses = {name: loss.detach() for name, loss in model.losses(0).items()}
    penalty = model.trunk[0].weight.square().sum()
    optimizer.total(losses, plain=penalty).backward()
    assert same(model.trunk[0].weight.grad, 2 * model.trunk[0].weight.detach())
    optimizer.zero_grad()
    penalty = model.trunk[0].weight.square().sum()
    optimizer.backward(losses, plain=penalty)
    assert same(model.trunk[0].weight.grad, 2 * model.trunk[0].weight.detach())
    optimizer.step()


# -- absent tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["None", "missing", "no grad_fn", "unconnected"])
@pytest.mark.parametrize("way", ["total", "backward"])
def test_an_absent_task_takes_no_part(absent, way):
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses, want = model.losses(0), other.losses(0)
    if absent == "None":
        losses["right"] = None
    elif absent == "missing":
        del losses["right"]
    elif absent == "no grad_fn":
        losses["right"] = losses["right"].detach()
    else:  # a loss of something else: a task whose row is empty
        losses["right"] = nn.Parameter(torch.ones(())).square()
    del want["right"]
    run_backward(way, optimizer, losses)
    run_backward(way, reference, want)
    assert same(gradients(model), gradients(other))
    assert all(p.grad is None for p in model.heads["right"].parameters())
    optimizer.step()


def test_tasks_come_and_go():
    model = build()
    optimizer = wrapped(model, torch.optim.Adam, lr=0.05)
    present = [{"left"}, {"left", "right"}, {"right"}, {"left", "right", "whole"}, {"whole", "left"}]
    for batch, names in enumerate(present):
        optimizer.zero_grad()
        losses = {name: loss for name, loss in model.losses(batch).items() if name in names}
        heads = {n: [p.detach().clone() for p in model.heads[n].parameters()] for n in model.heads}
        optimizer.total(losses).backward()
        optimizer.step()
        assert set(optimizer.report.tasks) == names
        for name in model.heads:
            assert same(heads[name], [p.detach() for p in model.heads[name].parameters()]) == (name not in names)
        if len(names) > 1:
            assert (optimizer.report.update_cosines >= -1e-4).all()  # float32 gradients


def test_tasks_of_micro_batches_may_differ():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for batch, name in enumerate(["left", "right", "left", "whole"]):
        optimizer.total({name: model.losses(batch)[name]}).backward()
    reference.backward(
        {
            "left": other.losses(0)["left"] + other.losses(2)["left"],
            "right": other.losses(1)["right"],
            "whole": other.losses(3)["whole"],
        }
    )
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["total", "backward"])
def test_retain_graph_allows_a_second_run(way):
    model, other = twins()
    optimizer = wrapped(model)
    losses = model.losses(0)
    if way == "total":
        total = optimizer.total(losses)
        total.backward(retain_graph=True)
        total.backward()
    else:
        optimizer.backward(losses, retain_graph=True)
        optimizer.backward(losses)
    want = reference_rows(other.losses(0), trained(other))
    assert same(rows_of(optimizer), {n: [None if g is None else g + g for g in row] for n, row in want.items()})


def test_a_total_run_twice_without_retain_graph_is_refused():
    model = build()
    total = wrapped(model).total(model.losses(0))
    total.backward()
    want = [g.clone() for g in gradients(model)]
    with pytest.raises(MultiTaskError, match="second time"):
        total.backward()
    assert same(gradients(model), want)


def test_create_graph_is_refused():
    model = build()
    optimizer = wrapped(model)
    with pytest.raises(MultiTaskError, match="create_graph"):
        optimizer.total(model.losses(0)).backward(create_graph=True)
    assert gradients(model) == [None] * len(gradients(model))
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("how", ["never run", "inputs=", "autograd.grad"])
def test_a_total_that_did_not_run_warns(how, zeros):
    model = build()
    optimizer = wrapped(model)
    if zeros:
        run_backward("total", optimizer, model.losses(0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    total = optimizer.total(model.losses(0))
    if how == "inputs=":
        total.backward(inputs=trained(model))
    elif how == "autograd.grad":
        torch.autograd.grad(total, trained(model), allow_unused=True)
    with pytest.warns(UserWarning, match="never ran") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        optimizer.step()


def test_inputs_that_leave_the_total_out_of_a_sum_warn():
    model = build()
    optimizer = wrapped(model)
    penalty = model.trunk[0].weight.square().sum()
    (optimizer.total(model.losses(0)) + penalty).backward(inputs=[model.trunk[0].weight])
    with pytest.warns(UserWarning, match="never ran") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_the_graph_is_freed_after_the_run():
    model = build()
    optimizer = wrapped(model)
    losses = model.losses(0)
    total = optimizer.total(losses)
    total.backward()
    last = list(losses.values())[-1]
    with pytest.raises(RuntimeError, match="second time"):
        last.backward()


def test_the_callback_runs_at_the_end_of_the_backward_pass():
    seen = []

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            at_end_of_backward(lambda: seen.append("end"), lambda: seen.append("dead"))
            return g

    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda g: seen.append("leaf"))
    Early.apply(x).backward()
    assert seen == ["leaf", "end"]


# -- task() ---------------------------------------------------------------------------------------------------------


def test_several_backward_calls_in_one_task_add_up():
    model, other = twins()
    optimizer = wrapped(model)
    losses = model.losses(0)
    with optimizer.task("a"):
        losses["left"].backward(retain_graph=True)
        losses["right"].backward(retain_graph=True)
    with optimizer.task("b"):
        losses["whole"].backward()
    rows = reference_rows(other.losses(0), list(other.trunk.parameters()))
    trunk = slice(0, len(rows["left"]))
    assert same(rows_of(optimizer)["a"][trunk], [x + y for x, y in zip(rows["left"], rows["right"], strict=True)])


def test_surgery_is_redone_at_each_exit_of_an_undeclared_task():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses, want = model.losses(0), other.losses(0)
    given = {}
    for name in losses:
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
        given[name] = want[name]
        reference.zero_grad()
        reference.backward(given, retain_graph=True)
        assert same(gradients(model), gradients(other))


def test_declared_tasks_operate_once_at_the_last_exit(monkeypatch):
    model, other = twins()
    optimizer, reference = wrapped(model, tasks=["left", "right", "whole"]), wrapped(other)
    runs = []
    write = optimizer._gradsurg.capture.write
    monkeypatch.setattr(optimizer._gradsurg.capture, "write", lambda result: (runs.append(len(result)), write(result)))
    losses = model.losses(0)
    for name in ("whole", "left"):
        with optimizer.task(name):
            losses[name].backward(retain_graph=True)
    assert optimizer.report is None
    with optimizer.task("right"):
        losses["right"].backward()
    assert runs[-1] == len(trained(model))
    reference.backward({name: other.losses(0)[name] for name in ("whole", "left", "right")})
    for a, b in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # float32; autograd sums the trunk in another order
    optimizer.step()


def test_declared_tasks_that_did_not_all_come_operate_at_step():
    model, other = twins()
    optimizer, reference = wrapped(model, tasks=["left", "right", "whole"]), wrapped(other)
    for o, m in [(optimizer, model), (reference, other)]:
        losses = m.losses(0)
        for name in ("left", "right"):
            with o.task(name):
                losses[name].backward(retain_graph=True)
        o.step()
    assert equal_weights(model, other)
    for o, m in [(optimizer, model), (reference, other)]:  # and the next step starts afresh
        o.zero_grad()
        losses = m.losses(1)
        for name in ("left", "right", "whole"):
            with o.task(name):
                losses[name].backward(retain_graph=True)
        o.step()
    assert equal_weights(model, other)


def test_a_task_block_without_a_backward_is_an_absent_task():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    for o, m in [(optimizer, model), (reference, other)]:
        losses = m.losses(0)
        if o is optimizer:
            with o.task("right"):
                pass
        with o.task("left"):
            losses["left"].backward()
        o.step()
    assert equal_weights(model, other)


def test_ways_in_can_be_mixed_within_a_step():
    model, other = twins()
    optimizer, reference = wrapped(model), wrapped(other)
    losses = model.losses(0)
    optimizer.backward({"left": losses["left"]}, retain_graph=True)
    with optimizer.task("right"):
        losses["right"].backward(retain_graph=True)
    optimizer.total({"whole": losses["whole"]}).backward()
    run_backward("backward", reference, other.losses(0))
    assert same(rows_of(optimizer), rows_of(reference))
    assert same(gradients(model), gradients(other))


# -- set_gradients --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["heads", "sparse"])
def test_parameters_declared_not_shared_get_the_plain_sum(kind):
    model, other = twins(kind)
    shared = [] if kind == "sparse" else list(model.trunk[0].parameters())
    if kind == "sparse":  # something else must be shared: shared=[] is a mistake
        model.extra = nn.Parameter(torch.ones(3))
        shared = [model.extra]
    optimizer = wrapped(model, shared=shared)
    run_backward("backward", optimizer, model.losses(0))
    for i, loss in enumerate(other.losses(0).values()):
        loss.backward(retain_graph=i < 2)
    want = {n: p.grad for n, p in other.named_parameters()}
    for name, p in model.named_parameters():
        if not any(p is s for s in shared):
            torch.testing.assert_close(p.grad.to_dense(), want[name].to_dense(), rtol=1e-6, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("way", PASSES)
def test_autocast(way):
    model, other = twins()
    optimizer = wrapped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, want = model.losses(0), other.losses(0)
    run_backward(way, optimizer, losses)
    assert same(rows_of(optimizer), reference_rows(want, trained(other)))
    assert not same(rows_of(optimizer), reference_rows(other.losses(0), trained(other))), "autocast did nothing"


def test_anomaly_mode():
    model, other = twins()
    optimizer, calm = wrapped(model), wrapped(other)
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_backward("total", optimizer, model.losses(0))
    run_backward("total", calm, other.losses(0))
    optimizer.step()
    calm.step()
    assert equal_weights(model, other)


def test_rows_are_those_of_the_batch_norm_in_training():
    model = Heads()
    model.trunk.insert(1, nn.BatchNorm1d(7))
    optimizer = wrapped(model)
    run_backward("total", optimizer, model.losses(0))
    assert model.trunk[1].num_batches_tracked == 1  # one forward, however many tasks


# -- L-BFGS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "search"),
    # A line search does not get anywhere on gradients that pile up, so "never" is without one.
    [("optimizer", None), ("model", None), ("never", None), ("optimizer", "strong_wolfe"), ("model", "strong_wolfe")],
)
def test_lbfgs_is_judged_by_its_first_evaluation(zero, search):
    # The step runs from the first evaluation's point, so that point's gradients say who is hurt.
    model = build("all shared")
    optimizer = gradsurg.wrap(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn=search))
    evaluations = []
    for batch in range(4):
        first = reference_rows(model.losses(batch), trained(model))
        before = [p.detach().clone() for p in trained(model)]

        def closure(batch=batch):
            if zero != "never":  # without it gradients pile up from one evaluation to the next, the rows must not
                (optimizer if zero == "optimizer" else model).zero_grad()
            total = optimizer.total(model.losses(batch))
            total.backward()
            evaluations.append(batch)
            return total

        optimizer.step(closure)
        d = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained(model), strict=True)]).double()
        assert d.any()
        for i, row in enumerate(first.values()):
            g = torch.cat([t.flatten() for t in row]).double()
            cosine = torch.dot(d, g) / (d.norm() * g.norm())
            assert cosine >= -1e-4  # float32 gradients
            # And the report speaks of the same point.
            assert optimizer.report.update_cosines[i].item() == pytest.approx(cosine.item(), abs=1e-4)
    assert len(evaluations) > 8, "one evaluation a step would prove nothing"
