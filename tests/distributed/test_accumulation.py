"""Micro-batches under DDP: what one process does, and nothing sent before it has to be."""

import pytest

from tests.distributed import jobs_accumulation, nets


@pytest.mark.parametrize("how", ["accumulate", "no_sync", "both", "neither"])
def test_accumulation(ranks, how):
    results = ranks(2).run(jobs_accumulation.accumulated, how)
    nets.equal_everywhere([state for state, _ in results])
    nets.assert_close(results[0][0], jobs_accumulation.accumulated_alone(how))
    assert results[0][1] >= 9  # three tasks a step are sent at least once
    if how != "neither":  # and no more: the first micro-batch waits for the second
        # + 3: the first step does not know yet what a task reaches
        assert results[0][1] <= 9 + 3


@pytest.mark.parametrize(
    ("options", "inside"), [({}, False), ({}, True), ({"rotate": 3}, False), ({"refresh_every": 2}, False)], ids=str
)
def test_a_step_whose_micro_batches_were_all_in_no_sync(ranks, options, inside):
    results = ranks(2).run(jobs_accumulation.all_in_no_sync, options, inside)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_accumulation.all_in_no_sync_alone(options))


def plain(change, part, penalty=False):
    """Return p.grad of one process after three micro-batches of the whole batch, by torch alone."""
    model = nets.build()
    for micro in range(3):
        losses = model(*nets.batch(micro))
        if penalty:
            losses = {"task1": losses["task1"]} if micro == 2 else losses
            losses["penalty"] = sum(p.square().sum() for p in jobs_accumulation.trained(model))
        sum(losses.values()).backward()
        for p in jobs_accumulation.trained(model) if micro < 2 else ():
            part(p.grad, change)
    return jobs_accumulation.gradients_of(model)


def on_one_of_two(g, change):
    # The mean over ranks, of which one has changed numbers.
    other = g.clone()
    change(other)
    g.add_(other).div_(2)


def second_half(g, change):
    if len(halves := g.chunk(2)) == 2:
        change(halves[1])


@pytest.mark.parametrize("change", ["set_to_zero", "halve", "leave"])
@pytest.mark.parametrize(
    ("kind", "which", "part"),
    [
        ("ddp", [0, 1], lambda g, change: change(g)),
        ("fsdp2", [0, 1], lambda g, change: change(g)),
        ("ddp", [1], on_one_of_two),
        ("fsdp2", [1], second_half),
    ],
)
def test_what_torch_cannot_see_between_two_backward_passes(ranks, kind, which, part, change):
    change = getattr(jobs_accumulation, change)
    results = ranks(2).run(jobs_accumulation.changed_between, kind, change, which)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], plain(change, part))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_penalty_added_to_a_later_total_drops_no_task(ranks, kind):
    results = ranks(2).run(jobs_accumulation.penalised, kind)
    nets.equal_everywhere([gradients for gradients, _ in results])
    nets.assert_close(results[0][0], plain(jobs_accumulation.leave, lambda *_: None, penalty=True))
    assert [names for _, names in results] == [["task0", "task1", "task2"]] * 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_mask_while_surgery_waits_is_refused_on_all_ranks(ranks, kind):
    for messages in ranks(2).run(jobs_accumulation.masked, kind):
        assert all("in part while surgery was waiting" in message for message in messages)
