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
