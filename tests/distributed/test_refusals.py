"""Never silent: what cannot be done says so on every rank, and nothing is written half."""

import sys

import pytest

from tests.distributed import jobs_refusals, nets
from tests.distributed.pool import Pool, RankError

REFUSALS = {
    "plain parameters": "no DistributedDataParallel module owns these parameters",
    "model= of another model": "inside the module given as model=",
    "fsdp1": "use FSDP2",
    "fsdp1 as model=": "use FSDP2",
    "zero": "fully_shard",
    "sparse": "sparse=False",
    "ignored": "told to ignore the parameter 'unused.weight'",
    "features": "features= does not go with sharded parameters",
    "rotate": "rotate= does not go with sharded parameters",
    "another order": "different shapes, dtypes or order",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_say_what_to_do(ranks, what):
    for message in ranks(2).run(jobs_refusals.refused, what):
        assert REFUSALS[what] in message


def test_model_names_the_module(ranks):
    results = ranks(2).run(jobs_refusals.named)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], nets.alone(2))


@pytest.mark.parametrize("sharded", [False, True])
def test_check_sync_names_the_first_that_differs(ranks, sharded):
    for before, after in ranks(2).run(jobs_refusals.out_of_step, sharded):
        assert before == ""
        assert "'heads.1.bias' differs between ranks (rank 1 from rank 0)" in after


@pytest.mark.parametrize(
    ("kind", "option", "options"),
    [
        ("ddp", "preferences", {}),
        ("ddp", "preferences of this step", {}),
        ("ddp", "preferences of this step", {"rotate": 1}),
        ("fsdp2", "preferences of this step", {}),
        ("ddp", "seed", {}),
        ("ddp", "surgery", {"rotate": 1}),
        ("ddp", "rotate", {}),
        ("ddp", "refresh_every", {}),
        ("fsdp2", "refresh_every", {}),
        ("fsdp2", "preferences", {}),
        ("fsdp2", "guarantee", {}),
        ("fsdp2", "seed", {"refresh_every": 2}),
        ("replicas of shards", "preferences", {}),
        ("replicas of shards", "seed", {"refresh_every": 2}),
        ("replicas of shards", "preferences of this step", {}),
        ("tensor", "preferences", {}),
        ("tensor", "guarantee", {}),
        ("tensor", "preferences of this step", {}),
    ],
    ids=str,
)
def test_options_that_differ_are_refused_on_all_ranks(ranks, kind, option, options):
    results = ranks(2).run(jobs_refusals.other_options, kind, option, options)
    for message, _ in results:
        assert f"the ranks have different options: {option} is " in message
        assert " on rank 1" in message
    nets.equal_everywhere([state for _, state in results])


@pytest.mark.parametrize("how", ["late", "zero", "plain", "refresh"])
def test_a_parameter_left_unsharded_is_compared_in_every_step(ranks, how):
    results = ranks(2).run(jobs_refusals.partly_sharded, how)
    for messages, _ in results:
        assert messages[0] == ""
        assert "2 of the optimizer's 12 parameters are not sharded" in messages[1]
    nets.equal_everywhere([state for _, state in results])


@pytest.mark.parametrize("options", [{}, {"refresh_every": 4}, {"rotate": 1}], ids=str)
def test_check_sync_every_ends_a_run_whose_ranks_drift(ranks, options):
    for messages, still in ranks(2).run(jobs_refusals.drifting, "ddp", options):
        assert messages[:2] == ["", ""]
        assert "check_sync_every=2, before step 2: the parameter 'parameter 1' differs" in messages[2]
        assert "(rank 1 from rank 0)" in messages[2]
        assert messages[3] == messages[2]  # until someone mends it
        assert still


def test_check_sync_every_of_shards(ranks):
    """Every shard has one owner: what differs is no drift."""
    for messages, _ in ranks(2).run(jobs_refusals.drifting, "fsdp2", {}):
        assert messages == [""] * 4


@pytest.mark.parametrize("form", ["total", "backward"])
def test_a_rank_that_raises_takes_the_step_from_all(ranks, form):
    results = ranks(2).run(jobs_refusals.raising, form)
    assert results[1][0] == ["no gradient here", "no gradient here"]
    assert all("rank 1 raised in the backward passes" in message for message in results[0][0])
    assert len(results[0][0]) == 2
    nets.equal_everywhere([state for _, state in results])
    nets.assert_close(results[0][1], jobs_refusals.raising_alone())


@pytest.mark.parametrize(
    ("kind", "raises", "options"),
    [("ddp", False, {}), ("fsdp2", False, {}), ("fsdp2", True, {}), ("fsdp2", True, {"refresh_every": 2})],
    ids=str,
)
def test_a_rank_that_dies_ends_the_others_with_a_message(kind, raises, options):
    pool = Pool(2)
    try:
        with pytest.raises(RankError, match="rank 1: the process died") as error:
            pool.run(jobs_refusals.dying, kind, raises, options)
        (message,) = error.value.results  # of rank 0, which found everything as it was
        assert "another rank did not answer" in message
    finally:
        pool.end()


@pytest.mark.parametrize(("kind", "options"), [("ddp", {}), ("ddp", {"atomic": True}), ("fsdp2", {})], ids=str)
def test_a_rank_that_dies_before_the_end_of_step_leaves_the_others_as_they_were(kind, options):
    """The optimizer has moved the parameters by then; an update that was not held to the tasks is put back."""
    pool = Pool(2)
    try:
        with pytest.raises(RankError, match="rank 1: the process died") as error:
            pool.run(jobs_refusals.dying_before_step, kind, options)
        ((message, notes),) = error.value.results
        assert "another rank did not answer" in message
        assert "Parameters and p.grad of this rank are as before" in message
        said = "all parameters and the optimizer's state" if options.get("atomic") else "the optimizer's own state"
        assert any(said in note.lower() for note in notes) or sys.version_info < (3, 11)
    finally:
        pool.end()
